"""What opening a model gives, whatever it was written as, and the checks that every source shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig, parameter_shapes
from jax_dpo.weights.leaves import DTYPES, Leaf, Stacked
from jax_dpo.weights.names import is_stacked, tensor_names


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: what it is, and where its numbers are.

    `leaves` has exactly the paths of `parameter_shapes(config)`. `dtype` is that of most of the numbers ("float32",
    "bfloat16", "float16"; "float32" for a GGUF file, whose weights are dequantised). `generation_config` is the file's
    content, None where there is none.
    """

    path: Path
    hf_config: dict[str, Any]
    config: ModelConfig
    leaves: dict[str, Leaf]
    dtype: str
    generation_config: bytes | None
    read_tokenizer: Callable[[], dict[str, bytes]]

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
    shapes = parameter_shapes(config)
    names = {leaf: tensor_names(leaf, config.num_layers) for leaf in shapes}
    expected = {name for group in names.values() for name in group}
    missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unexpected:
        parts = [f"{len(missing)} of {len(expected)} tensors are missing ({_some(missing)})"] if missing else []
        parts += [f"{len(unexpected)} tensors are not expected ({_some(unexpected)})"] if unexpected else []
        raise UserError("tensors-differ", f"{path}: by its configuration, {'; '.join(parts)}.")
    leaves: dict[str, Leaf] = {}
    for leaf, group in names.items():
        shape = shapes[leaf][1:] if is_stacked(leaf) else shapes[leaf]
        for name in group:
            if tensors[name].shape != shape:
                raise UserError(
                    "shape-differs",
                    f"{where[name]}: {name} is {list(tensors[name].shape)}; by the configuration it should be {list(shape)}.",
                )
        members = tuple(tensors[name] for name in group)
        leaves[leaf] = Stacked(members) if is_stacked(leaf) else members[0]
    return leaves


def main_dtype(leaves: Mapping[str, Leaf]) -> str:
    """The type of most numbers, by its name in config.json."""
    counts = dict.fromkeys(DTYPES, 0)
    names = {dtype: name for name, dtype in DTYPES.items()}
    for leaf in leaves.values():
        counts[names[leaf.dtype]] += int(np.prod(leaf.shape))
    return max(counts, key=lambda name: counts[name])


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
