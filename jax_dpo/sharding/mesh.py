"""The device mesh: axes `data`, `fsdp`, `tensor`, always automatic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_dpo.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that rows of a batch are spread over


def mesh_shape(devices: int, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """The mesh with one axis given as -1 filled up to the number of devices.

    Raises:
      UserError: more than one -1, or a product that is not the number of devices.
    """
    shape = [data, fsdp, tensor]
    options = [f"mesh_{axis} {size}" for axis, size in zip(AXES, shape)]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(
            "mesh-shape", f"{', '.join(options)}: each must be a positive number, and at most one may be -1."
        )
    if -1 in shape:
        rest = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = max(devices // rest, 1)
    if math.prod(shape) != devices:
        raise UserError(
            "mesh-shape",
            f"{', '.join(options)} make {math.prod(shape)} devices, but there are {devices}. "
            "Give sizes whose product is the number of devices, one of them may be -1 (the rest).",
        )
    return shape[0], shape[1], shape[2]


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices. The axis types are written out, since their default differs between versions of JAX."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(len(devices), data, fsdp, tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def row_shards(mesh: Mesh) -> int:
    """Over how many places rows are spread: the number of data-parallel devices."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
