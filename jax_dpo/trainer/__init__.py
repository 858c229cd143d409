"""The trainer by TRL's signature, and what the commands run."""

from __future__ import annotations

from jax_dpo.trainer.commands import run_check, run_evaluation, run_generate, run_training
from jax_dpo.trainer.dpo import DPOTrainer, TrainerState, TrainOutput
from jax_dpo.trainer.run_tune import run_tune

__all__ = [
    "DPOTrainer",
    "TrainOutput",
    "TrainerState",
    "run_check",
    "run_evaluation",
    "run_generate",
    "run_training",
    "run_tune",
]
