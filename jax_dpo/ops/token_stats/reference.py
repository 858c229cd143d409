"""Token statistics from whole logits by automatic differentiation: the oracle of the fast versions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_dpo.arrays import TokenStats

# What carries no gradient.
STILL = tuple(name for name in TokenStats._fields if name not in ("logp", "kl"))


def factored_logits(
    hidden: jax.Array,
    ref_hidden: jax.Array | None,
    unembed: jax.Array,
    ref_unembed: jax.Array | None,
    softcap: float | None,
    scale: float,
) -> tuple[jax.Array, jax.Array | None, float]:
    """Float32 logits [R, K, V] of policy and reference (None where it is not at hand) without their last factor, and that factor.

    Where both share the unembedding, one matrix product makes both: two products that read the same matrix may round differently,
    and then equal hidden states would not give a KL of exactly 0.
    """
    z_ref: jax.Array | None = None
    if ref_hidden is None:
        z = jnp.einsum("rkd,vd->rkv", hidden, unembed, preferred_element_type=jnp.float32)
    elif ref_unembed is None:
        both = jnp.stack([hidden, ref_hidden])
        z, z_ref = jnp.einsum("srkd,vd->srkv", both, unembed, preferred_element_type=jnp.float32)
    else:
        z = jnp.einsum("rkd,vd->rkv", hidden, unembed, preferred_element_type=jnp.float32)
        z_ref = jnp.einsum("rkd,vd->rkv", ref_hidden, ref_unembed, preferred_element_type=jnp.float32)
    if softcap is None:
        return z, jax.lax.stop_gradient(z_ref), scale
    capped = None if z_ref is None else jnp.tanh(z_ref * (scale / softcap))
    return jnp.tanh(z * (scale / softcap)), jax.lax.stop_gradient(capped), softcap


def weighted_sum(p: jax.Array, x: jax.Array) -> jax.Array:
    """sum_v p_v x_v over the last axis, as a product of vectors: XLA's CPU backend takes 60 times as long for the sum of products."""
    return jnp.einsum("...v,...v->...", p, x, precision=jax.lax.Precision.HIGHEST)


def token_stats(
    hidden: jax.Array,
    ref_hidden: jax.Array | None,
    unembed: jax.Array,
    ref_unembed: jax.Array | None,
    target: jax.Array,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> TokenStats:
    """See `api.token_stats`."""
    z, z_ref, factor = factored_logits(hidden, jax.lax.stop_gradient(ref_hidden), unembed, ref_unembed, softcap, scale)
    z, z_ref = z * factor, None if z_ref is None else z_ref * factor
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, z.shape, 2)
    is_target = vocabulary == target[..., None]
    # A masked sum instead of a gather: a gather from logits that are sharded over the vocabulary cannot be partitioned.
    pick = lambda x: jnp.sum(jnp.where(is_target, x, 0.0), axis=-1)  # noqa: E731
    log_pi = z - jax.nn.logsumexp(z, axis=-1, keepdims=True)
    log_ref = None if z_ref is None else z_ref - jax.nn.logsumexp(z_ref, axis=-1, keepdims=True)
    pi = jnp.exp(log_pi)
    still = jax.lax.stop_gradient
    best = jnp.argmax(still(z), axis=-1)
    return TokenStats(
        logp=pick(log_pi),
        ref_logp=None if log_ref is None else pick(log_ref),
        kl=None if log_ref is None else jnp.sum(pi * (log_pi - log_ref), axis=-1),
        entropy=still(-jnp.sum(pi * log_pi, axis=-1)),
        mean_logit=still(jnp.mean(z, axis=-1)),
        log_sum_sq=still(jax.nn.logsumexp(2 * log_pi, axis=-1)),
        top1=(best == target).astype(jnp.float32),
    )
