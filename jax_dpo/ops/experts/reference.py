"""Every expert on every token, weighed by what the router gave it: the oracle, E / k times the work."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def mixture(
    x: jax.Array,
    chosen: jax.Array,
    share: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    act: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """See `api.mixture`."""
    of_expert = jnp.sum(jax.nn.one_hot(chosen, gate.shape[0]) * share[..., None], axis=1)
    inner = act(jnp.einsum("nd,efd->nef", x, gate)) * jnp.einsum("nd,efd->nef", x, up)
    out = jnp.einsum("nef,edf->ned", inner, down)
    return jnp.einsum("ned,ne->nd", out.astype(jnp.float32), of_expert).astype(x.dtype)
