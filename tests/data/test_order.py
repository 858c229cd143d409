"""The order of examples. Oracle: values of torch.randperm, recorded from torch (seeds 0 and 42), and the shuffle's definition."""

from __future__ import annotations

import time

import numpy as np
import pytest

from jax_dpo.data.order import (
    START,
    Curriculum,
    Position,
    epoch_order,
    pairs_at,
    position_after,
    step_pairs,
    steps_per_epoch,
)

# torch.randperm(10, generator=torch.Generator().manual_seed(seed))
RECORDED = {0: [4, 1, 7, 5, 3, 9, 0, 8, 6, 2], 42: [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]}
RECORDED[43] = [8, 4, 9, 0, 5, 1, 6, 7, 2, 3]


@pytest.mark.parametrize("seed", RECORDED)
def test_order_is_torchs(seed: int) -> None:
    assert epoch_order(10, seed, 0, "random").tolist() == RECORDED[seed]


def test_an_epoch_adds_to_the_seed() -> None:
    assert epoch_order(10, 40, 2, "random").tolist() == RECORDED[42]


def test_trls_steps_of_forty_pairs() -> None:
    """Rows of steps 5 and 6 of a TRL run over 40 pairs, 4 a step, seed 42."""
    steps = [
        step_pairs(40, seed=42, strategy="random", micro_batch=1, micro_batches_per_step=4, step=k) for k in (4, 5)
    ]
    assert [np.concatenate(s).tolist() for s in steps] == [[27, 29, 35, 17], [19, 25, 6, 21]]


def test_order_is_the_plain_shuffle() -> None:
    """Against the shuffle written out, with draws from an MT19937 of the standard library's kind."""
    n, seed = 257, 7
    bits = np.random.MT19937()
    bits._legacy_seeding(seed)
    want = list(range(n))
    for i in range(n - 1):
        j = i + int(bits.random_raw()) % (n - i)
        want[i], want[j] = want[j], want[i]
    assert epoch_order(n, seed, 0, "random").tolist() == want


