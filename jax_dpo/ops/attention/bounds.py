"""Which keys a query of a packed pair tree sees, as three integers a query.

A row holds trees `| prompt | branch 1 | branch 2 | ... |` one after the other. A query sees the keys of its own tree that are not
after it and lie in the prompt or in the query's own branch. Along the row that is one interval with one hole in it:

    visible(k)  <=>  lo <= k <= q  and not  hole_lo <= k < hole_hi

where `lo` is the first token of the tree and the hole reaches from the end of the prompt to the start of the query's branch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Bounds(NamedTuple):
    """Three int32 arrays [R, T]; a padding query has `lo = T`, so it sees nothing."""

    lo: jax.Array
    hole_lo: jax.Array
    hole_hi: jax.Array


def _start_of_run(*ids: jax.Array) -> jax.Array:
    """For every place of [R, T] the place where its run of equal ids (all of them) began."""
    T = ids[0].shape[1]
    place = jnp.arange(T, dtype=jnp.int32)[None, :]
    change = jnp.any(jnp.stack([x[:, 1:] != x[:, :-1] for x in ids]), axis=0)
    first = jnp.concatenate([jnp.ones_like(ids[0][:, :1], bool), change], axis=1)
    return jax.lax.cummax(jnp.where(first, place, 0), axis=1)


def tree_bounds(pair: jax.Array, branch: jax.Array, window: int | None = None) -> Bounds:
    """Bounds of every query.

    Args:
      pair: [R, T] tree number, 0 is padding; neighbouring trees have different numbers.
      branch: [R, T] 0 for the prompt, 1, 2, ... for the branches, which are contiguous.
      window: how many positions back a query sees, itself included (sliding window); None for all. It is counted in
        `position`, so a query of a later branch looks past the hole into the prompt.
    """
    T = pair.shape[1]
    q = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], pair.shape)
    tree_start = _start_of_run(pair)
    branch_start = _start_of_run(pair, branch)
    in_branch = branch > 0
    # The prompt's end is where the tree's first branch begins: the first run of branch > 0 after the tree's start.
    prompt_length = jnp.where(branch == 0, q - tree_start + 1, 0)
    hole_lo = tree_start + _running_max_in_tree(prompt_length, pair, tree_start)
    hole_lo = jnp.where(in_branch, hole_lo, q + 1)
    hole_hi = jnp.where(in_branch, branch_start, q + 1)
    lo = tree_start
    if window is not None:
        hole = hole_hi - hole_lo
        across = jnp.maximum(tree_start, q - hole - window + 1)
        within = jnp.maximum(q - window + 1, branch_start)
        lo = jnp.where(in_branch & (across >= hole_lo), within, across)
    return Bounds(jnp.where(pair > 0, lo, T), hole_lo, hole_hi)


def _running_max_in_tree(value: jax.Array, pair: jax.Array, tree_start: jax.Array) -> jax.Array:
    """Largest `value` from the tree's start up to each place; `value` < T, so trees can be told apart by an offset."""
    T = value.shape[1]
    offset = tree_start * (T + 1)
    return jax.lax.cummax(value + offset, axis=1) - offset


def visible(bounds: Bounds, keys: jax.Array, queries: jax.Array) -> jax.Array:
    """The mask [R, Q, K] of the given key places [K] for the given query places [Q] (both static slices of the row)."""
    lo, hole_lo, hole_hi = (b[:, :, None] for b in bounds)
    k = keys[None, None, :]
    return (k >= lo) & (k <= queries[None, :, None]) & ((k < hole_lo) | (k >= hole_hi))
