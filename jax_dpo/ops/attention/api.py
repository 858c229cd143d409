"""Attention over packed pair trees: one call, and the table that says which implementation runs where."""

from __future__ import annotations

import jax

from jax_dpo.ops.attention import chunked, reference
from jax_dpo.ops.attention.bounds import Bounds, tree_bounds

IMPLEMENTATIONS = {"chunked": chunked.attention, "reference": reference.attention}

__all__ = ["IMPLEMENTATIONS", "Bounds", "attention", "choose", "tree_bounds"]


def choose(platform: str, dtype: str, kernels: str = "auto") -> tuple[str, str]:
    """The implementation for a platform and compute dtype, and why it is the one. `kernels`: the option of that name."""
    del dtype
    if kernels == "reference":
        return "reference", "the plain formula, as kernels: reference asks"
    return (
        "chunked",
        f"query chunks in XLA with a hand-written backward, the implementation that every platform has ({platform})",
    )


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: Bounds,
    *,
    scale: float,
    softcap: float | None = None,
    implementation: str = "chunked",
) -> jax.Array:
    """Softmax attention over the visible keys.

    Args:
      q: [R, T, N, H]; k, v: [R, T, G, H], N a multiple of G.
      bounds: which keys each query sees (`tree_bounds`).
      scale: factor of the scores, 1/sqrt(H) in most families.
      softcap: cap * tanh(score / cap), where a family has it.
    Returns:
      [R, T, N, H]; 0 where a query sees nothing.
    """
    return IMPLEMENTATIONS[implementation](q, k, v, bounds, scale=scale, softcap=softcap)
