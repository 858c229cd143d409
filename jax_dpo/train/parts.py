"""What the loop is given: everything that a run is made of and that does not change while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_dpo.data.batch import Batch
from jax_dpo.data.loader import StepBatch
from jax_dpo.data.order import Position
from jax_dpo.loss.family import LossOptions
from jax_dpo.report.terminal import Display
from jax_dpo.report.writers import Writers
from jax_dpo.train import nonfinite
from jax_dpo.train.checkpoint import Checkpoints
from jax_dpo.train.control import KLControl
from jax_dpo.train.evaluate import EvalSet, Evaluator
from jax_dpo.train.plan import Plan
from jax_dpo.train.progress import Progress
from jax_dpo.train.ranking import Ranking
from jax_dpo.train.schedule import Schedule
from jax_dpo.train.state import Frozen, TrainState

Step = Callable[..., tuple[TrainState, dict[str, Any]]]


@dataclass(frozen=True)
class Parts:
    """Everything that a run is made of and that does not change while it runs."""

    plan: Plan
    step: Step
    evaluator: Evaluator
    frozen: Frozen
    against: Callable[[TrainState], Frozen]
    sync: Callable[[TrainState], TrainState] | None
    fresh_state: Callable[[], TrainState]
    batch_at: Callable[[Position], StepBatch]
    to_devices: Callable[[StepBatch], Batch]
    eval_sets: tuple[EvalSet, ...]
    schedule: Schedule
    learning_rate: float
    key: jax.Array
    options: LossOptions
    control: KLControl
    ranking: Ranking
    checkpoints: Checkpoints
    writers: Writers
    display: Display
    trainer_state: Callable[[Progress], dict[str, Any]]
    check_start: Callable[[dict[str, float]], None] | None
    notify: Callable[[str, dict[str, Any]], None]
    report: Callable[[], None]
    flops: Callable[[StepBatch], float]
    peak_flops: float | None
    skip_nonfinite: bool
    faulty_pairs: Callable[[str | None, np.ndarray, TrainState], np.ndarray]
    """of these positions in a set, those whose numbers are not finite by themselves"""
    row_names: Mapping[str | None, nonfinite.RowNames]
    """of the training set (`nonfinite.TRAINING`) and of each evaluation set, by its name"""
