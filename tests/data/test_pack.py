"""Packing: nothing lost, nothing over the row's bounds, rows well filled, and the arrays say what the trees hold."""

from __future__ import annotations

import numpy as np
import pytest

from jax_dpo.data.batch import Placed, Tree, empty_batch, fill_rows, tree_tokens
from jax_dpo.data.loader import Feed, evaluation_batches, prefetch, shares, step_batch
from jax_dpo.data.pack import Cost, RowShape, Sizes, choose_shape, layout, micro_batches, pack, row_fill

COST = Cost(token=1.0, attention=1e-3, scored=0.5, micro_batch=64.0)


def random_sizes(n: int, seed: int = 0) -> Sizes:
    rng = np.random.default_rng(seed)
    prompt, chosen, rejected = (
        np.minimum(rng.lognormal(np.log(m), 0.6, n), 400).astype(int) + 1 for m in (152, 95, 95)
    )
    return Sizes(prompt + chosen + rejected, chosen + rejected)


def test_pack_places_every_tree_once_within_the_bounds() -> None:
    sizes = random_sizes(300)
    shape = RowShape(1280, 900, 4, 1)
    rows = pack(sizes, shape)
    assert sorted(i for row in rows for i in row) == list(range(300))
    for row in rows:
        assert sizes.tokens[row].sum() <= 1280
        assert sizes.scored[row].sum() <= 900
        assert len(row) <= 4


def test_pack_refuses_what_cannot_fit() -> None:
    with pytest.raises(ValueError, match="130 tokens"):
        pack(Sizes(np.array([130]), np.array([10])), RowShape(128, 128, 2, 1))


def test_the_chosen_shape_fills_its_rows() -> None:
    """The benchmark's lengths, 4 pairs a step: at least 0.75 of the computed tokens are real."""
    sizes = random_sizes(256)
    steps = np.split(np.random.default_rng(1).permutation(256), 64)
    shape = choose_shape(sizes, steps, row_shards=1, micro_batch_tokens=4 * 2 * 512, cost=COST)
    assert shape.row_tokens % 128 == 0
    assert shape.row_tokens >= sizes.tokens.max()
    tokens = computed = 0
    for s in steps:
        count = micro_batches(len(pack(Sizes(sizes.tokens[s], sizes.scored[s]), shape)), shape, 1)
        tokens += int(sizes.tokens[s].sum())
        computed += count * shape.rows * shape.row_tokens
    assert tokens / computed > 0.75
    assert row_fill(tokens, 1, RowShape(computed, 1, 1, 1), 1) == tokens / computed


def test_a_micro_batch_keeps_to_its_tokens() -> None:
    sizes = random_sizes(256)
    steps = np.split(np.arange(256), 8)
    shape = choose_shape(sizes, steps, row_shards=1, micro_batch_tokens=2500, cost=COST)
    assert shape.rows == 1 or shape.rows * shape.row_tokens <= 2500


TREES = [
    Tree(np.array([1, 2, 3]), np.array([4, 5]), np.array([1, 2, 3]), np.array([6, 7, 8]), True),
    Tree(np.array([], int), np.array([9, 10, 11]), np.array([], int), np.array([12, 13]), True),
    Tree(np.array([20, 21]), np.array([22]), np.array([30]), np.array([31, 32]), False),
]


def test_a_row_says_what_its_trees_hold() -> None:
    shape = RowShape(24, 12, 3, 1)
    batch = empty_batch(1, shape, token_weight=True, sft=True)
    fill_rows(batch, 0, [[Placed(i, 0.5, 0.25) for i in range(3)]], TREES.__getitem__, ld_alpha=0.5)
    row = {k: None if v is None else v[0] for k, v in batch._asdict().items()}
    assert row["tokens"][:19].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 20, 21, 22, 30, 31, 32]
    assert row["positions"][:19].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2]
    assert row["pair"].tolist() == [1] * 8 + [2] * 5 + [3] * 3 + [4] * 3 + [0] * 5
    assert row["branch"][:19].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 1, 1, 1, 2, 2, 0, 0, 1, 0, 2, 2]
    # The first token of both answers is predicted by the prompt's last token; without a prompt nothing predicts it.
    assert row["source"][:11].tolist() == [2, 3, 2, 5, 6, 8, 9, 11, 14, 16, 17]
    assert row["target"][:11].tolist() == [4, 5, 6, 7, 8, 10, 11, 13, 22, 31, 32]
    assert row["slot"].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 5, 6]
    assert row["length"].tolist() == [[2, 3], [3, 2], [1, 2]]
    assert row["weight"].tolist() == [0.5] * 3
    assert row["index"].tolist() == [0, 1, 2]
    assert row["token_weight"][:11].tolist() == [1, 1, 1, 1, 0.5, 1, 0.5, 1, 1, 1, 0.5]
    assert row["sft_weight"][:11].tolist() == [0.25, 0.25, 0, 0, 0, 0.25, 0.25, 0, 0.25, 0, 0]
    assert [tree_tokens(t) for t in TREES] == [8, 5, 6]


