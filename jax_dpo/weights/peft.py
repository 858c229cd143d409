"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors, read, written, begun and merged.

In the tree an adapter is two leaves beside the weight that it changes, `lora_a` [L, r, in] and `lora_b` [L, out, r]; the
layer computes W x + scale B A x. With DoRA there is `lora_magnitude` [L, out] too. r is the largest rank of the layers; in the files
each layer has its own.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig, parameter_shapes
from jax_dpo.models.lora import LoraConfig, LoraSpec, LoraTarget
from jax_dpo.models.lora_targets import ALL_LINEAR, EMBEDDING, lora_spec, modules_of
from jax_dpo.weights.huggingface import INDEX, SINGLE, read_json
from jax_dpo.weights.leaves import Index, Leaf, full_index, layer_of
from jax_dpo.weights.names import PEFT_PREFIX, is_stacked
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
    shapes = parameter_shapes(replace(model, lora=spec))
    return {path: shape for path, shape in shapes.items() if spec.trains(path)}


class Piece(NamedTuple):
    """A tensor of a PEFT file: its name, and the part of the leaf at `path` that it is."""

    name: str
    path: str
    part: tuple[int | slice, ...]
    shape: tuple[int, ...]


def pieces(spec: LoraSpec, model: ModelConfig) -> list[Piece]:
    """All tensors of an adapter's file, each layer with its own rank; a layer without an adapter has none."""
    found = []
    for path, shape in adapter_shapes(spec, model).items():
        stem, _, which = path.rpartition(".")
        target = spec.target(stem)
        ranks = target.ranks if target is not None else ()
        for at, module in enumerate(modules_of(stem, model)):
            layer = (at,) if is_stacked(path) else ()
            inner = shape[len(layer) :]
            if not ranks:
                found.append(Piece(f"{PEFT_PREFIX}{module}.{which}", path, layer, inner))
                if path == EMBEDDING and model.tie_word_embeddings:  # one matrix, which PEFT's files hold by both names
                    found.append(Piece(f"{PEFT_PREFIX}lm_head.weight", path, layer, inner))
                continue
            r = ranks[at]
            rows = {"lora_a": (slice(r),), "lora_b": (slice(None), slice(r)), "lora_magnitude": ()}[which]
            own = {"lora_a": (r, *inner[1:]), "lora_b": (*inner[:1], r), "lora_magnitude": inner}[which]
            if r:
                found.append(Piece(f"{PEFT_PREFIX}{module}.{_PEFT_LEAF[which]}", path, (*layer, *rows), own))
    return found


_PEFT_LEAF = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}


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
        spec = lora_spec(config, model)
    except UserError as error:
        raise UserError(error.name, f"{path / CONFIG}: {error.message}") from None
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").exists():
            raise UserError(
                "pickle-only",
                f"{path} holds its weights as a pickle, which is not read. Save the adapter again with a newer PEFT.",
            )
        raise UserError("adapter-missing", f"{path} has {CONFIG}, but no {WEIGHTS}.")
    return assemble(config, spec, model, read_header(path / WEIGHTS), str(path / WEIGHTS))


def rows_of_adapter(path: Path) -> int:
    """Tokens of the embedding or head that an adapter's file holds whole; 0 where it holds neither.

    Raises UserError: safetensors-broken.
    """
    if not (path / WEIGHTS).is_file():
        return 0
    tensors = read_header(path / WEIGHTS)
    found = [tensors[name] for name in (PEFT_PREFIX + EMBEDDING, f"{PEFT_PREFIX}lm_head.weight") if name in tensors]
    return max((tensor.shape[0] for tensor in found), default=0)


def assemble(
    config: LoraConfig, spec: LoraSpec, model: ModelConfig, tensors: Mapping[str, Leaf], where: str
) -> Adapter:
    """An adapter out of the tensors of a PEFT file by name; `where` they are, for messages.

    Raises UserError: tensors-differ, shape-differs.
    """
    expected = pieces(spec, model)
    _check_names(where, set(tensors), {piece.name for piece in expected})
    arrays = {leaf: np.zeros(shape, np.float32) for leaf, shape in adapter_shapes(spec, model).items()}
    for piece in expected:
        tensor = tensors[piece.name]
        if tensor.shape != piece.shape:
            raise UserError(
                "shape-differs",
                f"{where}: {piece.name} is {list(tensor.shape)}; for this model and {CONFIG} it should be "
                f"{list(piece.shape)}. Was the adapter trained on another base?",
            )
        arrays[piece.path][piece.part] = tensor.read().astype(np.float32)
    return Adapter(config, spec, arrays)


