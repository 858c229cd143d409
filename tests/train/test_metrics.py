"""Sums of micro-batches against means by hand in float64 numpy, over all pairs and tokens at once."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_dpo.arrays import TokenStats
from jax_dpo.loss.scores import PairSums, pair_sums
from jax_dpo.train.metrics import Sums, Window, evaluation, named, step_sums

BETA = 0.2


def random_sums(slots: int, seed: int) -> PairSums:
    """[1, slots, 2] of made-up responses."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 30, (1, slots, 2)).astype(np.float32)
    draw = lambda scale: (tokens * rng.normal(0, scale, tokens.shape)).astype(np.float32)  # noqa: E731
    hits = np.floor(tokens * rng.random(tokens.shape)).astype(np.float32)
    kl = np.abs(draw(0.1))
    return PairSums(draw(2.0), draw(2.0), kl, tokens, np.abs(draw(3.0)), draw(0.5), hits, draw(1.0))


def by_hand(x: PairSums, loss: np.ndarray) -> dict[str, float]:
    """TRL's metrics of pairs [N, 2], with `kl_divergence` pooled over all tokens."""
    x = PairSums(*(np.asarray(a, np.float64) for a in x if a is not None))
    reward, tokens = BETA * (x.logp - x.ref_logp), x.tokens.sum(0)
    return {
        "loss": loss.mean(),
        "rewards/chosen": reward[:, 0].mean(),
        "rewards/rejected": reward[:, 1].mean(),
        "rewards/margins": (reward[:, 0] - reward[:, 1]).mean(),
        "rewards/accuracies": (reward[:, 0] > reward[:, 1]).mean(),
        "logps/chosen": x.logp[:, 0].mean(),
        "logps/rejected": x.logp[:, 1].mean(),
        "logits/chosen": x.mean_logit[:, 0].sum() / tokens[0],
        "logits/rejected": x.mean_logit[:, 1].sum() / tokens[1],
        "entropy": x.entropy.sum() / tokens.sum(),
        "mean_token_accuracy": x.top1[:, 0].sum() / tokens[0],
        "kl_divergence": x.kl.sum() / tokens.sum(),
        "kl_divergence/chosen": x.kl[:, 0].sum() / tokens[0],
        "kl_divergence/rejected": x.kl[:, 1].sum() / tokens[1],
    }


def assert_close(found: dict[str, float], want: dict[str, float]) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, atol=1e-6, err_msg=name)


def joined(parts: list[PairSums]) -> PairSums:
    whole = (None if xs[0] is None else np.concatenate([np.asarray(x)[0] for x in xs]) for xs in zip(*parts))
    return PairSums(*whole)


def step_of(parts: list[PairSums], losses: list[np.ndarray]) -> Sums:
    """A step of several micro-batches whose pairs all weigh the same, each with an empty slot at its end."""
    pairs = sum(len(x) for x in losses)
    total = Sums(*(jnp.float32(0) for _ in Sums._fields))
    for sums, loss in zip(parts, losses):
        grown = PairSums(*(x if x is None else jnp.pad(jnp.asarray(x), ((0, 0), (0, 1), (0, 0))) for x in sums))
        weight = jnp.asarray(np.append(np.full(len(loss), 1 / pairs), 0.0), jnp.float32)[None]
        part = step_sums(jnp.float32(loss.sum() / pairs), grown, weight, jnp.float32(BETA))
        total = jax.tree.map(jnp.add, total, part)
    return total


def test_a_step_is_its_pairs_and_tokens_at_once() -> None:
    parts, losses = [random_sums(3, 1), random_sums(5, 2)], [np.arange(3.0), np.arange(5.0) / 7]
    found = named({k: float(v) for k, v in step_of(parts, losses)._asdict().items()})
    assert_close(found, by_hand(joined(parts), np.concatenate(losses)))