def test_shares_are_means_of_means() -> None:
    placed = shares([np.array([3, 1, 2]), np.array([0])], lambda i: 10 * (i + 1))
    assert [p.pair for p in placed] == [3, 1, 2, 0]
    np.testing.assert_allclose([p.weight for p in placed], [1 / 6, 1 / 6, 1 / 6, 1 / 2])
    np.testing.assert_allclose([p.sft_weight for p in placed], [1 / 180] * 3 + [1 / 20])


class Source:
    def __len__(self) -> int:
        return len(TREES)

    def tree(self, i: int) -> Tree:
        return TREES[i]


SIZES = Sizes(np.array([8, 5, 6]), np.array([5, 3, 3]))


def feed(first: int, last: int) -> Feed:
    return Feed(RowShape(8, 6, 2, 1), row_shards=2, first_row=first, last_row=last, most=2)


def test_processes_fill_their_own_rows_of_one_batch() -> None:
    groups = [np.array([0, 1]), np.array([2])]
    counts = np.array([11, 5, 6]), np.array([2, 2, 1])
    whole = step_batch(Source(), SIZES, *counts, groups, feed(0, 2))
    assert whole.micro_batches == 2
    assert whole.tokens == 19
    assert whole.trl_tokens == 22
    assert whole.fill == 19 / 32
    assert whole.batch.weight.sum() == 1.0
    parts = [step_batch(Source(), SIZES, *counts, groups, feed(r, r + 1)).batch for r in (0, 1)]
    for field, x in whole.batch._asdict().items():
        if x is not None:
            np.testing.assert_array_equal(np.concatenate([getattr(p, field) for p in parts], axis=1), x)


def test_evaluation_sees_every_pair_once() -> None:
    seen = [i for b in evaluation_batches(Source(), SIZES, feed(0, 2)) for i in b.index.ravel().tolist() if i >= 0]
    assert sorted(seen) == [0, 1, 2]


def test_prefetch_keeps_order_raises_and_ends() -> None:
    assert list(prefetch(range(20))) == list(range(20))

    def broken():
        yield 1
        raise KeyError("in the thread")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(KeyError, match="in the thread"):
        next(items)
    endless = prefetch(iter(int, 1))
    next(endless)
    endless.close()


def test_groups_are_kept_whole() -> None:
    """Every group lies in one micro-batch, every tree once, and no micro-batch has more rows than there are."""
    rng = np.random.default_rng(5)
    sizes = Sizes(rng.integers(20, 100, 41), rng.integers(5, 20, 41))
    groups = [np.arange(at, min(at + 4, 41)) for at in range(0, 41, 4)]
    shape = RowShape(128, 40, 8, 2)
    parts = layout(sizes, shape, 2, groups)
    assert all(len(rows) <= 4 for rows in parts)
    held = [sorted(i for row in rows for i in row) for rows in parts]
    assert sorted(i for some in held for i in some) == list(range(41))
    assert all(any(set(group.tolist()) <= set(some) for some in held) for group in groups)
    assert len(layout(sizes, shape, 2)) <= len(parts) < len(groups), "several groups share a micro-batch where they fit"
    with pytest.raises(ValueError, match="a group of 4 trees"):
        layout(sizes, RowShape(128, 40, 8, 1), 1, groups)


def test_rows_for_the_largest_group() -> None:
    sizes = Sizes(np.full(64, 100), np.full(64, 20))
    steps = [np.arange(16)]
    shape = choose_shape(sizes, steps, row_shards=2, micro_batch_tokens=128, cost=COST, least_rows=4)
    assert shape.rows >= 4


def test_a_pair_carries_its_group_and_its_place_in_it() -> None:
    groups = [np.array([2, 0]), np.array([1])]
    counts = np.array([11, 5, 6]), np.array([2, 2, 1])
    made = Feed(RowShape(8, 6, 2, 2), row_shards=1, first_row=0, last_row=2, most=2, whole_groups=True)
    batch = step_batch(Source(), SIZES, *counts, groups, made).batch
    assert batch.group is not None
    at = {int(i): g.tolist() for i, g in zip(batch.index.reshape(-1), batch.group.reshape(-1, 2)) if i >= 0}
    assert at == {2: [0, 0], 0: [0, 1], 1: [1, 0]}
    assert (batch.group[batch.index < 0] == -1).all()
