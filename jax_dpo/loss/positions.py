"""Positions in a response, from 1, and the buckets in which they are counted: 1, 2-4, 5-8, 9-16, ... by doubling."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def buckets(longest: int) -> list[tuple[int, int]]:
    """(first, last) position of each bucket that responses of up to `longest` tokens need; at least one bucket."""
    found = [(1, 1)]
    while found[-1][1] < longest:
        last = found[-1][1]
        found.append((last + 1, max(4, 2 * last)))
    return found


def in_bucket(slot: jax.Array) -> jax.Array:
    """[R, K, P] float32: 1 where a scored token lies in a bucket of its response, with P = len(buckets(K)).

    Args:
      slot: [R, K] int32 which response each token belongs to; those of one response lie side by side (`Batch.slot`).
    """
    place = jnp.broadcast_to(jnp.arange(slot.shape[1], dtype=jnp.int32), slot.shape)
    begins = jnp.concatenate([jnp.ones_like(slot[:, :1], bool), slot[:, 1:] != slot[:, :-1]], axis=1)
    position = (place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1) + 1)[..., None]
    first, last = (jnp.asarray(ends, jnp.int32) for ends in zip(*buckets(slot.shape[1])))
    return ((position >= first) & (position <= last)).astype(jnp.float32)
