"""What a run is made of before it starts. `DPOTrainer` fills it in; the other modules of this package read it."""

from __future__ import annotations

from typing import Any

from jax_dpo.config import DPOConfig
from jax_dpo.report.terminal import Display
from jax_dpo.train.plan import Plan
from jax_dpo.trainer.datasets import PairSet, Tokenizer
from jax_dpo.trainer.engine import Engine
from jax_dpo.trainer.models import Pairing
from jax_dpo.trainer.reward_model import RewardModel


class Run:
    """Options, models, data, plan and engine of one run."""

    args: DPOConfig
    pairing: Pairing
    tokenizer: Tokenizer
    train_set: PairSet | None
    eval_sets: dict[str | None, PairSet]
    plan: Plan | None
    """None where there is nothing to train on."""
    engine: Engine
    display: Display
    notes: list[str]
    """sentences that the user should read at the start"""
    ref_logps_found: int = 0
    """training pairs whose precomputed log-probabilities an earlier run had made"""
    reward_model: RewardModel | None = None
    """what a curriculum orders the pairs by, where that is a reward model"""
    began: float
    """when the run began, unix seconds"""
    trained_tokens: int | None = None
    """tokens trained on, as TRL's num_tokens counts them; None before the training"""

    def named_sets(self) -> dict[str, PairSet]:
        """All data sets by the names under which reports show them."""
        named = {"train": self.train_set} if self.train_set is not None else {}
        return {**named, **{name or "eval": s for name, s in self.eval_sets.items()}}

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: every option, the models, the adapter and the data."""
        p = self.pairing
        return {
            "options": self.args.to_dict(),
            "model": p.policy.title,
            "reference": p.other.title if p.other else p.kind,
            "adapter": repr(p.policy.config.lora),
            "data": {name: s.data.counts for name, s in self.named_sets().items()},
        }
