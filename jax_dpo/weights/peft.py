"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors, read, written, begun and merged.

In the tree an adapter is two leaves beside the weight that it changes, `lora_a` [L, r, in] and `lora_b` [L, out, r]; the
layer computes W x + scale B A x.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig, linear_shapes
from jax_dpo.models.lora import LoraConfig, LoraSpec
from jax_dpo.models.lora_targets import lora_spec
from jax_dpo.weights.huggingface import INDEX, SINGLE, read_json
from jax_dpo.weights.leaves import Index, Leaf, full_index, layer_of
from jax_dpo.weights.names import is_stacked, peft_names
from jax_dpo.weights.place import placing
from jax_dpo.weights.safetensors_file import Entry, read_header, write_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT_VERSION = "0.21.2"  # the release of PEFT whose files these are


@dataclass(frozen=True)
class Adapter:
    """An adapter that exists: what it is, and its numbers as float32 by tree path (`...q_proj.lora_a`)."""

    config: LoraConfig
    spec: LoraSpec
    arrays: dict[str, np.ndarray]


def adapter_shapes(spec: LoraSpec, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every adapter leaf by tree path."""
    linears = linear_shapes(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in spec.targets:
        out, into = linears[path]
        stack = (model.num_layers,) if is_stacked(path) else ()
        shapes[f"{path}.lora_a"] = (*stack, spec.r, into)
        shapes[f"{path}.lora_b"] = (*stack, out, spec.r)
    return shapes


def adapter_base(path: Path) -> str | None:
    """The base model that a PEFT directory names, as a path or a Hub name; None where `path` is no adapter alone.

    Raises UserError: json-broken, adapter-alone (it names none).
    """
    if not (path / CONFIG).is_file() or (path / "config.json").exists():
        return None
    base = read_json(path / CONFIG).get("base_model_name_or_path")
    if not base:
        raise UserError(
            "adapter-alone",
            f"{path} holds an adapter, and its {CONFIG} names no base model (base_model_name_or_path). Give the base model, and "
            "this directory as adapter.",
        )
    return str(base)


def read_adapter(path: str | Path, model: ModelConfig) -> Adapter:
    """Reads a PEFT directory for a model; `inference_mode`, which PEFT always writes, means nothing.

    Raises UserError: adapter-missing, json-broken, what `lora_spec` raises, pickle-only, safetensors-broken, tensors-differ,
    shape-differs.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        found = "a directory without" if path.is_dir() else "no directory with"
        raise UserError("adapter-missing", f"{path} is {found} {CONFIG}: there is no adapter.")
    raw = read_json(path / CONFIG)
    try:
        config = LoraConfig.of(raw)
        spec = lora_spec(config, model, trained=True)
    except UserError as error:
        raise UserError(error.name, f"{path / CONFIG}: {error.message}") from None
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").exists():
            raise UserError(
                "pickle-only",
                f"{path} holds its weights as a pickle, which is not read. Save the adapter again with a newer PEFT.",
            )
        raise UserError("adapter-missing", f"{path} has {CONFIG}, but no {WEIGHTS}.")
    tensors = read_header(path / WEIGHTS)
    shapes = adapter_shapes(spec, model)
    names = {leaf: peft_names(leaf, model.num_layers) for leaf in shapes}
    _check_names(path, set(tensors), {name for group in names.values() for name in group})
    arrays = {}
    for leaf, group in names.items():
        shape = shapes[leaf][1:] if is_stacked(leaf) else shapes[leaf]
        for name in group:
            if tensors[name].shape != shape:
                raise UserError(
                    "shape-differs",
                    f"{path / WEIGHTS}: {name} is {list(tensors[name].shape)}; for this model and r = {spec.r} it should be "
                    f"{list(shape)}. Was the adapter trained on another base?",
                )
        parts = [tensors[name].read().astype(np.float32) for name in group]
        arrays[leaf] = np.stack(parts) if is_stacked(leaf) else parts[0]
    return Adapter(config, spec, arrays)


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    missing, more = sorted(expected - found), sorted(found - expected)
    if missing or more:
        parts = [f"{len(missing)} of {len(expected)} tensors are missing ({missing[0]}, ...)"] if missing else []
        parts += [f"{len(more)} tensors are not expected ({more[0]}, ...)"] if more else []
        raise UserError("tensors-differ", f"{path / WEIGHTS}: by {CONFIG} and this model, {'; '.join(parts)}.")


def new_adapter(config: LoraConfig, model: ModelConfig, seed: int) -> Adapter:
    """A fresh adapter, which changes nothing yet: A random, B zero, float32.

    A is uniform in +-1/sqrt(in), which is PEFT's kaiming_uniform with a = sqrt(5); with init_lora_weights "gaussian" it is
    normal with standard deviation 1/r. Each leaf has a stream of its own, by seed and path, so that adding a target changes
    no other one. Raises UserError: what `lora_spec` raises.
    """
    spec = lora_spec(config, model)
    arrays = {}
    for leaf, shape in adapter_shapes(spec, model).items():
        if leaf.endswith("lora_b"):
            arrays[leaf] = np.zeros(shape, np.float32)
            continue
        random = np.random.default_rng([seed, zlib.crc32(leaf.encode())])
        if config.init_lora_weights == "gaussian":
            arrays[leaf] = (random.standard_normal(shape) / spec.r).astype(np.float32)
        else:
            bound = 1 / math.sqrt(shape[-1])
            arrays[leaf] = random.uniform(-bound, bound, shape).astype(np.float32)
    return Adapter(config, spec, arrays)


def write_adapter(
    out: str | Path,
    *,
    model: ModelConfig,
    arrays: Mapping[str, Any],
    base: str | None,
    config: LoraConfig | None = None,
    tokenizer_files: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> Path:
    """Writes an adapter as PEFT does, in float32; returns the directory.

    `model.lora` says what the adapter is; `config` is the configuration that it came from (target_modules as the user put
    them), `base` the name or path of the base model. `arrays` holds numpy or jax arrays for the paths of `adapter_shapes`;
    others in it are left alone. Raises UserError: no-space-left, no-permission, path-taken.
    """
    out, spec = Path(out), model.lora
    if spec is None:
        raise ValueError("the model has no adapter")
    held = [name for name in (SINGLE, INDEX) if (out / name).exists()]
    if held and not replace:
        raise UserError(
            "path-taken", f"{out} holds a whole model ({held[0]}); give the adapter a directory of its own."
        )
    entries = []
    for leaf, shape in adapter_shapes(spec, model).items():
        value = arrays[leaf]
        if tuple(value.shape) != shape:
            raise ValueError(f"{leaf} is {tuple(value.shape)}, expected {shape}")
        inner = shape[1:] if is_stacked(leaf) else shape
        for layer, name in enumerate(peft_names(leaf, model.num_layers)):
            entries.append(Entry(name, inner, partial(layer_of, value, layer if is_stacked(leaf) else None)))
    with placing(out, replace) as new:
        content = _config_content(config or LoraConfig.from_spec(spec), spec, base)
        (new / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        write_file(new / WEIGHTS, entries, "float32")
        for name, data in (tokenizer_files or {}).items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_bytes(data)
    return out


def _config_content(config: LoraConfig, spec: LoraSpec, base: str | None) -> dict[str, Any]:
    """All of PEFT's fields, with the values that PEFT fills in: targets by name, marked as ready for inference."""
    content = asdict(config)
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        content["target_modules"] = [path.rpartition(".")[2] for path in spec.targets]
    content |= {
        "base_model_name_or_path": base if base is not None else config.base_model_name_or_path,
        "task_type": config.task_type or "CAUSAL_LM",
        "inference_mode": True,
        "peft_version": config.peft_version or FORMAT_VERSION,
    }
    return content


def merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """W + scale B A in float32: [..., out, in], [..., r, in], [..., out, r] -> [..., out, in]."""
    delta = np.matmul(np.asarray(b, np.float32), np.asarray(a, np.float32))
    return np.asarray(weight).astype(np.float32) + np.float32(scale) * delta


@dataclass(frozen=True)
class MergedLeaf:
    """A weight with its adapter added, computed for the layers that are read. `base` is a leaf or an array."""

    base: Any
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, index: Index = ()) -> np.ndarray:
        if len(self.shape) == 2:
            return merged(layer_of(self.base, None), self.a, self.b, self.scale)[index]
        first, *rest = full_index(index, len(self.shape))
        if isinstance(first, int):
            return merged(layer_of(self.base, first), self.a[first], self.b[first], self.scale)[tuple(rest)]
        layers = range(self.shape[0])[first]
        return np.stack([self.read((layer, *rest)) for layer in layers])


def merge(arrays: Mapping[str, Any], adapter: Mapping[str, Any], spec: LoraSpec) -> dict[str, Leaf | Any]:
    """The base's leaves with the adapter added to those that it targets, ready for `write_model`.

    `arrays` are the base's leaves or arrays by path, `adapter` those of `lora_a` and `lora_b`; nothing is computed yet.
    """
    result = {path: value for path, value in arrays.items() if not path.endswith((".lora_a", ".lora_b"))}
    for path in spec.targets:
        a, b = np.asarray(adapter[f"{path}.lora_a"]), np.asarray(adapter[f"{path}.lora_b"])
        result[f"{path}.weight"] = MergedLeaf(result[f"{path}.weight"], a, b, spec.scale)
    return result
