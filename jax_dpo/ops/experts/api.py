"""The feed-forward of a mixture of experts: every token goes through the few that its router chose (arXiv 1701.06538, 2101.03961).

No expert has a capacity and no token is ever dropped. Letters: N tokens, k choices of each, E experts, D model, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from jax_dpo.ops.experts import grouped, reference

IMPLEMENTATIONS = {"grouped": grouped.mixture, "reference": reference.mixture}

__all__ = ["IMPLEMENTATIONS", "mixture"]


def mixture(
    x: jax.Array,
    chosen: jax.Array,
    share: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    act: Callable[[jax.Array], jax.Array],
    implementation: str = "grouped",
) -> jax.Array:
    """sum over a token's choices of share * down(act(gate x) * up x).

    Args:
      x: [N, D].
      chosen: [N, k] int32 expert of each choice; E means none, and costs nothing.
      share: [N, k] float32.
      gate, up: [E, F, D]. down: [E, D, F].
      act: the activation, element by element; act(0) = 0.
    Returns:
      [N, D] in the dtype of `x`, summed in float32.
    """
    return IMPLEMENTATIONS[implementation](x, chosen, share, gate, up, down, act)
