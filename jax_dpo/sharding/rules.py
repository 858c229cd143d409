"""Which axis of the mesh each parameter is cut along: one list of rules, each parameter matched by exactly one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_dpo.arrays import Tree, flatten, unflatten
from jax_dpo.errors import UserError
from jax_dpo.sharding.mesh import ROWS

# Megatron's split (arXiv 1909.08053): heads and feed-forward over `tensor`, so that a block needs one reduction after attention and
# one after the feed-forward; the other dimension over `fsdp`. Weights are [L, out, in], embeddings [V, D]. Every device has its part of
# every expert, so that tokens need not travel (`sharding/experts.py`): [L, E, out, in].
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(model\.embed_tokens|lm_head)\.weight", PartitionSpec("tensor", "fsdp")),
    (r".*\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight", PartitionSpec(None, "tensor", "fsdp")),
    (r".*\.(self_attn|mlp)\.(o_proj|down_proj)\.weight", PartitionSpec(None, "fsdp", "tensor")),
    (r".*\.(block_sparse_moe|mlp)\.gate\.weight", PartitionSpec(None, None, "fsdp")),
    (r".*\.experts\.(w1|w3|gate_proj|up_proj)\.weight", PartitionSpec(None, None, "tensor", "fsdp")),
    (r".*\.experts\.(w2|down_proj)\.weight", PartitionSpec(None, None, "fsdp", "tensor")),
    (r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.bias", PartitionSpec(None, "tensor")),
    (r".*\.(o_proj|down_proj)\.bias", PartitionSpec(None, None)),
    (r"model\.norm\.weight", PartitionSpec(None)),
    (r"model\.layers\..*norm\.weight", PartitionSpec(None, None)),
    (r"model\.layers\..*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.lora_a", PartitionSpec(None, None, "fsdp")),
    (r"model\.layers\..*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.lora_b", PartitionSpec(None, "tensor", None)),
    (r"model\.layers\..*\.(o_proj|down_proj)\.lora_a", PartitionSpec(None, None, "tensor")),
    (r"model\.layers\..*\.(o_proj|down_proj)\.lora_b", PartitionSpec(None, "fsdp", None)),
    (r"model\.layers\..*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.lora_magnitude", PartitionSpec(None, "tensor")),
    (r"model\.layers\..*\.(o_proj|down_proj)\.lora_magnitude", PartitionSpec(None, None)),
    (r"lm_head\.lora_a", PartitionSpec(None, "fsdp")),
    (r"lm_head\.lora_b", PartitionSpec("tensor", None)),
    (r"lm_head\.lora_magnitude", PartitionSpec("tensor")),
)


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of one parameter; a dimension that its axis does not divide stays whole.

    Raises:
      ValueError: no rule, or more than one, matches the path (a fault of the rules, not of the user).
    """
    found = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} sharding rules match the parameter {path}; exactly one must")
    axes = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(found[0], shape, strict=True)]
    return PartitionSpec(*axes)


def shardings(tree: Mapping[str, Any], mesh: Mesh) -> Tree:
    """The sharding of every leaf of a parameter tree (of arrays or shapes)."""
    flat = flatten(tree)
    return unflatten({path: NamedSharding(mesh, spec_of(path, tuple(x.shape), mesh)) for path, x in flat.items()})


def like_params(state: Any, params: Tree, mesh: Mesh) -> Any:
    """Shardings of an optimizer state: a leaf that has the path's end and the shape of a parameter lies as that parameter does.

    So does one that lacks the last axis of its parameter, or the one before it (factored moments; `columns` names the latter where
    both have the same shape). Everything else (counts, scalars) is replicated.
    """
    known = {path: (tuple(x.shape), spec_of(path, tuple(x.shape), mesh)) for path, x in flatten(params).items()}

    def place(keys: tuple, leaf: Any) -> NamedSharding:
        names = [str(k.key) for k in keys if isinstance(k, jax.tree_util.DictKey)]
        fields = [k.name for k in keys if isinstance(k, jax.tree_util.GetAttrKey)]
        shape, spec = known.get(".".join(names), ((), PartitionSpec()))
        left_out = (-2, -1) if "columns" in fields else (-1, -2)
        for axes in (tuple(range(len(shape))), *(_without(len(shape), axis) for axis in left_out)):
            if axes and tuple(shape[i] for i in axes) == tuple(leaf.shape):
                return NamedSharding(mesh, PartitionSpec(*(spec[i] for i in axes)))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def _without(count: int, axis: int) -> tuple[int, ...]:
    """All of `count` axes but one."""
    return tuple(i for i in range(count) if i != count + axis)


def activations(mesh: Mesh) -> NamedSharding:
    """[R, T, D]: rows over the data-parallel axes, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(ROWS, None, None))


def check_heads(num_kv_heads: int, mesh: Mesh) -> None:
    """Raises UserError where the `tensor` axis would cut a key-value head."""
    tensor = mesh.shape["tensor"]
    if num_kv_heads % tensor:
        fits = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
        raise UserError(
            "mesh-tensor-heads",
            f"mesh_tensor {tensor} does not divide the model's {num_kv_heads} key-value heads. "
            f"Use one of {', '.join(map(str, fits))} and give the other devices to mesh_fsdp.",
        )
