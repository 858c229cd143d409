"""The mixture of experts that stands for the MLP of a block: a router, and the experts' matrices stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_dpo.models.config import ModelConfig, parameter_shapes
from jax_dpo.ops.experts.api import mixture

# (x [R, T, D], chosen [R, T, k], share [R, T, k], gate, up, down, activation) -> [R, T, D]
Run = Callable[..., jax.Array]


class Routing(NamedTuple):
    """What the router of one layer said of every token."""

    probability: jax.Array
    """[R, T, E] float32 softmax over all experts"""
    chosen: jax.Array
    """[R, T, k] int32 the experts that the token went through; E for padding"""


def everywhere(
    x: jax.Array,
    chosen: jax.Array,
    share: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    act: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """All rows together, where they lie on one device."""
    flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    return mixture(flat(x), flat(chosen), flat(share), gate, up, down, act=act).reshape(x.shape)


class Table(nnx.Module):
    """Matrices without a product of their own."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.weight = nnx.Param(jnp.zeros(shape))


class _Experts(nnx.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            setattr(self, name, Table(shape))


class Mixture(nnx.Module):
    """softmax over all experts, the `per_token` likeliest of them, their shares made to sum to 1 where the family does so."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.experts is not None
        self.of = config.experts
        shapes, root = parameter_shapes(config), f"model.layers.{self.of.module}."
        self.gate = Table(shapes[f"{root}gate.weight"])
        self.experts = _Experts({name: shapes[f"{root}experts.{name}.weight"] for name in self.of.projections})

    def __call__(
        self, x: jax.Array, real: jax.Array, act: Callable[[jax.Array], jax.Array], run: Run
    ) -> tuple[jax.Array, Routing]:
        """x [R, T, D] -> the same, and what the router said; where `real` [R, T] is False nothing is computed and 0 comes out."""
        score = jnp.einsum("rtd,ed->rte", x, self.gate.weight[...].astype(x.dtype), preferred_element_type=jnp.float32)
        probability = jax.nn.softmax(score, axis=-1)
        share, chosen = jax.lax.top_k(probability, self.of.per_token)
        if self.of.renormalise:
            share = share / jnp.sum(share, axis=-1, keepdims=True)
        chosen = jnp.where(real[..., None], chosen, self.of.count).astype(jnp.int32)
        gate, up, down = (getattr(self.experts, name).weight[...].astype(x.dtype) for name in self.of.projections)
        return run(x, chosen, share, gate, up, down, act), Routing(probability, chosen)
