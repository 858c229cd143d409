"""f-DPO's score functions (arXiv 2309.16240): phi of a log-ratio, with phi(0) = 0 as TRL 1.16 has them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

_LARGEST_EXPONENT = 88.0  # of a float32 exponential that is finite

Score = Callable[[jax.Array, float], jax.Array]


def reverse_kl(r: jax.Array, coef: float) -> jax.Array:
    """r."""
    del coef
    return r


def forward_kl(r: jax.Array, coef: float) -> jax.Array:
    """1 - e^-r."""
    del coef
    return _one_minus_exp(r)


@jax.custom_jvp
def _one_minus_exp(r: jax.Array) -> jax.Array:
    return 1.0 - jnp.exp(-r)


@_one_minus_exp.defjvp
def _one_minus_exp_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # The slope stays finite where the value overflows: a loss that is flat there, since the pair is learnt, has slope 0 times this,
    # which is 0 and not NaN.
    (r,), (dr,) = primals, tangents
    return _one_minus_exp(r), jnp.exp(jnp.minimum(-r, _LARGEST_EXPONENT)) * dr


def js_divergence(r: jax.Array, coef: float) -> jax.Array:
    """ln 2 + log sigmoid(r)."""
    del coef
    return jnp.log(2.0) + jax.nn.log_sigmoid(r)


def alpha_divergence(r: jax.Array, coef: float) -> jax.Array:
    """(e^min((c - 1) r, 80) - 1) / (c - 1), and r where c = 1."""
    if abs(coef - 1.0) < 1e-6:
        return r
    exponent = (coef - 1.0) * r
    # Clamped before the exponential on both sides of the `where`, so that the gradient beyond the clamp is 0 and not NaN.
    clamped = jnp.where(exponent > 80.0, 80.0, exponent)
    return (jnp.exp(clamped) - 1.0) / (coef - 1.0)


DIVERGENCES: dict[str, Score] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
