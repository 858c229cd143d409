"""Model files in and out: Hugging Face directories, GGUF, PEFT adapters."""

from __future__ import annotations

from jax_dpo.weights.export import write_model
from jax_dpo.weights.source import ModelFiles, open_model, resolve_model

__all__ = ["ModelFiles", "open_model", "resolve_model", "write_model"]
