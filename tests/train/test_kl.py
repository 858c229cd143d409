"""KL of single responses, by position and as quantiles. Oracle: loops over tokens in float64 numpy."""

from __future__ import annotations

import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_dpo.arrays import TokenStats
from jax_dpo.loss.positions import buckets
from jax_dpo.loss.scores import PairSums, pair_sums
from jax_dpo.train.kl import NAMES, ResponseKL, Responses, on_policy, responses_of
from jax_dpo.train.metrics import Window

# Scored tokens of (chosen, rejected) of each pair, by rows; a side of a pair may have none.
ROWS = [[(1, 5), (9, 2)], [(3, 0), (17, 4)], [(2, 2)]]
SLOTS, SCORED = 2, 32


def made(rows: list[list[tuple[int, int]]], seed: int = 0) -> tuple[Any, Any, list[list[list[float]]]]:
    """Token KLs [R, K], their slots, and the same as lists: [pair][side][token]."""
    rng = np.random.default_rng(seed)
    kl = rng.gamma(0.3, 0.2, (len(rows), SCORED)).astype(np.float32)
    slot = np.full(kl.shape, 2 * SLOTS, np.int32)
    lists = []
    for r, row in enumerate(rows):
        at = 0
        for s, pair in enumerate(row):
            lists.append([[], []])
            for side, n in enumerate(pair):
                slot[r, at : at + n] = 2 * s + side
                lists[-1][side] = [float(x) for x in kl[r, at : at + n]]
                at += n
    return kl, slot, lists


def on_device(kl: Any, slot: Any) -> Responses:
    one = jnp.ones(kl.shape)
    stats = TokenStats(one, one, jnp.asarray(kl), one, one, one, one)
    found = responses_of(pair_sums(stats, jnp.asarray(slot), SLOTS, 2, None))
    assert found is not None
    return found


