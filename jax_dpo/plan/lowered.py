"""The real train step over devices that need not be there: shapes and shardings in place of arrays.

What a run holds on its devices is described once, here; the trainer makes the arrays after it, and an abstract topology (one of a
TPU slice that nobody has rented yet) gets the same program compiled to see whether it fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_dpo.arrays import Tree, flatten, unflatten
from jax_dpo.data.batch import FIELD_OF, Batch, empty_batch
from jax_dpo.data.pack import RowShape
from jax_dpo.loss.family import LossOptions
from jax_dpo.models.config import ModelConfig
from jax_dpo.models.decoder import describe, stays_float32, without_adapter
from jax_dpo.sharding.mesh import ROWS, replicated, row_shards
from jax_dpo.sharding.rules import shardings
from jax_dpo.train.state import Facts, Frozen, Knobs, TrainState
from jax_dpo.train.step import make_step, state_shardings
from jax_dpo.train.trust_region import REGION_START


class DeviceMemory(NamedTuple):
    """What a compiled program needs on one device, in bytes, as the compiler counts it."""

    arguments: int
    """state, reference and batch: there before and after"""
    temporary: int
    """gradients, activations, gathered weights: there while it runs"""
    total: int
    """at the peak, with results that do not take the place of an argument"""


def abstract_params(config: ModelConfig) -> Tree:
    """Float32 shapes of the trained parameters: the adapter's where there is one, else all."""
    _, tree = describe(config)
    if config.lora is None:
        return tree
    return unflatten({path: x for path, x in flatten(tree).items() if config.lora.trains(path)})


def abstract_state(
    params: Tree,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    moving_reference: bool = False,
    dynamic_beta: bool = False,
    trust_region: bool = False,
) -> TrainState:
    """Shapes and shardings of the whole train state; a reference that moves is a second copy of the parameters in it."""
    step = jax.ShapeDtypeStruct((), np.int32)
    scalar = jax.ShapeDtypeStruct((), np.float32)
    threshold = {"threshold": scalar} if dynamic_beta else {}
    region = dict.fromkeys(REGION_START, scalar) if trust_region else {}
    moving = params if moving_reference else {}
    state = TrainState(step, params, jax.eval_shape(tx.init, params), moving, threshold, region)
    return jax.tree.map(_laid, state, state_shardings(state, mesh))


def _laid(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def abstract_frozen(facts: Facts, mesh: Mesh) -> Frozen:
    """Shapes and shardings of base and reference, in the compute dtype (norm weights in float32)."""
    wide, narrow = jnp.dtype("float32"), jnp.dtype(facts.compute_dtype)

    def tree(config: ModelConfig, *, trained: bool = False) -> Tree:
        flat = flatten(abstract_params(config) if trained else describe(config)[1])
        kinds = {p: wide if stays_float32(p) else narrow for p in flat}
        cast = unflatten({p: jax.ShapeDtypeStruct(x.shape, kinds[p]) for p, x in flat.items()})
        return jax.tree.map(_laid, cast, shardings(cast, mesh))

    base = tree(without_adapter(facts.policy)) if facts.policy.lora is not None else {}
    if facts.precomputed:
        return Frozen(base, {})
    if facts.reference_on_base and facts.reference.lora is None:
        return Frozen(base, {})
    return Frozen(base, tree(facts.reference, trained=facts.reference_on_base))


def abstract_batch(
    mesh: Mesh,
    shape: RowShape,
    micro_batches: int,
    *,
    ref_logps: bool = False,
    router: bool = False,
    columns: Sequence[str] = (),
) -> Batch:
    """Shapes and shardings [A, R, ...] of a step's batch; `ref_logps`: with the reference's sums in it; `router`: with what the router's
    loss needs; `columns`: with what these columns say of each pair."""
    rows = shape.rows * row_shards(mesh)
    place = NamedSharding(mesh, PartitionSpec(None, ROWS))
    one = empty_batch(1, shape, group=router, router=router)
    if ref_logps:
        one = one._replace(ref_logps=np.zeros(one.length.shape, np.float32))
    one = one._replace(**{FIELD_OF[column]: np.zeros(one.index.shape, np.float32) for column in columns})
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((micro_batches, rows, *x.shape[1:]), x.dtype, sharding=place), one
    )


def lower_step(
    facts: Facts,
    options: LossOptions,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    shape: RowShape,
    *,
    micro_batches: int,
    max_grad_norm: float,
) -> jax.stages.Lowered:
    """The train step of a run, lowered for a mesh of any devices, real ones or those of an abstract topology.

    Args:
      tx: the optimizer, made for the parameters of `abstract_params`.
      shape: rows of one row shard and what each holds.
      micro_batches: how many a step's arrays have room for; more than one brings a gradient accumulator with it.
    """
    state = abstract_state(abstract_params(facts.policy), tx, mesh, dynamic_beta=options.beta_alpha > 0)
    step: Any = make_step(facts, options, tx, mesh, state, max_grad_norm=max_grad_norm)
    everywhere = replicated(mesh)
    scalar: Any = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step.lower(
        state,
        abstract_frozen(facts, mesh),
        abstract_batch(
            mesh,
            shape,
            micro_batches,
            ref_logps=facts.precomputed,
            router=options.router_coef > 0,
            columns=options.columns,
        ),
        scalar(np.int32),
        Knobs(*(scalar(np.float32) for _ in Knobs._fields)),
        _laid(key, everywhere),
    )


def memory_of(compiled: jax.stages.Compiled) -> DeviceMemory:
    """Memory of a compiled program on one device."""
    found: Any = compiled.memory_analysis()
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    arguments, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
    return DeviceMemory(arguments, temporary, arguments + temporary + fresh)
