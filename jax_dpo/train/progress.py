"""Where a run stands: with the arrays of its state, all that a checkpoint must hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_dpo.data.order import START, Position
from jax_dpo.train.control import ControlState
from jax_dpo.train.metrics import Window
from jax_dpo.train.ranking import Ranking

# What is added up between two log lines beside the metrics; `seconds` are those of steps, without evaluations and saves.
COUNTED = ("pairs", "trl_tokens", "flops", "fill", "steps", "seconds", "scale")


@dataclass
class Progress:
    """Where a run stands; with the state's arrays, all that a checkpoint must hold."""

    control: ControlState
    step: int = 0
    position: Position = START
    num_tokens: int = 0
    window: Window = field(default_factory=Window)
    counted: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))
    scores: dict[int, float] = field(default_factory=dict)
    """score of every evaluation so far, by step"""
    good: list[int] = field(default_factory=list)
    """steps whose evaluation held the KL bound, or, where there was none, whose last window of train steps did"""
    saved: list[int] = field(default_factory=list)
    losses: tuple[float, int] = (0.0, 0)
    """sum of the losses of all steps, and how many they are"""
    last: tuple[float, float] = (0.0, 0.0)
    """gradient norm and learning rate of the last step that was not skipped"""
    moved: bool = False
    """whether any step had a learning rate above 0"""
    skipped: tuple[int, int] = (0, 0)
    """steps left out because they were not finite: in all, and in a row up to now"""
    kl: tuple[float, float] = (0.0, 0.0)
    """sum of the token KLs of the train steps since they were last judged, and how many tokens they are"""
    within: bool = False
    """whether the train steps held the bound when they were last judged"""
    probe_kl: float = 0.0
    """KL of the trust region's probe set after the last step"""
    rate_share: float = 1.0
    """the trust region's share of the learning rate of the last step"""
    probe_ratio: float | None = None
    """the evaluation set's KL over the probe set's when both were last seen"""

    def add_kl(self, total: float, tokens: float) -> None:
        """One more step to judge."""
        self.kl = (self.kl[0] + total, self.kl[1] + tokens)

    def take_kl(self) -> float | None:
        """Mean token KL of the steps since the last call, and a new beginning; None where there were none."""
        (total, tokens), self.kl = self.kl, (0.0, 0.0)
        return total / tokens if tokens else None

    def meta(self) -> dict[str, Any]:
        """Plain data for JSON; floats survive it to the bit."""
        return {
            "step": self.step,
            "position": list(self.position),
            "num_tokens": self.num_tokens,
            "control": self.control.to_dict(),
            "window": self.window.meta(),
            "counted": self.counted,
            "scores": {str(k): v for k, v in self.scores.items() if math.isfinite(v)},
            "evaluated": sorted(self.scores),
            "good": self.good,
            "saved": self.saved,
            "losses": list(self.losses),
            "last": list(self.last),
            "moved": self.moved,
            "skipped": list(self.skipped),
            "kl": list(self.kl),
            "within": self.within,
            "probe": [self.probe_kl, self.rate_share, self.probe_ratio],
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Progress:
        scores = {step: float(meta["scores"].get(str(step), -math.inf)) for step in meta["evaluated"]}
        return cls(
            control=ControlState.from_dict(meta["control"]),
            step=meta["step"],
            position=Position(*meta["position"]),
            num_tokens=meta["num_tokens"],
            window=Window.from_meta(meta["window"]),
            counted=dict(meta["counted"]),
            scores=scores,
            good=list(meta["good"]),
            saved=list(meta["saved"]),
            losses=(float(meta["losses"][0]), int(meta["losses"][1])),
            last=(float(meta["last"][0]), float(meta["last"][1])),
            moved=meta["moved"],
            skipped=(int(meta["skipped"][0]), int(meta["skipped"][1])),
            kl=(float(meta["kl"][0]), float(meta["kl"][1])),
            within=meta["within"],
            probe_kl=float(meta["probe"][0]),
            rate_share=float(meta["probe"][1]),
            probe_ratio=meta["probe"][2],
        )

    @property
    def mean_loss(self) -> float | None:
        """The mean of all steps, as TRL's train_loss."""
        total, steps = self.losses
        return total / steps if steps else None

    def keep_saved(self, steps: Sequence[int]) -> None:
        """Forgets checkpoints that are not among `steps`: some of an older checkpoint's list may have been rotated away since."""
        self.saved = [step for step in self.saved if step in steps]

    def is_best(self, ranking: Ranking) -> bool:
        """Whether the evaluation at this step is better than all before it; that of the start is none of a checkpoint."""
        return self.step == ranking.best({step: score for step, score in self.scores.items() if step})

    def best_saved(self, ranking: Ranking) -> int | None:
        """The step of the best checkpoint that there is."""
        return ranking.best({step: self.scores[step] for step in self.saved if step in self.scores})
