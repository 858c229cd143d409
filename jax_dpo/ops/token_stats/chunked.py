"""Token statistics by vocabulary chunks: the logits exist for one chunk at a time, forward and backward.

Forward, per token, over chunks of logits z (policy) and z' (reference), as an online softmax: running maximum m, s = sum e^(z-m),
a = sum e^(z-m) (z - z'), and the same m', s' for the reference; then

    lse = m + log s,   logp = z_y - lse,   KL = a/s - lse + lse'.

Backward, with g and c the cotangents of logp and KL, and delta = (z - lse) - (z' - lse'):

    dz = g (1[v = y] - pi) + c pi (delta - KL).

The vocabulary axis is seen as [shards, V/shards] and chunks are cut inside each shard, so that an unembedding that is sharded over
the vocabulary is never gathered: the running sums are kept apart for each shard and merged once at the end. One that is cut along D
is gathered a chunk at a time, and its gradient is spread again a chunk at a time: neither is ever whole on one device.

Logits are made as `factor * z`, and the factor (scale or cap) comes after differences are taken; see `dense`.

Policy and reference lie in one array, and one operation makes the maximum, the exponentials and their sum of both: made apart, they may
be fused into different loops, round differently, and leave equal models a KL of 5e-7.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_dpo.arrays import TokenStats
from jax_dpo.ops.token_stats.reference import STILL, weighted_sum

CHUNK = 8192

Place = Callable[[jax.Array], jax.Array]


class _Carry(NamedTuple):
    """Running sums of one vocabulary shard, float32; those of policy and reference together [2, S, R, K], the rest [S, R, K].

    Of the policy alone, they are [1, S, R, K]. z is without its factor f, and e^x stands for exp(f x).
    """

    m: jax.Array  # max z, max z'
    s: jax.Array  # sum e^(z-m), sum e^(z'-m')
    zy: jax.Array  # z and z' of the target
    a: jax.Array  # sum e^(z-m) (z - z')
    e: jax.Array  # sum e^(z-m) z
    sq: jax.Array  # sum e^(2(z-m))
    mean: jax.Array  # sum z
    lower: jax.Array  # max z over ids below the target: decides ties for top1


def _logits(hidden, ref_hidden, w, w_ref, softcap, scale):
    """Chunk logits [2, S, R, K, C] of policy and reference ([1, ...] of the policy alone) from hidden [R, K, D] and w [S, C, D], without
    their factor."""
    if ref_hidden is None:
        z = jnp.einsum("rkd,scd->srkc", hidden, w, preferred_element_type=jnp.float32)[None]
    elif w_ref is None:
        z = jnp.einsum("prkd,scd->psrkc", jnp.stack([hidden, ref_hidden]), w, preferred_element_type=jnp.float32)
    else:
        one = lambda h, w: jnp.einsum("rkd,scd->srkc", h, w, preferred_element_type=jnp.float32)  # noqa: E731
        z = jnp.stack([one(hidden, w), one(ref_hidden, w_ref)])
    return z if softcap is None else jnp.tanh(z * (scale / softcap))


def _cut(w, i, chunk, gather, spread):
    """Chunk i of w [S, V, D]: start, and w[:, start : start + chunk]. The last chunk is moved back to fit; `fresh` masks what was seen."""
    V = w.shape[1]
    start = jnp.minimum(i * chunk, V - chunk)
    # The chunk is cut as the whole lies and gathered then; told the last alone, the partitioner would gather the whole for every chunk.
    return start, gather(spread(jax.lax.dynamic_slice_in_dim(w, start, chunk, axis=1)))


def _columns(start, i, chunk, shards, V):
    """Vocabulary ids [S, 1, 1, C] of a chunk, and whether the chunk is the first to hold them [C]."""
    inside = start + jnp.arange(chunk, dtype=jnp.int32)
    ids = jnp.arange(shards, dtype=jnp.int32)[:, None] * V + inside[None, :]
    return ids[:, None, None, :], inside >= i * chunk


def _accumulate(carry: _Carry, z, factor, ids, fresh, target) -> _Carry:
    neg = -jnp.inf
    real = jnp.where(fresh, z, neg)
    m = jnp.maximum(carry.m, jnp.max(real, axis=-1))
    shrink = jnp.exp((carry.m - m) * factor)
    p = jnp.exp((real - m[..., None]) * factor)
    is_target = (ids == target[None, ..., None]) & fresh
    add = lambda x: jnp.sum(x, axis=-1)  # noqa: E731
    below = jnp.max(jnp.where(ids < target[None, ..., None], real[0], neg), axis=-1)
    mine, less = p[0], shrink[0]
    return _Carry(
        m=m,
        s=carry.s * shrink + add(p),
        zy=carry.zy + add(jnp.where(is_target, z, 0.0)),
        a=carry.a * less + weighted_sum(mine, z[0] - z[1]) if len(z) == 2 else carry.a,
        e=carry.e * less + weighted_sum(mine, z[0]),
        sq=carry.sq * less**2 + add(mine**2),
        mean=carry.mean + add(jnp.where(fresh, z[0], 0.0)),
        lower=jnp.maximum(carry.lower, below),
    )


def _merge(c: _Carry, factor: float, V: int) -> tuple[TokenStats, jax.Array]:
    """Shards' sums -> statistics [R, K], and lse of policy and reference [2, R, K] (or [1, R, K])."""
    top = jnp.max(c.m, axis=1)
    shrink = jnp.exp((c.m - top[:, None]) * factor)
    s = jnp.sum(c.s * shrink, axis=1)
    lse = top * factor + jnp.log(s)
    zy = jnp.sum(c.zy, axis=1)
    logp = zy * factor - lse
    share = lambda x: jnp.sum(x * shrink[0], axis=0) / s[0]  # noqa: E731
    wins = (zy[0] >= top[0]) & (zy[0] > jnp.max(c.lower, axis=0))
    both = len(lse) == 2
    stats = TokenStats(
        logp=logp[0],
        ref_logp=logp[1] if both else None,
        kl=share(c.a) * factor - (lse[0] - lse[1]) if both else None,
        entropy=lse[0] - share(c.e) * factor,
        mean_logit=jnp.sum(c.mean, axis=0) * (factor / V),
        log_sum_sq=jnp.log(jnp.sum(c.sq * shrink[0] ** 2, axis=0)) - 2 * jnp.log(s[0]),
        top1=wins.astype(jnp.float32),
    )
    return stats, lse


