"""Options: what they are called, what they may be, and how they are read from Python, YAML and the command line."""

from __future__ import annotations

from jax_dpo.config.kl_rules import KL_ACTIONS
from jax_dpo.config.options import DPOConfig
from jax_dpo.config.parse import parse
from jax_dpo.config.rules import DROP_REASONS, F_DIVERGENCES, LOSS_TYPES, OPTIMIZERS, SCHEDULERS
from jax_dpo.config.script import ScriptArguments

__all__ = [
    "DROP_REASONS",
    "F_DIVERGENCES",
    "KL_ACTIONS",
    "LOSS_TYPES",
    "OPTIMIZERS",
    "SCHEDULERS",
    "DPOConfig",
    "ScriptArguments",
    "parse",
]
