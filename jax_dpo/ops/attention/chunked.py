"""Tree attention by query chunks with a hand-written backward: plain XLA, every platform, memory linear in T.

Chunk i of the queries attends the keys [0, end of the chunk): the causal half is never computed. Between forward and backward only
the output and the log-sum-exp are kept; the backward makes the probabilities again (FlashAttention's algebra, arXiv 2205.14135).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_dpo.ops.attention.bounds import Bounds, visible

_MASKED = -1e30  # finite, so that a row without a visible key has no NaN in it
MAX_CHUNKS = 32


def chunk_size(T: int) -> int:
    """64 queries, or more where that would unroll too many chunks."""
    return max(64, -(-T // MAX_CHUNKS))


def _chunk(bounds: Bounds, start: int, stop: int) -> jax.Array:
    """The mask [R, 1, stop - start, stop] of one chunk of queries."""
    part = Bounds(*(b[:, start:stop] for b in bounds))
    mask = visible(part, jnp.arange(stop, dtype=jnp.int32), jnp.arange(start, stop, dtype=jnp.int32))
    return mask[:, None]


def _scores(
    q: jax.Array, k: jax.Array, mask: jax.Array, scale: float, softcap: float | None
) -> tuple[jax.Array, float]:
    """Masked scores [R, G, n*C, S] of queries [R, G, n*C, H] against keys [R, G, S, H], float32, without their last factor.

    The factor comes after the maximum is taken off: `score * factor - max` may be rounded once or twice, as the compiler fuses it,
    and then a reference that equals its policy would not give equal numbers; `(score - max) * factor` has one rounding only.
    """
    s = jnp.einsum("rgch,rgsh->rgcs", q, k, preferred_element_type=jnp.float32)
    factor = scale
    if softcap is not None:
        s, factor = jnp.tanh(s * (scale / softcap)), softcap
    return jnp.where(mask, s, _MASKED), factor


def _group(x: jax.Array, G: int) -> jax.Array:
    """[R, C, N, H] -> [R, G, (N/G)*C, H]: the query heads that share a key head lie together."""
    R, C, N, H = x.shape
    return x.reshape(R, C, G, N // G, H).transpose(0, 2, 3, 1, 4).reshape(R, G, (N // G) * C, H)


def _ungroup(x: jax.Array, C: int) -> jax.Array:
    """The inverse of `_group`."""
    R, G, nC, H = x.shape
    n = nC // C
    return x.reshape(R, G, n, C, H).transpose(0, 3, 1, 2, 4).reshape(R, C, G * n, H)


def _repeat(mask: jax.Array, n: int) -> jax.Array:
    return jnp.tile(mask, (1, 1, n, 1))


def _forward(q, k, v, bounds, scale, softcap):
    R, T, N, H = q.shape
    G = k.shape[2]
    n, C = N // G, chunk_size(T)
    kt, vt = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    outs, lses = [], []
    for start in range(0, T, C):
        stop = min(start + C, T)
        mask = _repeat(_chunk(bounds, start, stop), n)
        s, factor = _scores(_group(q[:, start:stop], G), kt[:, :, :stop], mask, scale, softcap)
        top = jnp.max(s, axis=-1, keepdims=True)
        p = jnp.where(mask, jnp.exp((s - top) * factor), 0.0)
        total = jnp.sum(p, axis=-1, keepdims=True)
        safe = jnp.where(total > 0, total, 1.0)
        o = jnp.einsum("rgcs,rgsh->rgch", p.astype(v.dtype), vt[:, :, :stop], preferred_element_type=jnp.float32) / safe
        outs.append(_ungroup(o.astype(q.dtype), stop - start))
        lses.append((top * factor + jnp.log(safe)).reshape(R, G, n, stop - start))
    out, lse = jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=3)
    # Adds nothing, but makes `lse` count where nobody else reads it. A forward that is differentiated keeps it, one that is not would
    # drop it and be fused in another way, and a reference that equals its policy would differ from it by a rounding.
    tie = (0.0 * lse).transpose(0, 3, 1, 2).reshape(R, T, N, 1)
    return out + tie.astype(out.dtype), lse


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, bounds, scale, softcap):
    return _forward(q, k, v, bounds, scale, softcap)[0]


def _attention_fwd(q, k, v, bounds, scale, softcap):
    out, lse = _forward(q, k, v, bounds, scale, softcap)
    # Named, so that rematerialisation can keep these two and never run attention twice.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, bounds, out, lse)


def _attention_bwd(scale, softcap, saved, d_out):
    q, k, v, bounds, out, lse = saved
    R, T, N, H = q.shape
    G = k.shape[2]
    n, C = N // G, chunk_size(T)
    kt, vt = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dq = []
    dk = jnp.zeros((R, G, T, H), jnp.float32)
    dv = jnp.zeros((R, G, T, H), jnp.float32)
    for start in range(0, T, C):
        stop = min(start + C, T)
        c = stop - start
        mask = _repeat(_chunk(bounds, start, stop), n)
        qc, doc = _group(q[:, start:stop], G), _group(d_out[:, start:stop], G)
        s, factor = _scores(qc, kt[:, :, :stop], mask, scale, softcap)
        p = jnp.where(mask, jnp.exp(s * factor - lse[..., start:stop].reshape(R, G, n * c, 1)), 0.0)
        dp = jnp.einsum("rgch,rgsh->rgcs", doc, vt[:, :, :stop], preferred_element_type=jnp.float32)
        ds = p * (dp - _group(delta[:, start:stop, :, None], G))
        if softcap is not None:
            ds = ds * (1.0 - jnp.square(jnp.where(mask, s, 0.0)))
        ds = (ds * scale).astype(q.dtype)
        dq.append(_ungroup(jnp.einsum("rgcs,rgsh->rgch", ds, kt[:, :, :stop]).astype(q.dtype), c))
        part_k = jnp.einsum("rgcs,rgch->rgsh", ds, qc, preferred_element_type=jnp.float32)
        part_v = jnp.einsum("rgcs,rgch->rgsh", p.astype(v.dtype), doc, preferred_element_type=jnp.float32)
        dk = dk.at[:, :, :stop].add(part_k)
        dv = dv.at[:, :, :stop].add(part_v)
    back = lambda x, like: x.transpose(0, 2, 1, 3).astype(like.dtype)  # noqa: E731
    return jnp.concatenate(dq, axis=1), back(dk, k), back(dv, v), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bounds: Bounds, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """As `reference.attention`: q [R, T, N, H], k and v [R, T, G, H] -> [R, T, N, H]."""
    return _attention(q, k, v, bounds, scale, softcap)