def _same(x: jax.Array) -> jax.Array:
    return x


def _forward(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale, chunk, gather, spread):
    S, V, _ = unembed.shape
    shape = (S, *target.shape)
    zero = jnp.zeros(shape, jnp.float32)
    zeros = jnp.zeros((1 if ref_hidden is None else 2, *shape), jnp.float32)
    # Finite starts: e^(-inf - -inf) would be NaN.
    factor = scale if softcap is None else softcap
    carry = _Carry(zeros - 1e30, zeros, zeros, zero, zero, zero, zero, zero - jnp.inf)

    def body(carry, i):
        start, w = _cut(unembed, i, chunk, gather, spread)
        w_ref = None if ref_unembed is None else _cut(ref_unembed, i, chunk, gather, spread)[1]
        ids, fresh = _columns(start, i, chunk, S, V)
        z = _logits(hidden, ref_hidden, w, w_ref, softcap, scale)
        return _accumulate(carry, z, factor, ids, fresh, target), None

    carry, _ = jax.lax.scan(body, carry, jnp.arange(-(-V // chunk), dtype=jnp.int32))
    return _merge(carry, factor, S * V)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def _token_stats(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale, chunk, gather, spread):
    return _forward(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale, chunk, gather, spread)[0]


def _fwd(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale, chunk, gather, spread):
    stats, lse = _forward(hidden, ref_hidden, unembed, ref_unembed, target, softcap, scale, chunk, gather, spread)
    return stats, (hidden, ref_hidden, unembed, ref_unembed, target, lse, stats.kl)


def _bwd(softcap, scale, chunk, gather, spread, saved, cotangent):
    hidden, ref_hidden, unembed, ref_unembed, target, lse, kl = saved
    S, V, _ = unembed.shape
    g = cotangent.logp[None, ..., None]
    factor = scale if softcap is None else softcap

    def body(carry, i):
        d_hidden, d_unembed = carry
        start, w = _cut(unembed, i, chunk, gather, spread)
        w_ref = None if ref_unembed is None else _cut(ref_unembed, i, chunk, gather, spread)[1]
        z, *z_ref = _logits(hidden, ref_hidden, w, w_ref, softcap, scale)
        ids, fresh = _columns(start, i, chunk, S, V)
        p = jnp.exp(z * factor - lse[0][None, ..., None])
        pull = -g
        if z_ref:
            offset = (lse[0] - lse[1] + kl)[None, ..., None]
            pull = cotangent.kl[None, ..., None] * ((z - z_ref[0]) * factor - offset) - g
        dz = p * pull + jnp.where(ids == target[None, ..., None], g, 0.0)
        if softcap is not None:
            dz = dz * (1.0 - jnp.square(z))
        dz = (jnp.where(fresh, dz, 0.0) * scale).astype(hidden.dtype)
        d_hidden = d_hidden + jnp.einsum("srkc,scd->rkd", dz, w, preferred_element_type=jnp.float32)
        part = spread(jnp.einsum("srkc,rkd->scd", dz, hidden, preferred_element_type=jnp.float32))
        before = jax.lax.dynamic_slice_in_dim(d_unembed, start, chunk, axis=1)
        return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_unembed, before + part, start, axis=1)), None

    zeros = (jnp.zeros(hidden.shape, jnp.float32), spread(jnp.zeros(unembed.shape, jnp.float32)))
    (d_hidden, d_unembed), _ = jax.lax.scan(body, zeros, jnp.arange(-(-V // chunk), dtype=jnp.int32))
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
    chunk: int | None = None,
    gather: Place = _same,
    spread: Place = _same,
) -> TokenStats:
    """See `api.token_stats`; the unembeddings come as [shards, V/shards, D], or [V, D] for one shard. `chunk` is CHUNK by default."""
    shards = lambda w: w[None] if w is not None and w.ndim == 2 else w  # noqa: E731
    chunk = min(chunk or CHUNK, unembed.shape[-2])
    still = jax.lax.stop_gradient
    ref = still(shards(ref_unembed))
    stats = _token_stats(hidden, still(ref_hidden), shards(unembed), ref, target, softcap, scale, chunk, gather, spread)
    return stats._replace(**{name: still(getattr(stats, name)) for name in STILL})
