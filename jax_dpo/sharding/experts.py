"""A mixture of experts where rows and matrices are cut over devices: tokens stay where they are, matrices come to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh, PartitionSpec

from jax_dpo.sharding.mesh import ROWS

Run = Callable[..., jax.Array]


def spread_experts(mesh: Mesh, one_device: Run) -> Run:
    """`one_device` (`models.experts.everywhere`) for rows [R, T, ...] that lie over (data, fsdp), with matrices [E, F, D] and [E, D, F]
    as the rules lay them.

    Every device sorts the tokens of its own rows, gathers the matrices along `fsdp` (the gradient goes back by a reduce-scatter) and
    has its part of F, whose results are summed over `tensor`. Left to the automatic partitioner, the sort would go over all devices.
    """
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]

    def run(
        x: jax.Array,
        chosen: jax.Array,
        share: jax.Array,
        gate: jax.Array,
        up: jax.Array,
        down: jax.Array,
        act: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        _, F, D = gate.shape
        cut, whole = F % tensor == 0, D % fsdp != 0
        inner, model = "tensor" if cut else None, None if whole else "fsdp"

        def local(x: jax.Array, chosen: jax.Array, share: jax.Array, *matrices: jax.Array) -> jax.Array:
            if model is not None:
                collect = partial(jax.lax.all_gather, axis_name=model, tiled=True)
                matrices = tuple(collect(w, axis=axis) for w, axis in zip(matrices, (2, 2, 1), strict=True))
            y = one_device(x, chosen, share, *matrices, act)
            return jax.lax.psum(y, inner) if inner is not None else y

        rows = PartitionSpec(ROWS, None, None)
        wide, narrow = PartitionSpec(None, inner, model), PartitionSpec(None, model, inner)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, rows, rows, wide, wide, narrow),
            out_specs=rows,
            check_vma=False,
        )(x, chosen, share, gate, up, down)

    return run
