"""Tables of one row per token id, [V, D]: how the embedding is looked up and the unembedding multiplied where they are cut."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_dpo.sharding.mesh import ROWS

Place = Callable[[jax.Array], jax.Array]


def lookup(mesh: Mesh) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`table[tokens]` of a table [V, D] and ids [R, T] that are spread over rows -> [R, T, D], spread over rows.

    The table stays cut along D over `fsdp`: each device looks up its columns for the rows of its whole `fsdp` group, then columns
    are exchanged for rows. What travels is as large as the result, not as the table, of which no device ever holds the whole
    (nor of its gradient). Where `fsdp` does not divide D every device gets the whole table.
    """
    pin = lambda x, *axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731

    def look(table: jax.Array, tokens: jax.Array) -> jax.Array:
        if table.shape[1] % mesh.shape["fsdp"]:
            return pin(pin(table, None, None)[tokens], ROWS, None, None)
        found = pin(table, None, "fsdp")[pin(tokens, "data", None)]
        return pin(pin(found, "data", None, "fsdp"), ROWS, None, None)

    return look


def parts_of(mesh: Mesh, *, vocabulary_shards: int) -> tuple[Place, Place]:
    """Two constraints on parts [S, C, D] of an unembedding whose vocabulary is seen as S shards.

    The first puts a part onto every device that multiplies with it, whole but for S; the second lays it as the parameter lies, cut
    along D too where `fsdp` divides it.
    """
    shards = "tensor" if vocabulary_shards > 1 else None

    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(shards, None, None)))

    def spread(x: jax.Array) -> jax.Array:
        columns = None if x.shape[-1] % mesh.shape["fsdp"] else "fsdp"
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(shards, None, columns)))

    return gather, spread