def _check_names(where: str, found: set[str], expected: set[str]) -> None:
    missing, more = sorted(expected - found), sorted(found - expected)
    if missing or more:
        parts = [f"{len(missing)} of {len(expected)} tensors are missing ({missing[0]}, ...)"] if missing else []
        parts += [f"{len(more)} tensors are not expected ({more[0]}, ...)"] if more else []
        raise UserError("tensors-differ", f"{where}: by {CONFIG} and this model, {'; '.join(parts)}.")


def new_adapter(config: LoraConfig, model: ModelConfig, seed: int, leaves: Mapping[str, Any]) -> Adapter:
    """A fresh adapter, which changes nothing yet: A random, B zero, float32.

    A is uniform in +-1/sqrt(in), which is PEFT's kaiming_uniform with a = sqrt(5); with init_lora_weights "gaussian" it is
    normal with standard deviation 1/r; with false B is uniform in +-1/sqrt(r) as well, and the adapter does change the model. Each leaf
    has a stream of its own, by seed and path, so that adding a target changes no other one. `leaves` are the model's own: DoRA's
    magnitudes and copies that are trained whole begin with them. Raises UserError: what `lora_spec` raises.
    """
    spec = lora_spec(config, model)
    arrays = {}
    for leaf, shape in adapter_shapes(spec, model).items():
        stem, _, which = leaf.rpartition(".")
        target = spec.target(stem)
        if target is None:
            arrays[leaf] = leaves[leaf].read().astype(np.float32)
        elif which == "lora_magnitude":
            arrays[leaf] = _lengths(
                leaves[f"{stem}.weight"], arrays[f"{stem}.lora_a"], arrays[f"{stem}.lora_b"], target
            )
        elif which == "lora_b" and config.init_lora_weights is not False:
            arrays[leaf] = np.zeros(shape, np.float32)
        else:
            arrays[leaf] = _drawn(leaf, shape, target, config, seed)
    return Adapter(config, spec, arrays)


def _drawn(leaf: str, shape: tuple[int, ...], target: LoraTarget, config: LoraConfig, seed: int) -> np.ndarray:
    """Random numbers for the ranks that each layer has, zeros for the others."""
    random = np.random.default_rng([seed, zlib.crc32(leaf.encode())])
    ranks = np.array(target.ranks if is_stacked(leaf) else target.ranks[0])[..., None, None]
    place = np.arange(target.rank)
    used = place[:, None] < ranks if leaf.endswith("lora_a") else place[None, :] < ranks
    if config.init_lora_weights == "gaussian":
        drawn = random.standard_normal(shape) / np.maximum(ranks, 1)
    else:
        # A linear layer's own start: bounded by its number of inputs.
        bound = 1 / np.sqrt(shape[-1] if leaf.endswith("lora_a") else np.maximum(ranks, 1))
        drawn = random.uniform(-1.0, 1.0, shape) * bound
    return np.where(used, drawn, 0).astype(np.float32)


def _lengths(weight: Any, a: np.ndarray, b: np.ndarray, target: LoraTarget) -> np.ndarray:
    """The norm of each row of W + scale B A, layer by layer: DoRA's magnitudes at the start; 0 in a layer without an adapter."""
    if a.ndim == 2:
        return np.linalg.norm(merged(layer_of(weight, None), a, b, target.scales[0]), axis=-1)
    found = np.zeros(b.shape[:2], np.float32)
    for layer, (rank, scale) in enumerate(zip(target.ranks, target.scales)):
        if rank:
            found[layer] = np.linalg.norm(merged(layer_of(weight, layer), a[layer], b[layer], scale), axis=-1)
    return found


