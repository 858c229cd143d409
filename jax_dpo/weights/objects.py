"""A transformers model object as the source of a model: read through its `config` and `state_dict()`, torch is not imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.models.families import model_config
from jax_dpo.weights.leaves import DTYPES, Index
from jax_dpo.weights.model_files import ModelFiles, build_leaves, main_dtype
from jax_dpo.weights.tokenizer_files import read_tokenizer_files


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of a state dict; copied to numpy when it is read."""

    tensor: Any
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.kind]

    def read(self, index: Index = ()) -> np.ndarray:
        # numpy knows no bfloat16 of torch's; float32 holds every one of them exactly.
        part = self.tensor.detach()[tuple(index)].float().cpu().numpy()
        return np.array(part).astype(self.dtype)


def is_model_object(thing: Any) -> bool:
    """Whether this is a transformers model, by what it offers."""
    return hasattr(thing, "state_dict") and hasattr(thing, "config") and hasattr(thing.config, "to_dict")


def open_object(model: Any) -> ModelFiles:
    """A transformers model in memory as `ModelFiles`; its numbers are copied when a leaf is read.

    Raises UserError: model-object-unsupported (an adapter on it), tensor-type-unknown, what `model_config` raises,
    tensors-differ, shape-differs.
    """
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    if hasattr(model, "peft_config"):
        raise UserError(
            "model-object-unsupported",
            f"{name} is a model with a PEFT adapter. Save the adapter with save_pretrained, and load the base with that adapter.",
        )
    hf = dict(model.config.to_dict())
    config = model_config(hf, f"the config of {name}")
    tensors = {}
    for key, tensor in model.state_dict().items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if key.endswith(".rotary_emb.inv_freq") or (config.tie_word_embeddings and key == "lm_head.weight"):
            continue
        if kind not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(
                "tensor-type-unknown", f"{name}: {key} is stored as {kind}; the types that can be read are {known}."
            )
        tensors[key] = TorchTensor(tensor, kind)
    leaves = build_leaves(Path(name), config, tensors, dict.fromkeys(tensors, name))
    generation = getattr(model, "generation_config", None)
    return ModelFiles(
        path=Path(name),
        hf_config=hf,
        config=config,
        leaves=leaves,
        dtype=main_dtype(leaves),
        generation_config=generation.to_json_string().encode() if generation is not None else None,
        read_tokenizer=_reader(Path(name)),
    )


def _reader(path: Path) -> Callable[[], dict[str, bytes]]:
    return lambda: read_tokenizer_files(path) if path.is_dir() else {}
