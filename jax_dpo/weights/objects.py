"""A transformers model object as the source of a model: read through its `config` and `state_dict()`, torch is not imported."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig
from jax_dpo.models.families import model_config
from jax_dpo.models.lora import LoraConfig
from jax_dpo.models.lora_targets import lora_spec
from jax_dpo.weights.leaves import DTYPES, Index
from jax_dpo.weights.model_files import ModelFiles, build_leaves, main_dtype
from jax_dpo.weights.names import PEFT_PREFIX
from jax_dpo.weights.peft import Adapter, assemble
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
    """A transformers model in memory as `ModelFiles`, without the adapters that PEFT has put on it; its numbers are copied when a leaf
    is read.

    Raises UserError: model-object-unsupported (adapters that are merged, off, or several at a time), tensor-type-unknown, what
    `model_config` raises, tensors-differ, shape-differs.
    """
    name = _name(model)
    state, _ = _taken_apart(model, name)
    hf = dict(model.config.to_dict())
    config = model_config(hf, f"the config of {name}")
    tensors = {}
    for key, tensor in state.items():
        if not key.endswith(".rotary_emb.inv_freq") and not (config.tie_word_embeddings and key == "lm_head.weight"):
            tensors[key] = _tensor(name, key, tensor)
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


def object_adapter(model: Any, config: ModelConfig) -> Adapter | None:
    """The adapter that is active on a model in memory, if PEFT has put one there, as a copy: training it does not change the object,
    and other adapters on it are left alone.

    Raises UserError: model-object-unsupported, tensor-type-unknown, what `lora_spec` raises, tensors-differ, shape-differs.
    """
    if not hasattr(model, "peft_config"):
        return None
    name = _name(model)
    where = f"the adapter on {name}"
    _, tensors = _taken_apart(model, name)
    try:
        lora = LoraConfig.of(model.peft_config[_active(model, name)])
        spec = lora_spec(lora, config)
    except UserError as error:
        raise UserError(error.name, f"{where}: {error.message}") from None
    return assemble(lora, spec, config, {key: _tensor(name, key, x) for key, x in tensors.items()}, where)


def _name(model: Any) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def _tensor(name: str, key: str, tensor: Any) -> TorchTensor:
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(
            "tensor-type-unknown", f"{name}: {key} is stored as {kind}; the types that can be read are {known}."
        )
    return TorchTensor(tensor, kind)


def _active(model: Any, name: str) -> str:
    """The name of the one adapter that acts."""
    active = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active
    names = [active] if isinstance(active, str) else list(active or model.peft_config)
    if len(names) != 1 or names[0] not in model.peft_config:
        raise UserError(
            "model-object-unsupported",
            f"{name} has the adapters {', '.join(model.peft_config) or 'none'}, of which {', '.join(names) or 'none'} are active; exactly "
            "one must be. Choose it with set_adapter.",
        )
    merged = [module for module in _modules(model) if getattr(module, "merged_adapters", None)]
    if merged:
        raise UserError(
            "model-object-unsupported",
            f"The adapter of {name} is merged into its weights. Call unmerge_adapter, or merge_and_unload to train the whole model.",
        )
    return names[0]


def _modules(model: Any) -> list[Any]:
    return list(model.modules()) if hasattr(model, "modules") else []


def _taken_apart(model: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of the model and of its active adapter, each by the names that they have in files."""
    state = dict(model.state_dict())
    if not hasattr(model, "peft_config"):
        return state, {}
    active = _active(model, name)
    base, adapter = {}, {}
    for key, tensor in state.items():
        path = key.removeprefix(PEFT_PREFIX)
        stem, is_copy, rest = path.partition(".modules_to_save.")
        if is_copy:
            owner, _, leaf = rest.partition(".")
            if owner == active:
                adapter[f"{PEFT_PREFIX}{stem}.{leaf}"] = tensor
        elif ".lora_" in path:
            found = re.fullmatch(rf"(.*\.lora_\w+)\.{re.escape(active)}(\.weight)?", path)
            if found:
                end = "" if found[1].endswith("magnitude_vector") else found[2] or ""
                adapter[PEFT_PREFIX + found[1] + end] = tensor
        else:
            base[path.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return base, adapter


def _reader(path: Path) -> Callable[[], dict[str, bytes]]:
    return lambda: read_tokenizer_files(path) if path.is_dir() else {}
