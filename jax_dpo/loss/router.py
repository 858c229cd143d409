"""The router's balancing loss of a mixture of experts, as sums over pairs until the very end.

It is a product of two shares, so it is not linear in the tokens: TRL forms it over each of its own micro-batches, of which every pair
is laid out as two padded rows. A token of a prompt that is laid out once counts twice here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class RouterSums(NamedTuple):
    """Sums over the tokens of each pair and over all layers with experts; arrays on the device or numpy."""

    chosen: Any
    """[..., E] how often each expert was chosen"""
    probability: Any
    """[..., E] the router's probabilities"""
    tokens: Any
    """[...] how many tokens there were, each once a layer"""


def router_watch(owner: jax.Array, copies: jax.Array, slots: int) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """What to make of a layer's routing: (chosen, probability) of `RouterSums`, [R, S, E], for that layer.

    Args:
      owner: [R, T] int32 slot of the pair that each token belongs to; `slots` for padding.
      copies: [R, T] in how many of the pair's two padded rows TRL has the token.
    """
    part = (owner[..., None] == jnp.arange(slots, dtype=jnp.int32)) * copies[..., None].astype(jnp.float32)
    add = lambda x: jnp.einsum("rts,rte->rse", part, x, precision=jax.lax.Precision.HIGHEST)  # noqa: E731

    def watch(routing: Any) -> tuple[jax.Array, jax.Array]:
        E = routing.probability.shape[-1]
        one_hot = (routing.chosen[..., None] == jnp.arange(E, dtype=jnp.int32)).astype(jnp.float32)
        return add(jnp.sum(one_hot, axis=2)), add(routing.probability)

    return watch


def router_sums(
    watched: Sequence[tuple[jax.Array, jax.Array]], owner: jax.Array, copies: jax.Array, slots: int
) -> RouterSums:
    """All layers together; `watched` are arrays [layers, R, S, E] of some layers each."""
    chosen, probability = (sum(jnp.sum(x, axis=0) for x in xs) for xs in zip(*watched))
    layers = sum(x.shape[0] for x, _ in watched)
    part = (owner[..., None] == jnp.arange(slots, dtype=jnp.int32)).astype(jnp.float32)
    tokens = jnp.einsum("rts,rt->rs", part, copies.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return RouterSums(chosen, probability, layers * tokens)


def of_group(sums: RouterSums, group: jax.Array) -> RouterSums:
    """For each pair the sums over all pairs of its group: arrays [R, S, ...] as they came; `group` [R, S, 2] as in `Batch`."""
    ids = group[..., 0].reshape(-1)
    same = ((ids[:, None] == ids[None, :]) & (ids >= 0)[None, :]).astype(jnp.float32)

    def join(x: jax.Array) -> jax.Array:
        flat = x.reshape(len(ids), -1)
        return jnp.einsum("ij,je->ie", same, flat, precision=jax.lax.Precision.HIGHEST).reshape(x.shape)

    return RouterSums(*(join(x) for x in sums))


def balance(sums: RouterSums) -> Any:
    """E sum_e (share of tokens that chose e) (mean probability of e): Switch Transformer, arXiv 2101.03961 eq. 4 to 6, with every choice
    of a token counted. k at best, E at worst, for k choices of E experts. Gradients flow through the probabilities alone."""
    tokens = sums.tokens[..., None] + (sums.tokens[..., None] == 0)  # a group without a token has a loss of 0
    shares = (sums.chosen / tokens) * (sums.probability / tokens)
    return sums.chosen.shape[-1] * shares.sum(-1)
