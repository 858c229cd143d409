"""Token statistics from whole logits with a hand-written backward: the fastest way where the logits are small enough to keep.

The algebra is that of `chunked`; the logits of both models are kept for the backward, so that nothing is multiplied twice. Policy and
reference go through the same operations with the same residuals, so that equal models give equal numbers to the bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_dpo.arrays import TokenStats
from jax_dpo.ops.token_stats.reference import STILL, factored_logits, weighted_sum


def _forward(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale):
    """Logits are `factor * z`. The factor comes after differences are taken: with it inside, a compiler that fuses a product and a
    sum rounds once in one place and twice in another, and equal models would have a KL of 1e-7."""
    z, z_ref, factor = factored_logits(hidden, ref_hidden, unembed, ref_unembed, softcap, scale)
    ids = jax.lax.broadcasted_iota(jnp.int32, z.shape, 2)
    is_target = ids == target[..., None]

    def normaliser(z: Any) -> tuple[Any, Any, Any]:
        top = jnp.max(z, axis=-1)
        total = jnp.sum(jnp.exp((z - top[..., None]) * factor), axis=-1)
        return top * factor + jnp.log(total), jnp.sum(jnp.where(is_target, z, 0.0), axis=-1), top

    lse, zy, top = normaliser(z)
    nothing: tuple[Any, Any, Any] = (None, None, None)
    lse_ref, zy_ref, _ = nothing if z_ref is None else normaliser(z_ref)
    tied_before = jnp.sum(jnp.where((z >= top[..., None]) & (ids < target[..., None]), 1.0, 0.0), axis=-1)
    pi = jnp.exp(z * factor - lse[..., None])
    stats = TokenStats(
        logp=zy * factor - lse,
        ref_logp=None if z_ref is None else zy_ref * factor - lse_ref,
        kl=None if z_ref is None else weighted_sum(pi, (z - z_ref) * factor - (lse - lse_ref)[..., None]),
        entropy=lse - weighted_sum(pi, z * factor),
        mean_logit=jnp.mean(z, axis=-1) * factor,
        log_sum_sq=jnp.log(jnp.sum(jnp.square(pi), axis=-1)),
        top1=((zy >= top) & (tied_before == 0)).astype(jnp.float32),
    )
    return stats, (z, z_ref, lse, lse_ref)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _token_stats(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale):
    return _forward(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale)[0]


def _fwd(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale):
    stats, kept = _forward(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale)
    return stats, (hidden, ref_hidden, unembed, ref_unembed, target, kept, stats.kl)


def _bwd(softcap, scale, saved, cotangent):
    hidden, ref_hidden, unembed, ref_unembed, target, (z, z_ref, lse, lse_ref), kl = saved
    g = cotangent.logp[..., None]
    factor = scale if softcap is None else softcap
    pi = jnp.exp(z * factor - lse[..., None])
    is_target = jax.lax.broadcasted_iota(jnp.int32, z.shape, 2) == target[..., None]
    pull = -g
    if z_ref is not None:
        pull = cotangent.kl[..., None] * ((z - z_ref) * factor - (lse - lse_ref + kl)[..., None]) - g
    dz = pi * pull + jnp.where(is_target, g, 0.0)
    if softcap is not None:
        dz = dz * (1.0 - jnp.square(z))
    dz = (dz * scale).astype(hidden.dtype)
    d_hidden = jnp.einsum("rkv,vd->rkd", dz, unembed, preferred_element_type=jnp.float32)
    d_unembed = jnp.einsum("rkv,rkd->vd", dz, hidden, preferred_element_type=jnp.float32)
    none = jax.tree.map(jnp.zeros_like, (ref_hidden, ref_unembed))
    return d_hidden.astype(hidden.dtype), none[0], d_unembed.astype(unembed.dtype), none[1], None


_token_stats.defvjp(_fwd, _bwd)


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
    still = jax.lax.stop_gradient
    stats = _token_stats(hidden, still(ref_hidden), unembed, still(ref_unembed), target, softcap, scale)
    return stats._replace(**{name: still(getattr(stats, name)) for name in STILL})