def test_a_window_is_the_mean_over_its_steps_and_pools_their_tokens() -> None:
    steps = [[random_sums(4, 3)], [random_sums(4, 4)], [random_sums(4, 5)]]
    losses = [np.arange(4.0), np.ones(4), np.arange(4.0) ** 2]
    window = Window()
    for parts, loss in zip(steps, losses):
        window.add(step_of(parts, [loss]), 2)
    assert_close(window.metrics(), by_hand(joined([p for parts in steps for p in parts]), np.concatenate(losses)))


def test_a_short_step_of_a_window_weighs_as_its_micro_batches() -> None:
    """As in TRL, whose metrics are means over micro-batches and whose loss is a mean over steps; here a micro-batch is two pairs."""
    steps, losses = [[random_sums(4, 3)], [random_sums(2, 4)]], [np.arange(4.0), np.ones(2)]
    window = Window()
    for parts, loss in zip(steps, losses):
        window.add(step_of(parts, [loss]), len(loss) // 2)
    want = by_hand(joined([p for parts in steps for p in parts]), np.concatenate(losses))
    assert_close(window.metrics(), want | {"loss": np.mean([loss.mean() for loss in losses])})


def test_an_evaluation_counts_every_pair_once() -> None:
    sums, loss = random_sums(7, 6), np.arange(7.0)
    one = joined([sums])
    assert_close(evaluation(loss, one, BETA), by_hand(one, loss))


def test_without_a_kl_the_estimate_has_a_name_of_its_own() -> None:
    """The reference as sums made beforehand: log pi - log ref over all tokens, by hand."""
    sums, loss = random_sums(4, 8), np.arange(4.0)
    found = named({k: float(v) for k, v in step_of([sums._replace(kl=None)], [loss])._asdict().items()})
    want = by_hand(joined([sums]), loss)
    want = {name: value for name, value in want.items() if not name.startswith("kl_")}
    wide = PairSums(*(np.asarray(x, np.float64) for x in sums if x is not None))
    assert_close(found, want | {"kl_estimate": (wide.logp - wide.ref_logp).sum() / wide.tokens.sum()})


def test_ties_are_not_right() -> None:
    zero = np.zeros((3, 2), np.float32)
    equal = PairSums(zero, zero, zero, zero + 5, zero, zero, zero, zero)
    assert evaluation(np.zeros(3), equal, BETA)["rewards/accuracies"] == 0


@pytest.mark.parametrize(("kl", "shown"), [(-1e-7, 0.0), (0.5, 0.05), (math.nan, math.nan)])
def test_kl_is_shown_without_the_rounding_below_zero(kl: float, shown: float) -> None:
    sums = dict.fromkeys(Sums._fields, 0.0) | {"tokens_chosen": 5.0, "tokens_rejected": 5.0, "kl_chosen": kl}
    sums["kl_tokens"] = 10.0
    np.testing.assert_equal(named(sums)["kl_divergence"], shown)


def test_sums_by_slot_are_a_loop_over_tokens() -> None:
    rng = np.random.default_rng(0)
    slot = rng.integers(0, 5, (2, 11)).astype(np.int32)  # two pairs of two branches; 4 is padding
    fields = {name: rng.standard_normal((2, 11)).astype(np.float32) for name in ("logp", "ref_logp", "kl", "entropy")}
    rest = {name: np.ones((2, 11), np.float32) for name in ("mean_logit", "log_sum_sq", "top1")}
    weight = rng.random((2, 11)).astype(np.float32)
    found = pair_sums(TokenStats(**fields, **rest), jnp.asarray(slot), 2, 2, jnp.asarray(weight))
    want = {name: np.zeros((2, 4)) for name in ("logp", "kl", "tokens", "wpo")}
    for r, k in np.ndindex(slot.shape):
        if slot[r, k] < 4:
            want["logp"][r, slot[r, k]] += fields["logp"][r, k] * weight[r, k]
            want["kl"][r, slot[r, k]] += fields["kl"][r, k]
            want["tokens"][r, slot[r, k]] += 1
            want["wpo"][r, slot[r, k]] += fields["logp"][r, k] - 1
    for name, value in want.items():
        np.testing.assert_allclose(getattr(found, name).reshape(2, 4), value, atol=1e-5, err_msg=name)