def test_sequential_and_small_sets() -> None:
    assert epoch_order(5, 42, 3, "sequential").tolist() == [0, 1, 2, 3, 4]
    assert epoch_order(1, 42, 0, "random").tolist() == [0]
    assert epoch_order(0, 42, 0, "random").tolist() == []
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(5, 42, 0, "random")[0] = 1
    with pytest.raises(ValueError, match="expected one of random, sequential, curriculum"):
        epoch_order(5, 42, 0, "group_by_length")
    with pytest.raises(ValueError, match="64 bits"):
        epoch_order(2**32 // 20, 42, 0, "random")


def test_order_is_quick() -> None:
    start = time.perf_counter()
    order = epoch_order(200_000, 1, 0, "random")
    assert time.perf_counter() - start < 2.0
    assert np.array_equal(np.sort(order), np.arange(200_000))


@pytest.mark.parametrize(
    ("n", "micro", "accumulation", "want"), [(7, 1, 4, 2), (8, 2, 2, 2), (3, 1, 4, 1), (9, 4, 2, 2)]
)
def test_steps_per_epoch(n: int, micro: int, accumulation: int, want: int) -> None:
    assert steps_per_epoch(n, micro, accumulation) == want


def test_accumulation_never_crosses_an_epoch() -> None:
    """7 pairs, micro-batches of 2, 3 to a step: 3 micro-batches (6 pairs), then one short one, then the next epoch."""

    def take(k: int) -> list[list[int]]:
        some = step_pairs(7, seed=5, strategy="random", micro_batch=2, micro_batches_per_step=3, step=k)
        return [m.tolist() for m in some]

    first, second = (epoch_order(7, 5, e, "random").tolist() for e in (0, 1))
    assert take(0) == [first[:2], first[2:4], first[4:6]]
    assert take(1) == [first[6:]]
    assert take(2) == [second[:2], second[2:4], second[4:6]]
    assert take(3) == [second[6:]]


def test_positions_walk_through_the_data() -> None:
    """position_after is the same as taking the steps one by one."""
    sizes = {"micro_batch": 3, "micro_batches_per_step": 2}
    place = START
    for k in range(25):
        assert position_after(k, 20, **sizes) == place
        taken = sum(map(len, pairs_at(place, 20, seed=0, strategy="random", **sizes)))
        place = Position(place.epoch, place.consumed + taken)
        if place.consumed == 20:
            place = Position(place.epoch + 1, 0)


def test_resume_with_other_batch_sizes() -> None:
    """5 steps of 4 x 1, then 3 x 2 from there: every pair of the epoch once, in its order."""
    n, order = 41, epoch_order(41, 9, 0, "random").tolist()
    seen: list[int] = []
    for k in range(5):
        some = step_pairs(n, seed=9, strategy="random", micro_batch=4, micro_batches_per_step=1, step=k)
        seen += np.concatenate(some).tolist()
    at = position_after(5, n, 4, 1)
    assert at == Position(0, 20)
    left = steps_per_epoch(n, 3, 2, consumed=20)
    assert left == 4
    for k in range(left):
        some = step_pairs(n, seed=9, strategy="random", micro_batch=3, micro_batches_per_step=2, step=k, start=at)
        seen += np.concatenate(some).tolist()
    assert seen == order
    assert position_after(left, n, 3, 2, start=at) == Position(1, 0)
    assert position_after(0, n, 3, 2, start=Position(0, n)) == Position(1, 0)


def test_impossible_positions() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        position_after(1, 0, 1, 1)
    with pytest.raises(ValueError, match="cannot be used up"):
        position_after(1, 5, 1, 1, start=Position(0, 6))


GAPS = np.array([0.3, 2.0, 0.3, 5.0, -1.0, 0.9, 4.0, 0.3, 1.0, 0.1], np.float32)


def curriculum(buckets: int, later: str = "random") -> Curriculum:
    return Curriculum(GAPS, buckets, later)


def test_a_curriculum_of_one_bucket_is_the_random_order() -> None:
    for epoch in range(3):
        found = epoch_order(10, 42, epoch, "curriculum", curriculum(1, "curriculum"))
        assert found.tolist() == epoch_order(10, 42, epoch, "random").tolist()


def test_a_bucket_for_each_pair_is_the_order_of_the_gaps() -> None:
    """Equal gaps (rows 0, 2 and 7) stand as the shuffle of the seed has them: rows 2, 0, 7 of torch.randperm, seed 42."""
    assert epoch_order(10, 42, 0, "curriculum", curriculum(10)).tolist() == [3, 6, 1, 8, 5, 2, 0, 7, 9, 4]
    assert epoch_order(10, 42, 0, "curriculum", curriculum(99)).tolist() == [3, 6, 1, 8, 5, 2, 0, 7, 9, 4]


def test_buckets_go_from_wide_to_narrow_and_are_shuffled_inside() -> None:
    """By hand: the buckets of three hold the three, three and four widest gaps; inside, torch.randperm's order 2 6 1 8 4 5 0 9 3 7."""
    order = epoch_order(10, 42, 0, "curriculum", curriculum(3))
    assert order.tolist() == [6, 1, 3, 2, 8, 5, 4, 0, 9, 7]
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1
    other = epoch_order(10, 43, 0, "curriculum", curriculum(3))
    assert sorted(other[:3]) == [1, 3, 6] and other.tolist() != order.tolist()
    assert [n for n, _, _ in curriculum(3).ranges()] == [3, 3, 4]
    assert curriculum(3).ranges()[0][1:] == (5.0, 2.0) and curriculum(3).ranges()[-1][2] == -1.0
    assert len(curriculum(99).ranges()) == 10


def test_later_epochs_are_as_told() -> None:
    again = epoch_order(10, 42, 1, "curriculum", curriculum(3, "curriculum"))
    assert sorted(again[:3]) == [1, 3, 6]
    assert again.tolist() != epoch_order(10, 42, 0, "curriculum", curriculum(3, "curriculum")).tolist()
    assert epoch_order(10, 42, 1, "curriculum", curriculum(3)).tolist() == RECORDED[43]


def test_a_step_of_a_curriculum_is_found_from_any_place() -> None:
    order = epoch_order(10, 1, 0, "curriculum", curriculum(4)).tolist()
    whole = []
    for k in range(3):
        options = {"seed": 1, "strategy": "curriculum", "micro_batch": 2, "micro_batches_per_step": 2}
        step = step_pairs(10, **options, step=k, curriculum=curriculum(4))
        begun = step_pairs(10, **options, step=0, start=Position(0, 4 * k), curriculum=curriculum(4))
        assert [m.tolist() for m in step] == [m.tolist() for m in begun]
        whole += np.concatenate(step).tolist()
    assert whole == order
    with pytest.raises(ValueError, match="needs their gaps"):
        epoch_order(11, 1, 0, "curriculum", curriculum(4))
    with pytest.raises(ValueError, match="needs their gaps"):
        epoch_order(10, 1, 0, "curriculum")
