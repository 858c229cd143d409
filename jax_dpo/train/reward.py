"""The forward pass of a reward model over packed pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_dpo.data.batch import BRANCHES, Batch
from jax_dpo.models.config import ModelConfig
from jax_dpo.models.decoder import precision
from jax_dpo.sharding.mesh import replicated
from jax_dpo.train.forward import states


def last_tokens(batch: Batch, pad_id: int | None) -> jax.Array:
    """[R, S, 2] int32: where in its row each side of a pair ends, the last token of prompt and answer that is not `pad_id`.

    As transformers' sequence classifiers find it, which do not tell a padding token from an equal one at the end of a text. The prompts of
    the batch are shared, and `owner` is there. An empty slot has 0.
    """
    slots = jnp.arange(batch.index.shape[1])[:, None, None]
    sides = jnp.arange(1, BRANCHES + 1)[:, None]
    tokens, owner, branch = (x[:, None, None, :] for x in (batch.tokens, batch.owner, batch.branch))
    mine = (owner == slots) & ((branch == 0) | (branch == sides))
    if pad_id is not None:
        mine &= tokens != pad_id
    return jnp.max(jnp.where(mine, jnp.arange(batch.tokens.shape[1]), 0), axis=-1)


def make_reward_pass(
    config: ModelConfig, mesh: Mesh, *, compute_dtype: str, attention: str, pad_id: int | None
) -> Callable[[Mapping[str, Any], jax.Array, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted `(params, head [1, D], batch [R, ...]) -> (pairs [R, S], rewards [R, S, 2])`, float32, on every process."""

    def run(params: Mapping[str, Any], head: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with precision(compute_dtype):
            hidden, _ = states(config, dict(params), batch, mesh, attention)
            last = last_tokens(batch, pad_id)
            rows, slots, sides = last.shape
            ends = jnp.take_along_axis(hidden, last.reshape(rows, slots * sides, 1), axis=1)
            rewards = jnp.einsum("red,d->re", ends.astype(jnp.float32), head[0].astype(jnp.float32))
        return batch.index, rewards.reshape(rows, slots, sides)

    return jax.jit(run, out_shardings=replicated(mesh))
