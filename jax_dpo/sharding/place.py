"""Arrays onto the mesh: each process hands over only what its devices hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_dpo.sharding.mesh import ROWS


def from_reader(
    shape: tuple[int, ...], dtype: Any, read: Callable[[Any], np.ndarray], sharding: NamedSharding
) -> jax.Array:
    """An array whose shards are read one by one: `read(index)` gives the part of the whole at `index`."""
    return jax.make_array_from_callback(shape, sharding, lambda index: np.asarray(read(index), dtype))


def row_range(mesh: Mesh, rows: int) -> tuple[int, int]:
    """The rows [first, last) of a global row axis that this process feeds.

    The mesh lists devices process by process, so a process's rows are one range; with `tensor` across processes two processes may
    feed the same range.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    mine = [index[0] for index in sharding.addressable_devices_indices_map((rows,)).values() if index]
    starts = [s.start or 0 for s in mine]
    stops = [rows if s.stop is None else s.stop for s in mine]
    return min(starts), max(stops)


def batch_to_devices(batch: Any, mesh: Mesh, rows: int, *, leading: int) -> Any:
    """A NamedTuple of numpy arrays, this process's rows only, -> global arrays with the row axis (number `leading`) sharded.

    Leaves with fewer axes are replicated.
    """

    def put(x: np.ndarray) -> jax.Array:
        if x.ndim <= leading:
            return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec()), lambda i: x[i])
        spec = PartitionSpec(*([None] * leading), ROWS)
        whole = (*x.shape[:leading], rows, *x.shape[leading + 1 :])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x, whole)

    return jax.tree.map(put, batch)


def rows_to_devices(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every process has whole, its first axis sharded over the devices' rows."""
    return from_reader(x.shape, x.dtype, lambda index: x[index], NamedSharding(mesh, PartitionSpec(ROWS)))


def fetch(tree: Any) -> Any:
    """The whole of every (possibly sharded) array as numpy, on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)
