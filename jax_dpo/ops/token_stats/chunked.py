"""Token statistics by vocabulary chunks: the logits exist for one chunk at a time, forward and backward.

Forward, per token, over chunks of logits z (policy) and z' (reference), as an online softmax: running maximum m, s = sum e^(z-m),
a = sum e^(z-m) (z - z'), and the same m', s' for the reference; then

    lse = m + log s,   logp = z_y - lse,   KL = a/s - lse + lse'.

Backward, with g and c the cotangents of logp and KL, and delta = (z - lse) - (z' - lse'):

    dz = g (1[v = y] - pi) + c pi (delta - KL).

The vocabulary axis is seen as [shards, V/shards] and chunks are cut inside each shard, so that an unembedding that is sharded over
the vocabulary is never gathered: the running sums are kept apart for each shard and merged once at the end.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_dpo.arrays import TokenStats
from jax_dpo.ops.token_stats.reference import weighted_sum

CHUNK = 8192


class _Carry(NamedTuple):
    """Running sums of one vocabulary shard, each [S, R, K] float32."""

    m: jax.Array  # max z
    s: jax.Array  # sum e^(z-m)
    a: jax.Array  # sum e^(z-m) (z - z')
    e: jax.Array  # sum e^(z-m) z
    sq: jax.Array  # sum e^(2(z-m))
    mean: jax.Array  # sum z
    zy: jax.Array  # z of the target
    lower: jax.Array  # max z over ids below the target: decides ties for top1
    m_ref: jax.Array
    s_ref: jax.Array
    zy_ref: jax.Array


def _logits(hidden, ref_hidden, w, w_ref, softcap, scale):
    """Chunk logits [S, R, K, C] of policy and reference from hidden [R, K, D] and w [S, C, D]."""
    if w_ref is None:
        z, z_ref = jnp.einsum("prkd,scd->psrkc", jnp.stack([hidden, ref_hidden]), w, preferred_element_type=jnp.float32)
    else:
        z = jnp.einsum("rkd,scd->srkc", hidden, w, preferred_element_type=jnp.float32)
        z_ref = jnp.einsum("rkd,scd->srkc", ref_hidden, w_ref, preferred_element_type=jnp.float32)
    shape = lambda z: z * scale if softcap is None else softcap * jnp.tanh(z * scale / softcap)  # noqa: E731
    return shape(z), shape(z_ref)


def _cut(w, i, chunk):
    """Chunk i of w [S, V, D]: start, and w[:, start : start + chunk]. The last chunk is moved back to fit; `fresh` masks what was seen."""
    V = w.shape[1]
    start = jnp.minimum(i * chunk, V - chunk)
    return start, jax.lax.dynamic_slice_in_dim(w, start, chunk, axis=1)


def _columns(start, i, chunk, shards, V):
    """Vocabulary ids [S, 1, 1, C] of a chunk, and whether the chunk is the first to hold them [C]."""
    inside = start + jnp.arange(chunk, dtype=jnp.int32)
    ids = jnp.arange(shards, dtype=jnp.int32)[:, None] * V + inside[None, :]
    return ids[:, None, None, :], inside >= i * chunk


def _accumulate(carry: _Carry, z, z_ref, ids, fresh, target) -> _Carry:
    neg = -jnp.inf
    real = jnp.where(fresh, z, neg)
    real_ref = jnp.where(fresh, z_ref, neg)
    m = jnp.maximum(carry.m, jnp.max(real, axis=-1))
    m_ref = jnp.maximum(carry.m_ref, jnp.max(real_ref, axis=-1))
    shrink, shrink_ref = jnp.exp(carry.m - m), jnp.exp(carry.m_ref - m_ref)
    p = jnp.exp(real - m[..., None])
    p_ref = jnp.exp(real_ref - m_ref[..., None])
    is_target = (ids == target[None, ..., None]) & fresh
    pick = lambda x: jnp.sum(jnp.where(is_target, x, 0.0), axis=-1)  # noqa: E731
    add = lambda x: jnp.sum(x, axis=-1)  # noqa: E731
    below = jnp.max(jnp.where(ids < target[None, ..., None], real, neg), axis=-1)
    return _Carry(
        m=m,
        s=carry.s * shrink + add(p),
        a=carry.a * shrink + weighted_sum(p, z - z_ref),
        e=carry.e * shrink + weighted_sum(p, z),
        sq=carry.sq * shrink**2 + add(p**2),
        mean=carry.mean + add(jnp.where(fresh, z, 0.0)),
        zy=carry.zy + pick(z),
        lower=jnp.maximum(carry.lower, below),
        m_ref=m_ref,
        s_ref=carry.s_ref * shrink_ref + add(p_ref),
        zy_ref=carry.zy_ref + pick(z_ref),
    )


def _merge(c: _Carry, V: int) -> tuple[TokenStats, jax.Array, jax.Array]:
    """Shards' sums [S, R, K] -> statistics [R, K], lse and lse' of policy and reference."""
    top, top_ref = jnp.max(c.m, axis=0), jnp.max(c.m_ref, axis=0)
    scale = jnp.exp(c.m - top)
    total = lambda x: jnp.sum(x * scale, axis=0)  # noqa: E731
    s = total(c.s)
    lse = top + jnp.log(s)
    lse_ref = top_ref + jnp.log(jnp.sum(c.s_ref * jnp.exp(c.m_ref - top_ref), axis=0))
    zy, zy_ref = jnp.sum(c.zy, axis=0), jnp.sum(c.zy_ref, axis=0)
    wins = (zy >= top) & (zy > jnp.max(c.lower, axis=0))
    stats = TokenStats(
        logp=zy - lse,
        ref_logp=zy_ref - lse_ref,
        kl=total(c.a) / s - lse + lse_ref,
        entropy=lse - total(c.e) / s,
        mean_logit=jnp.sum(c.mean, axis=0) / V,
        log_sum_sq=jnp.log(jnp.sum(c.sq * scale**2, axis=0)) - 2 * jnp.log(s),
        top1=wins.astype(jnp.float32),
    )
    return stats, lse, lse_ref


def _forward(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale, chunk):
    S, V, _ = unembed.shape
    shape = (S, *target.shape)
    zero, low = jnp.zeros(shape, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)
    # Finite starts: e^(-inf - -inf) would be NaN.
    start_max = jnp.full(shape, -1e30, jnp.float32)
    carry = _Carry(start_max, zero, zero, zero, zero, zero, zero, low, start_max, zero, zero)

    def body(carry, i):
        start, w = _cut(unembed, i, chunk)
        w_ref = None if ref_unembed is None else _cut(ref_unembed, i, chunk)[1]
        z, z_ref = _logits(hidden, ref_hidden, w, w_ref, softcap, scale)
        ids, fresh = _columns(start, i, chunk, S, V)
        return _accumulate(carry, z, z_ref, ids, fresh, target), None

    carry, _ = jax.lax.scan(body, carry, jnp.arange(-(-V // chunk), dtype=jnp.int32))
    return _merge(carry, S * V)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _token_stats(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale, chunk):
    return _forward(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale, chunk)[0]


def _fwd(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale, chunk):
    stats, lse, lse_ref = _forward(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale, chunk)
    return stats, (hidden, ref_hidden, unembed, ref_unembed, target, lse, lse_ref, stats.kl)


def _bwd(softcap, scale, chunk, saved, cotangent: TokenStats):
    hidden, ref_hidden, unembed, ref_unembed, target, lse, lse_ref, kl = saved
    S, V, _ = unembed.shape
    g, c = cotangent.logp[None, ..., None], cotangent.kl[None, ..., None]
    offset = (lse - lse_ref + kl)[None, ..., None]

    def body(carry, i):
        d_hidden, d_unembed = carry
        start, w = _cut(unembed, i, chunk)
        w_ref = None if ref_unembed is None else _cut(ref_unembed, i, chunk)[1]
        z, z_ref = _logits(hidden, ref_hidden, w, w_ref, softcap, scale)
        ids, fresh = _columns(start, i, chunk, S, V)
        p = jnp.exp(z - lse[None, ..., None])
        dz = p * (c * ((z - z_ref) - offset) - g) + jnp.where(ids == target[None, ..., None], g, 0.0)
        if softcap is not None:
            dz = dz * (1.0 - jnp.square(z / softcap))
        dz = (jnp.where(fresh, dz, 0.0) * scale).astype(hidden.dtype)
        d_hidden = d_hidden + jnp.einsum("srkc,scd->rkd", dz, w, preferred_element_type=jnp.float32)
        part = jnp.einsum("srkc,rkd->scd", dz, hidden, preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_slice_in_dim(d_unembed, start, chunk, axis=1)
        return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_unembed, before + part, start, axis=1)), None

    zeros = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(unembed.shape, jnp.float32))
    (d_hidden, d_unembed), _ = jax.lax.scan(body, zeros, jnp.arange(-(-V // chunk), dtype=jnp.int32))
    none = jax.tree.map(jnp.zeros_like, (ref_hidden, ref_unembed))
    return d_hidden.astype(hidden.dtype), none[0], d_unembed.astype(unembed.dtype), none[1], None


_token_stats.defvjp(_fwd, _bwd)


def token_stats(
    hidden: jax.Array,
    ref_hidden: jax.Array,
    unembed: jax.Array,
    ref_unembed: jax.Array | None,
    target: jax.Array,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    shards: int = 1,
    chunk: int = CHUNK,
) -> TokenStats:
    """See `api.token_stats`; `shards` must divide the vocabulary."""
    cut = lambda w: None if w is None else w.reshape(shards, w.shape[0] // shards, w.shape[1])  # noqa: E731
    chunk = min(chunk, unembed.shape[0] // shards)
    still = jax.lax.stop_gradient
    stats = _token_stats(
        hidden, still(ref_hidden), cut(unembed), still(cut(ref_unembed)), target, softcap, scale, chunk
    )
    return TokenStats(stats.logp, still(stats.ref_logp), stats.kl, *(still(x) for x in stats[3:]))