def write_adapter(
    out: str | Path,
    *,
    model: ModelConfig,
    arrays: Mapping[str, Any],
    base: str | None,
    config: LoraConfig,
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
    for leaf, shape in adapter_shapes(spec, model).items():
        if tuple(arrays[leaf].shape) != shape:
            raise ValueError(f"{leaf} is {tuple(arrays[leaf].shape)}, expected {shape}")
    entries = [Entry(p.name, p.shape, partial(_part, arrays[p.path], p.part)) for p in pieces(spec, model)]
    with placing(out, replace) as new:
        content = _config_content(config, base, spec)
        (new / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        write_file(new / WEIGHTS, entries, "float32")
        for name, data in (tokenizer_files or {}).items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_bytes(data)
    return out


def _part(value: Any, part: tuple[int | slice, ...]) -> np.ndarray:
    """A part of a numpy or jax array, as numpy; of the latter only the layer is sliced on the device."""
    if part and isinstance(part[0], int):
        return np.asarray(value[part[0]])[part[1:]]
    return np.asarray(value)[part]


def _config_content(config: LoraConfig, base: str | None, spec: LoraSpec) -> dict[str, Any]:
    """All of PEFT's fields, with the values that PEFT fills in: targets by name, marked as ready for inference."""
    content = asdict(config)
    targets = config.target_modules
    if targets is None or targets == ALL_LINEAR:
        content["target_modules"] = [target.path.rpartition(".")[2] for target in spec.targets]
    content |= {
        "base_model_name_or_path": base if base is not None else config.base_model_name_or_path,
        "task_type": config.task_type or "CAUSAL_LM",
        "inference_mode": True,
        "peft_version": config.peft_version or FORMAT_VERSION,
    }
    return content


def merged(
    weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, magnitude: np.ndarray | None = None
) -> np.ndarray:
    """W + scale B A in float32: [..., out, in], [..., r, in], [..., out, r] -> [..., out, in].

    With DoRA each row is scaled to its `magnitude` [..., out] (arXiv 2402.09353, equation 5); one of 0 leaves the row as it is.
    """
    delta = np.matmul(np.asarray(b, np.float32), np.asarray(a, np.float32))
    whole = np.asarray(weight).astype(np.float32) + np.float32(scale) * delta
    if magnitude is None:
        return whole
    norm = np.linalg.norm(whole, axis=-1)
    return whole * np.divide(magnitude, norm, out=np.ones_like(norm), where=magnitude != 0)[..., None]


@dataclass(frozen=True)
class MergedLeaf:
    """A weight with its adapter added, computed for the layers that are read. `base` is a leaf or an array."""

    base: Any
    a: np.ndarray
    b: np.ndarray
    scales: tuple[float, ...]
    magnitude: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, index: Index = ()) -> np.ndarray:
        if len(self.shape) == 2:
            return merged(layer_of(self.base, None), self.a, self.b, self.scales[0], self.magnitude)[index]
        first, *rest = full_index(index, len(self.shape))
        if isinstance(first, int):
            m = None if self.magnitude is None else self.magnitude[first]
            whole = merged(layer_of(self.base, first), self.a[first], self.b[first], self.scales[first], m)
            return whole[tuple(rest)]
        layers = range(self.shape[0])[first]
        return np.stack([self.read((layer, *rest)) for layer in layers])


def merge(arrays: Mapping[str, Any], adapter: Mapping[str, Any], spec: LoraSpec) -> dict[str, Leaf | Any]:
    """The base's leaves with the adapter added to those that it targets, ready for `write_model`.

    `arrays` are the base's leaves or arrays by path, `adapter` those of the adapter; nothing is computed yet.
    """
    result = {path: value for path, value in arrays.items() if path in spec.saved or not spec.trains(path)}
    result |= {path: adapter[path] for path in spec.saved}
    for target in spec.targets:
        path = target.path
        a, b = np.asarray(adapter[f"{path}.lora_a"]), np.asarray(adapter[f"{path}.lora_b"])
        m = np.asarray(adapter[f"{path}.lora_magnitude"]) if spec.use_dora else None
        result[f"{path}.weight"] = MergedLeaf(result[f"{path}.weight"], a, b, target.scales, m)
    return result
