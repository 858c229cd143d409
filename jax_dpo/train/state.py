"""What crosses the jitted step: the state that changes, what stays frozen, and the knobs that control may turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jax_dpo.arrays import Tree
from jax_dpo.data.batch import Batch
from jax_dpo.models.config import ModelConfig


class TrainState(NamedTuple):
    """Donated to the step. `params` are the trained leaves alone, in float32. Leaves are arrays, shapes or shardings.

    `reference` is there where the reference moves (`sync_ref_model`), in float32 as well: what a sync adds would be lost below half a
    unit of bfloat16's last place. It is empty where the reference stays as it is and lies in `Frozen`. `beta_threshold` is the scalar
    that beta-DPO measures a step's margin against (`loss/dynamic_beta.py`), in a dict that is empty without it; `region` likewise is
    what a trust region remembers: the KL of its probe set and its share of the learning rate (`trust_region.py`).
    """

    step: Any
    params: Tree
    opt_state: Any
    reference: Tree
    beta_threshold: Tree = {}  # noqa: RUF012
    region: Tree = {}  # noqa: RUF012


class Probe(NamedTuple):
    """What the trust region measures an update on: held-out pairs in micro-batches [A, R, ...].

    `hidden` [A, R, K, D] are the reference's states where the scored tokens are predicted, None where the reference moves. `start` are
    the trained parameters that the run started from, in any dtype, where the reference's distribution was theirs; else None. `limit`
    is a float32 scalar, nats per token, that changes without a new trace.
    """

    batch: Batch
    hidden: jax.Array | None
    start: Tree | None
    limit: jax.Array


class Frozen(NamedTuple):
    """Beside the state, never donated, never trained.

    `base` is what a LoRA policy stands on (empty in full training); `reference` is what the reference has of its own: a whole copy,
    the leaves of a frozen adapter, or nothing (the bare base, or a reference that moves and lies in `TrainState`). `probe` is there where
    a trust region bounds the updates.
    """

    base: Tree
    reference: Tree
    probe: Probe | None = None

    def against(self, state: TrainState) -> Frozen:
        """With the reference that the state carries, where it moves."""
        return self._replace(reference=state.reference) if state.reference else self


class Knobs(NamedTuple):
    """Float32 scalars that change from step to step without a new trace."""

    learning_rate: jax.Array
    beta: jax.Array
    kl_coef: jax.Array


@dataclass(frozen=True)
class Facts:
    """What is static about policy and reference.

    `reference_on_base`: the reference is `Frozen.base` with the leaves of `Frozen.reference` laid over it; else those alone.
    `shared_head`: policy and reference unembed with one and the same array.
    `precomputed`: the reference is not there while a step runs; the batch has its sums (`Batch.ref_logps`).
    """

    policy: ModelConfig
    reference: ModelConfig
    reference_on_base: bool
    shared_head: bool
    compute_dtype: str
    remat: bool
    attention: str = "chunked"
    token_stats: str = "auto"
    row_shards: int = 1
    vocabulary_shards: int = 1
    dropout: bool = False
    precomputed: bool = False
