"""AOT: groups of pairs sorted apart, wherever they lie. Oracle: the paper's formula (arXiv 2406.05882) group by group in float64, its
gradient by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_dpo.loss.aot import AOT_TYPES
from jax_dpo.loss.family import LossOptions, mixed_loss, pair_loss
from jax_dpo.loss.scores import PairSums


def sums_of(logp: jax.Array, ref: jax.Array) -> PairSums:
    zero = jnp.zeros(logp.shape)
    return PairSums(logp, ref, zero, zero + 1, zero, zero, zero, zero)


def by_hand(
    name: str, logp: np.ndarray, ref: np.ndarray, members: list[np.ndarray], beta: float, e: float
) -> tuple[float, np.ndarray]:
    """(mean over groups of their mean losses, its derivative by `logp` [N, 2])."""
    first, second = (logp[:, 0] - logp[:, 1], ref[:, 0] - ref[:, 1]) if name == "aot" else (logp - ref).T
    loss, by = 0.0, np.zeros(logp.shape)
    for group in members:
        share = 1 / (len(members) * len(group))
        ranked = (group[np.argsort(x[group], kind="stable")] for x in (first, second))
        for i, j in zip(*ranked):
            z = beta * (first[i] - second[j])
            loss += share * ((1 - e) * np.logaddexp(0, -z) + e * np.logaddexp(0, z))
            slope = share * beta * (1 / (1 + np.exp(-z)) - (1 - e))
            by[i] += slope * (np.array([1, -1]) if name == "aot" else np.array([1, 0]))
            by[j] -= slope * (np.array([0, 0]) if name == "aot" else np.array([0, 1]))
    return loss, by


@pytest.mark.parametrize("name", AOT_TYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_groups_are_sorted_apart_wherever_their_pairs_lie(name: str, ties: bool) -> None:
    """Groups of 5, 5 and 3 pairs scattered over 3 rows of 6 slots; with ties the gradient goes by a pair's place in its group."""
    rng = np.random.default_rng(3)
    logp, ref = rng.normal(-20, 3, (2, 13, 2))
    if ties:  # of policy margins, and of both log-ratios
        logp, ref = np.round(logp / 4) * 4, np.round(ref / 4) * 4
    members = [np.arange(0, 5), np.arange(5, 10), np.arange(10, 13)]
    slots = rng.permutation(18)[:13]
    spread = {key: np.zeros((18, 2), np.float32) for key in ("logp", "ref")}
    spread["logp"][slots], spread["ref"][slots] = logp, ref
    group, weight = np.full((18, 2), -1, np.int32), np.zeros(18, np.float32)
    for number, pairs in enumerate(members):
        group[slots[pairs]] = [(number, place) for place in range(len(pairs))]
        weight[slots[pairs]] = 1 / (3 * len(pairs))
    options = LossOptions(types=(name,), label_smoothing=0.2)

    def mean(logp: jax.Array) -> jax.Array:
        sums = sums_of(logp.reshape(3, 6, 2), jnp.asarray(spread["ref"]).reshape(3, 6, 2))
        where, shares = jnp.asarray(group).reshape(3, 6, 2), jnp.asarray(weight).reshape(3, 6)
        return mixed_loss(sums, where, shares, jnp.float32(0.3), options)

    loss, by_logp = jax.jit(jax.value_and_grad(mean))(jnp.asarray(spread["logp"]))
    want, slope = by_hand(name, logp, ref, members, 0.3, 0.2)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    np.testing.assert_allclose(np.asarray(by_logp)[slots], slope, atol=2e-7)
    assert not np.asarray(by_logp)[np.setdiff1d(np.arange(18), slots)].any()


def test_the_penalty_stands_beside_the_loss() -> None:
    kl = jnp.array([[[0.5, 0.25], [1.0, 2.0]]])
    tokens = jnp.array([[[4.0, 6.0], [3.0, 3.0]]])
    zero = jnp.zeros((1, 2, 2))
    sums = PairSums(zero, zero, kl, tokens, zero, zero, zero, zero)
    options = LossOptions(types=("aot",), kl_reduction="token")
    found = pair_loss(sums, zero.astype(int) + 1, jnp.float32(0.2), jnp.float32(0.7), options)[0]
    np.testing.assert_allclose(found, 0.2 * 0.7 * np.array([0.75 / 10, 3.0 / 6]), rtol=1e-6)
