"""Model files in and out: Hugging Face directories, GGUF, PEFT adapters."""

from __future__ import annotations

from jax_dpo.weights.export import convert, write_model
from jax_dpo.weights.source import ModelFiles, open_model, resolve_model

__all__ = ["ModelFiles", "convert", "open_model", "resolve_model", "write_model"]
