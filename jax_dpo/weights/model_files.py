"""What opening a model gives, whatever it was written as, and the checks that every source shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig, parameter_shapes
from jax_dpo.weights.leaves import DTYPES, Cut, Leaf, Stacked
from jax_dpo.weights.names import is_stacked, tensors_of


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: what it is, and where its numbers are.

    `leaves` has exactly the paths of `parameter_shapes(config)`. `dtype` is that of most of the numbers ("float32",
    "bfloat16", "float16"; "float32" for a GGUF file, whose weights are dequantised). `generation_config` is the file's
    content, None where there is none. `altered`: generation_config or the number of tokens is not that of what lies at `path`.
    """

    path: Path
    hf_config: dict[str, Any]
    config: ModelConfig
    leaves: dict[str, Leaf]
    dtype: str
    generation_config: bytes | None
    read_tokenizer: Callable[[], dict[str, bytes]]
    altered: bool = False

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the tokenizer by name, byte for byte as they are; made from the metadata of a GGUF file.

        Empty for a directory without a tokenizer. Raises UserError where a GGUF file's tokenizer is of an unknown kind.
        """
        return self.read_tokenizer()


def build_leaves(
    path: Path, config: ModelConfig, tensors: Mapping[str, Leaf], where: Mapping[str, str]
) -> dict[str, Leaf]:
    """One leaf for each parameter of the config, out of tensors by their Hugging Face names.

    `where` says which file holds which tensor. Raises UserError: tensors-differ (missing or unexpected names), shape-differs.
    """
    tensors, where = _one_by_one(config, tensors, where)
    shapes = parameter_shapes(config)
    names = {leaf: [name for name, _ in tensors_of(config, leaf)] for leaf in shapes}
    expected = {name for group in names.values() for name in group}
    missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unexpected:
        parts = [f"{len(missing)} of {len(expected)} tensors are missing ({_some(missing)})"] if missing else []
        parts += [f"{len(unexpected)} tensors are not expected ({_some(unexpected)})"] if unexpected else []
        raise UserError("tensors-differ", f"{path}: by its configuration, {'; '.join(parts)}.")
    leaves: dict[str, Leaf] = {}
    for leaf, group in names.items():
        shape = shapes[leaf][len(tensors_of(config, leaf)[0][1]) :]
        for name in group:
            if tensors[name].shape != shape:
                raise UserError(
                    "shape-differs",
                    f"{where[name]}: {name} is {list(tensors[name].shape)}; by the configuration it should be {list(shape)}.",
                )
        members = tuple(tensors[name] for name in group)
        leaves[leaf] = _stacked(members, shapes[leaf], len(shape)) if is_stacked(leaf) else members[0]
    return leaves


def _stacked(members: tuple[Leaf, ...], shape: tuple[int, ...], inner: int) -> Leaf:
    """Tensors of `inner` axes as one leaf of this shape: one axis over them, or one over layers and one over experts."""
    if len(shape) - inner == 1:
        return Stacked(members)
    each = shape[1]
    return Stacked(tuple(Stacked(members[i : i + each]) for i in range(0, len(members), each)))


def _one_by_one(
    config: ModelConfig, tensors: Mapping[str, Leaf], where: Mapping[str, str]
) -> tuple[dict[str, Leaf], dict[str, str]]:
    """Experts that lie in one tensor, as transformers 5 has them in memory (`mlp.experts.gate_up_proj` [E, 2 F, D] and `down_proj`
    [E, D, F]), under the names that files have, one tensor an expert."""
    e = config.experts
    fused = [name for name in tensors if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
    if e is None or not fused:
        return dict(tensors), dict(where)
    found: dict[str, Leaf] = {}
    files: dict[str, str] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".experts.")
        layer = stem.rpartition(".")[0]
        parts: dict[str, Leaf] = {name: tensor}
        if name in fused and tensor.shape[0] == e.count:
            gate, up, down = (f"{layer}.{e.module}.experts.{{}}.{p}.weight" for p in e.projections)
            cut = [(gate, 0, e.size), (up, e.size, 2 * e.size)]
            if last == "down_proj":
                cut = [(down, 0, config.hidden_size)]
            parts = {p.format(i): Cut(tensor, (i,), a, b) for i in range(e.count) for p, a, b in cut}
        elif name.endswith(".mlp.gate.weight"):
            parts = {name.replace(".mlp.gate.", f".{e.module}.gate."): tensor}
        found |= parts
        files |= dict.fromkeys(parts, where[name])
    return found, files


def main_dtype(leaves: Mapping[str, Leaf]) -> str:
    """The type of most numbers, by its name in config.json."""
    counts = dict.fromkeys(DTYPES, 0)
    names = {dtype: name for name, dtype in DTYPES.items()}
    for leaf in leaves.values():
        counts[names[leaf.dtype]] += int(np.prod(leaf.shape))
    return max(counts, key=lambda name: counts[name])


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
