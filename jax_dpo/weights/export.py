"""Writing a model as a Hugging Face directory that transformers (4 and 5) and vLLM load as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.models.config import Rope, layers_of, parameter_shapes
from jax_dpo.models.families import FAMILIES, model_config
from jax_dpo.weights.huggingface import ADAPTER_FILES, INDEX, SINGLE
from jax_dpo.weights.leaves import DTYPES, part_of
from jax_dpo.weights.names import is_stacked, tensors_of
from jax_dpo.weights.place import placing
from jax_dpo.weights.safetensors_file import Entry, write_file

MAX_SHARD_BYTES = 5_000_000_000
# What an earlier save may have left, and what a reader would take for a part of the new one.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")


def write_model(
    out: str | Path,
    *,
    hf_config: Mapping[str, Any],
    arrays: Mapping[str, Any],
    dtype: str,
    tokenizer_files: Mapping[str, bytes] | None = None,
    generation_config: bytes | None = None,
    replace: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes config.json, weights, tokenizer files and generation_config.json; returns the directory.

    `arrays` holds, for every path of `parameter_shapes(model_config(hf_config))`, a numpy or jax array or a `Leaf`; one
    layer of one of them is converted to `dtype` ("float32", "bfloat16", "float16") at a time. Weights of more than
    `max_shard_bytes` are split into shards with an index. The other files are written byte for byte. All of it appears at
    once; for files that are in `out` already see `place.placing`.
    Raises UserError: dtype-unknown, float16-overflow, no-space-left, no-permission, path-taken.
    """
    if dtype not in DTYPES:
        raise UserError("dtype-unknown", f"dtype is {dtype!r}; weights can be written as {', '.join(DTYPES)}.")
    out = Path(out)
    entries = _entries(hf_config, arrays)
    adapters = [name for name in ADAPTER_FILES if (out / name).exists()]
    if adapters and not replace:
        raise UserError(
            "path-taken",
            f"{out} holds an adapter ({adapters[0]}); a whole model beside it would be read differently by different programs. "
            "Give another directory.",
        )
    with placing(out, replace, _WEIGHTS) as new:
        _write_json(new / "config.json", exported_config(hf_config, dtype))
        for name, content in (tokenizer_files or {}).items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_bytes(content)
        if generation_config is not None:
            (new / "generation_config.json").write_bytes(generation_config)
        _write_weights(new, entries, dtype, max_shard_bytes)
    return out


def exported_config(hf_config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config as it came, but for the keys that readers of transformers 4 and 5 know under different names.

    `dtype` and `torch_dtype` are those of the weights; the rotary embedding is in `rope_parameters` (5) and in `rope_theta`
    and `rope_scaling` (4): a reader that knows one form only would silently take its default base. `architectures`, by which
    vLLM finds the model's class, is there where the input had none.
    """
    config = dict(hf_config)
    if not config.get("architectures"):
        config["architectures"] = [FAMILIES[config["model_type"]][1]]
    config["dtype"] = config["torch_dtype"] = dtype
    rope = model_config(config).layer_ropes[0]
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    theta = config.get("rope_theta", parameters.get("rope_theta", scaling.get("rope_theta", rope.theta)))
    if not parameters:
        parameters = {"rope_type": rope.kind, **scaling, "rope_theta": theta}
    elif not scaling and rope != Rope(rope.theta):
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    config["rope_parameters"] = {"rope_theta": theta, **parameters}
    config["rope_theta"] = theta
    config["rope_scaling"] = scaling or None
    return config


def _entries(hf_config: Mapping[str, Any], arrays: Mapping[str, Any]) -> list[Entry]:
    """All tensors in the order of the model: embedding, layers, norm, head."""
    config = model_config(dict(hf_config))
    shapes = parameter_shapes(config)
    if set(arrays) != set(shapes):
        raise ValueError(f"arrays and parameters differ in {sorted(set(arrays) ^ set(shapes))}")
    found: list[tuple[int, Entry]] = []
    for path, shape in shapes.items():
        if tuple(arrays[path].shape) != shape:
            raise ValueError(f"{path} is {tuple(arrays[path].shape)}, expected {shape}")
        value = _on_host(arrays[path])
        outside = -1 if path.startswith("model.embed_tokens") else config.num_layers
        layers = layers_of(config, path)
        for name, place in tensors_of(config, path):
            layer = layers[place[0]] if is_stacked(path) else outside
            found.append((layer, Entry(name, shape[len(place) :], partial(part_of, value, place))))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def _on_host(value: Any) -> Any:
    """An array in the memory of the CPU as numpy, without a copy; anything else stays where it is until it is read."""
    devices = value.devices() if hasattr(value, "devices") else ()
    if len(devices) == 1 and next(iter(devices)).platform == "cpu":
        return np.asarray(value)
    return value


def _write_weights(folder: Path, entries: list[Entry], dtype: str, limit: int) -> None:
    shards: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        size = int(np.prod(entry.shape)) * DTYPES[dtype].itemsize
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], dtype)
        return
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += write_file(folder / name, shard, dtype)
        weight_map.update({entry.name: name for entry in shard})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX, index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
