"""From token statistics [R, K] to one number a response [R, S, B]."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_dpo.arrays import TokenStats
from jax_dpo.loss.positions import in_bucket

CHOSEN, REJECTED = 0, 1


class PairSums(NamedTuple):
    """Sums over the scored tokens of each response, [R, S, B] float32, on the device or as numpy; 0 in empty slots.

    `kl` is None where the reference is only sums of log-probabilities, made beforehand.
    """

    logp: Any
    """sum log pi, nats (with LD-DPO's weights where they are set)."""
    ref_logp: Any
    kl: Any
    """sum of exact token KLs, nats."""
    tokens: Any
    """number of scored tokens."""
    entropy: Any
    mean_logit: Any
    top1: Any
    wpo: Any
    """sum of log pi(y) - log sum_v pi(v)^2 (WPO, arXiv 2406.11827)."""
    kl_at: Any = None
    """[R, S, B, P] `kl` by position in the response (`positions.buckets`), without gradient; None where there is no `kl`."""

    @property
    def logratio(self) -> Any:
        """log pi(y) - log ref(y), nats, [R, S, B]."""
        return self.logp - self.ref_logp


class Given(NamedTuple):
    """What the data say of each pair, [R, S]; None where they say nothing. See `Batch`."""

    beta: Any = None
    """multiple of the beta in force"""
    margin: Any = None
    label: Any = None
    weight: Any = None

    def beta_of(self, beta: Any) -> Any:
        """Each pair's beta, where `beta` is in force: a scalar where it is the same for all."""
        return beta if self.beta is None else beta * self.beta


NOTHING_GIVEN = Given()


def pair_sums(
    stats: TokenStats,
    slot: jax.Array,
    slots: int,
    branches: int,
    token_weight: jax.Array | None,
    ref_logps: jax.Array | None = None,
) -> PairSums:
    """Segment sums by `slot`.

    Args:
      stats: per-token results [R, K].
      slot: [R, K] int32, `branches * pair + branch` of the token; `branches * slots` is padding.
      token_weight: [R, K] weight of each token's log-probabilities (LD-DPO), None for 1 everywhere.
      ref_logps: [R, S, B] the reference's sums (under the same weights), where `stats` do not have its log-probabilities.
    """
    # One-hot products rather than scatters: they stay on their rows' device and are summed in one fixed order.
    one_hot = (slot[..., None] == jnp.arange(slots * branches, dtype=jnp.int32)).astype(jnp.float32)

    def add(x: jax.Array) -> jax.Array:
        total = jnp.einsum("rk,rkj->rj", x, one_hot, precision=jax.lax.Precision.HIGHEST)
        return total.reshape(slot.shape[0], slots, branches)

    weighted = (lambda x: x) if token_weight is None else (lambda x: x * token_weight)
    real = (slot < slots * branches).astype(jnp.float32)
    return PairSums(
        logp=add(weighted(stats.logp)),
        ref_logp=ref_logps if stats.ref_logp is None else add(weighted(stats.ref_logp)),
        kl=None if stats.kl is None else add(stats.kl),
        tokens=add(real),
        entropy=add(stats.entropy),
        mean_logit=add(stats.mean_logit),
        top1=add(stats.top1),
        wpo=add(jax.lax.stop_gradient(stats.logp) - stats.log_sum_sq),
        kl_at=None if stats.kl is None else _by_position(jax.lax.stop_gradient(stats.kl), slot, one_hot, branches),
    )


def _by_position(x: jax.Array, slot: jax.Array, one_hot: jax.Array, branches: int) -> jax.Array:
    """Sums [R, S, B, P] of x [R, K] by response and position; `one_hot` [R, K, S * B] says whose a token is."""
    here = x[..., None] * in_bucket(slot)
    total = jnp.einsum("rkp,rkj->rjp", here, one_hot, precision=jax.lax.Precision.HIGHEST)
    return total.reshape(len(slot), -1, branches, total.shape[-1])
