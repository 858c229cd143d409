"""Hugging Face directories: config.json, safetensors in one file or in shards, tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig
from jax_dpo.models.families import model_config
from jax_dpo.weights.leaves import FileTensor
from jax_dpo.weights.model_files import ModelFiles, build_leaves, main_dtype
from jax_dpo.weights.safetensors_file import read_header
from jax_dpo.weights.tokenizer_files import read_tokenizer_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def open_directory(path: Path) -> ModelFiles:
    """Opens a Hugging Face directory; see `source.open_model` for what can be wrong with it."""
    hf = read_config(path)
    config = model_config(hf, str(path / "config.json"))
    tensors, where = find_tensors(path)
    if config.tie_word_embeddings:
        _drop_tied_head(path, tensors)
    return model_files(path, hf, config, tensors, where)


def model_files(
    path: Path, hf: dict[str, Any], config: ModelConfig, tensors: dict[str, FileTensor], where: dict[str, str]
) -> ModelFiles:
    """The model of these tensors, each in the file that `where` names; raises what `build_leaves` raises."""
    # Old files store the rotary frequencies too, which follow from config.json.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    leaves = build_leaves(path, config, tensors, {name: str(path / file) for name, file in where.items()})
    generation = path / "generation_config.json"
    return ModelFiles(
        path=path,
        hf_config=hf,
        config=config,
        leaves=leaves,
        dtype=main_dtype(leaves),
        generation_config=generation.read_bytes() if generation.is_file() else None,
        read_tokenizer=lambda: read_tokenizer_files(path),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError json-broken with line and column."""
    try:
        found = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError("json-broken", f"{path}, line {error.lineno}, column {error.colno}: {error.msg}.") from None
    except UnicodeDecodeError:
        raise UserError("json-broken", f"{path} is not text in UTF-8.") from None
    if not isinstance(found, dict):
        raise UserError("json-broken", f"{path} holds a {type(found).__name__}; expected an object.")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory that holds a whole model. Raises UserError: model-config-missing, adapter-alone,
    adapter-beside-weights, json-broken."""
    adapters = [name for name in ADAPTER_FILES if (path / name).exists()]
    if not (path / "config.json").is_file():
        if adapters:
            raise UserError(
                "adapter-alone",
                f"{path} holds an adapter ({adapters[0]}), not a model. Give the base model, and this directory as adapter.",
            )
        files = sorted(p.name for p in path.iterdir())
        held = ", ".join(files[:6]) + (", ..." if len(files) > 6 else "") if files else "nothing"
        more = " Give the path of the .gguf file itself." if any(name.endswith(".gguf") for name in files) else ""
        raise UserError("model-config-missing", f"{path} has no config.json; it holds {held}.{more}")
    if adapters:
        raise UserError(
            "adapter-beside-weights",
            f"{path} holds a whole model and, beside it, an adapter ({', '.join(adapters)}). Some programs would put the "
            "adapter on top, others not. Move the adapter files to a directory of their own and give that as adapter, or "
            "remove them.",
        )
    return read_json(path / "config.json")


def find_tensors(path: Path) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """All tensors of a directory by name, and the file that each is in."""
    if not (path / INDEX).is_file():
        if not (path / SINGLE).is_file():
            raise _no_weights(path)
        only = read_header(path / SINGLE)
        return only, dict.fromkeys(only, SINGLE)
    listed = read_json(path / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise UserError("json-broken", f"{path / INDEX} has no weight_map from tensors to files.")
    files = sorted(set(listed.values()))
    if SINGLE not in files and (path / SINGLE).is_file():
        raise UserError(
            "weights-ambiguous",
            f"{path} holds both {SINGLE} and {INDEX}, which names other files. Remove the one that is out of date.",
        )
    _check_shards(path, listed, files)
    tensors: dict[str, FileTensor] = {}
    where: dict[str, str] = {}
    for file in files:
        for name, tensor in read_header(path / file).items():
            if name in tensors:
                raise UserError("weights-ambiguous", f"{path}: {name} is both in {where[name]} and in {file}.")
            tensors[name], where[name] = tensor, file
    for name, file in listed.items():
        if where.get(name) != file:
            raise UserError("tensors-differ", f"{path / INDEX} places {name} in {file}, which does not hold it.")
    return tensors, where


def _check_shards(path: Path, listed: dict[str, str], files: list[str]) -> None:
    missing = [file for file in files if not (path / file).is_file()]
    if not missing:
        return
    counts = {file: sum(1 for f in listed.values() if f == file) for file in missing}
    text = "; ".join(f"{file} is missing, it should hold {n} of {len(listed)} tensors" for file, n in counts.items())
    strangers = sorted(p.name for p in path.glob("*.safetensors") if p.name not in files)
    if strangers:
        text += f". Files that the index does not list: {', '.join(strangers)}"
    raise UserError("shard-missing", f"{path}: {text}. Get the files that {INDEX} names.")


def _no_weights(path: Path) -> UserError:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickles:
        return UserError(
            "pickle-only",
            f"{path} holds its weights as a pickle ({pickles[0]}), which can run any code when it is opened and is not read. "
            'Convert it once, in an environment with torch: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}').save_pretrained('{path}-safetensors')\" and copy the tokenizer's files there.",
        )
    others = sorted(p.name for p in path.glob("*.safetensors"))
    if others:
        return UserError(
            "weights-missing", f"{path} has neither {SINGLE} nor {INDEX}; it holds {', '.join(others[:6])}."
        )
    return UserError("weights-missing", f"{path} holds no weights: neither {SINGLE} nor {INDEX}.")


def _drop_tied_head(path: Path, tensors: dict[str, FileTensor]) -> None:
    """A tied model may store its head a second time, but not another one: it would be lost without a word."""
    head, embedding = tensors.pop("lm_head.weight", None), tensors.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    if head.shape != embedding.shape or not np.array_equal(head.view(), embedding.view()):
        raise UserError(
            "tied-head-differs",
            f"{path}: config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight. "
            "Set tie_word_embeddings to false if the model has a head of its own, or remove lm_head.weight.",
        )