def bucket(position: int) -> tuple[int, int]:
    """1, 2-4, then from one power of two to the next."""
    if position == 1:
        return 1, 1
    last = max(4, 2 ** math.ceil(math.log2(position)))
    return (2 if last == 4 else last // 2 + 1), last


def by_hand(lists: list[list[list[float]]]) -> dict[str, float]:
    sides = {"chosen": [p[0] for p in lists if p[0]], "rejected": [p[1] for p in lists if p[1]]}
    every = sides["chosen"] + sides["rejected"]
    want = {"kl_sequence": np.mean([sum(r) for r in every])}
    want |= {f"kl_sequence/{side}": np.mean([sum(r) for r in some]) for side, some in sides.items()}
    for name, share in (("p50", 0.5), ("p90", 0.9)):
        want[f"kl_sequence/{name}"] = np.quantile([sum(r) for r in every], share)
        want[f"kl_divergence/{name}"] = np.quantile([sum(r) / len(r) for r in every], share)
    want["kl_sequence/max"] = max(sum(r) for r in every)
    want["kl_divergence/max"] = max(sum(r) / len(r) for r in every)
    return want


def assert_close(found: dict[str, float], want: dict[str, float]) -> None:
    assert set(found) == set(want) == set(NAMES)
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_buckets_hold_every_position_once() -> None:
    for longest in (1, 2, 4, 5, 8, 9, 100, 1025):
        found = buckets(longest)
        held = [p for first, last in found for p in range(first, last + 1)]
        assert held == list(range(1, len(held) + 1)) and len(held) >= longest
        assert all(bucket(p) == (first, last) for first, last in found for p in (first, last))
    assert buckets(0) == [(1, 1)]


def test_each_response_counts_once_and_each_token_in_its_bucket() -> None:
    kl, slot, lists = made(ROWS)
    found = ResponseKL()
    found.add(on_device(kl, slot))
    assert_close(found.metrics(), by_hand(lists))
    profile = json.loads(json.dumps(found.profile(), allow_nan=False))
    bounds = [tuple(x) for x in profile["positions"]]
    assert bounds == [(1, 1), (2, 4), (5, 8), (9, 16), (17, 32)]  # the longest has 17
    for side, name in enumerate(("chosen", "rejected")):
        part, some = profile[name], [p[side] for p in lists if p[side]]
        held: dict[tuple[int, int], list[float]] = {b: [] for b in bounds}
        for response in some:
            for position, x in enumerate(response, start=1):
                held[bucket(position)].append(x)
        assert part["tokens_at"] == [len(held[b]) for b in bounds]
        for value, b in zip(part["kl_at"], bounds):
            assert value == (pytest.approx(np.mean(held[b]), rel=1e-6) if held[b] else None)
        assert part["responses"] == len(some)
        assert part["kl_sequence"]["p90"] == pytest.approx(np.quantile([sum(r) for r in some], 0.9), rel=1e-6)
        assert part["kl_divergence"]["max"] == pytest.approx(max(sum(r) / len(r) for r in some), rel=1e-6)


def test_a_window_pools_the_responses_of_its_steps_and_survives_json_to_the_bit() -> None:
    steps, lists = [], []
    for seed, rows in enumerate((ROWS, ROWS[:2], [[(30, 2)]])):
        kl, slot, more = made(rows, seed)
        steps.append(on_device(kl, slot))
        lists += more
    whole, first = Window(), Window()
    zero = on_device(*made([[]], 0)[:2])  # a row of padding
    for window, some in ((whole, steps), (first, steps[:2])):
        for responses in (zero, *some):
            window.responses.add(responses)
    assert_close(whole.responses.metrics(), by_hand(lists))
    gone_on = Window.from_meta(json.loads(json.dumps(first.meta())))
    gone_on.responses.add(steps[2])
    assert gone_on.metrics() == whole.metrics()
    assert gone_on.responses.profile() == whole.responses.profile()


def test_what_is_not_finite_stays_so_and_rounding_below_zero_does_not_show() -> None:
    slot = np.full((1, SCORED), 2 * SLOTS, np.int32)
    slot[0, :4] = [0, 0, 1, 1]
    kl = np.zeros((1, SCORED), np.float32)
    kl[0, :2] = -1e-7
    found = ResponseKL()
    found.add(on_device(kl, slot))
    assert set(found.metrics().values()) == {0.0} and found.profile()["chosen"]["kl_at"] == [0.0, 0.0]
    kl[0, 1] = math.nan
    found = ResponseKL()
    found.add(on_device(kl, slot))
    assert all(math.isnan(found.metrics()[name]) for name in ("kl_sequence/chosen", "kl_sequence", "kl_divergence/p50"))
    assert found.profile()["chosen"]["kl_sequence"] == {"p50": None, "p90": None, "max": None}


def test_without_a_reference_there_is_nothing() -> None:
    zero = jnp.zeros((1, 2, 2))
    assert responses_of(PairSums(zero, zero, None, zero + 1, zero, zero, zero, zero)) is None
    assert ResponseKL().metrics() == {} and ResponseKL().profile() == {}


def test_on_policy_errors_are_those_of_many_draws() -> None:
    """The standard error of the ratio is the spread of the ratios of many sets of prompts, to a few percent."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 60, (4000, 64)).astype(np.float64)
    kl = tokens * rng.gamma(2.0, 0.05, tokens.shape) * (1 + tokens / 60)
    found = [on_policy(k, t) for k, t in zip(kl, tokens)]
    for value, error in (("kl_on_policy", "kl_on_policy/se"), ("kl_on_policy/sequence", "kl_on_policy/sequence_se")):
        spread = np.std([f[value] for f in found])
        assert np.mean([f[error] for f in found]) == pytest.approx(spread, rel=0.04)
    assert found[0]["kl_on_policy/length"] == tokens[0].mean()
    assert set(on_policy(kl[0, :1], tokens[0, :1])) == {
        f"kl_on_policy{x}" for x in ("", "/sequence", "/length")
    }  # one prompt has no spread
