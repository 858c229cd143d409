"""Tree attention written out: the oracle of the fast versions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_dpo.ops.attention.bounds import Bounds, visible


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bounds: Bounds, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """Softmax attention over the visible keys; a query that sees nothing gives 0.

    Args:
      q: [R, T, N, H]. k, v: [R, T, G, H] with N a multiple of G (grouped-query attention, arXiv 2305.13245).
      bounds: see `tree_bounds`.
    Returns:
      [R, T, N, H] in the dtype of `q`; scores and softmax are float32.
    """
    R, T, N, H = q.shape
    G = k.shape[2]
    q5 = q.reshape(R, T, G, N // G, H)
    scores = jnp.einsum("rqgnh,rkgh->rgnqk", q5, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    place = jnp.arange(T, dtype=jnp.int32)
    mask = visible(bounds, place, place)[:, None, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("rgnqk,rkgh->rqgnh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(R, T, N, H).astype(q.dtype)
