"""Opening a model that someone else wrote: a Hugging Face directory or a GGUF file.

Everything that can be wrong with its files is found here, from headers alone, before a single weight is read.
"""

from __future__ import annotations

import re
from pathlib import Path

from jax_dpo.errors import UserError
from jax_dpo.weights.gguf import open_gguf
from jax_dpo.weights.huggingface import open_directory
from jax_dpo.weights.model_files import ModelFiles

__all__ = ["ModelFiles", "open_model", "resolve_model"]


def open_model(path: str | Path) -> ModelFiles:
    """Opens a Hugging Face directory (safetensors, sharded or not) or a GGUF file.

    Raises UserError: model-missing, model-config-missing, json-broken, what `model_config` raises, weights-missing,
    pickle-only, shard-missing, weights-ambiguous, adapter-beside-weights, adapter-alone, safetensors-broken, gguf-broken,
    gguf-metadata, tensor-type-unknown, tensors-differ, shape-differs, tied-head-differs.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError("model-missing", f"{path} is a file, but no .gguf file; give the model's directory.")
        return open_gguf(path)
    if not path.is_dir():
        raise UserError("model-missing", f"There is no model at {path}: no such directory or .gguf file.")
    return open_directory(path)


def resolve_model(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The local path of a model: itself if it is there, else the snapshot of that name on the Hugging Face Hub.

    Raises UserError: model-missing (no such path, and no name of the Hub), hub-unreachable, hub-not-found, hub-gated.
    """
    path = Path(name_or_path).expanduser()
    name = str(name_or_path)
    if path.exists():
        return path
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) or name.endswith((".gguf", ".safetensors")):
        raise UserError("model-missing", f"There is no model at {name}: no such directory or .gguf file.")
    from jax_dpo.weights.hub import snapshot

    return snapshot(name, revision)
