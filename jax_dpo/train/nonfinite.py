"""Numbers that are not finite: which pairs made them, and in which words the user hears of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_dpo.errors import UserError

STOP, SKIP = "stop", "skip"
MOST_IN_A_ROW = 10
TRAINING = ""  # stands for the training set beside the names of evaluation sets, of which one may be "train"

# Positions in a prepared data set -> the rows as people find them: "pairs.jsonl, rows 3 and 5".
RowNames = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Fault:
    """A step, or an evaluation, whose numbers are not finite.

    `pairs` are positions in the prepared data: those whose own loss or log-probabilities are not finite, or (`alone` false) all pairs
    of the step, where every loss is finite and only the gradient is not.
    """

    step: int | None
    what: str
    pairs: tuple[int, ...]
    alone: bool = True

    def record(self, rows: RowNames, action: str, **more: Any) -> dict[str, Any]:
        """The fields of a `nonfinite` record, beside `kind` and `time`."""
        return {"step": self.step, "what": self.what, "rows": rows(self.pairs), "action": action, **more}


def of_step(step: int, faulty: np.ndarray, pairs: np.ndarray) -> Fault:
    """The fault of a step, from the positions of the pairs that are faulty by themselves and of all of its pairs."""
    if len(faulty):
        return Fault(step, "loss", tuple(int(i) for i in np.sort(faulty)))
    return Fault(step, "gradient", tuple(int(i) for i in np.sort(pairs)), alone=False)


def of_evaluation(step: int | None, faulty: np.ndarray, pairs: np.ndarray) -> Fault:
    """The fault of an evaluation, after `step` or of no run (None), from the pairs that are faulty by themselves and all that had such
    numbers."""
    return Fault(step, "evaluation", tuple(int(i) for i in (faulty if len(faulty) else pairs)))


def stopped(fault: Fault, rows: RowNames) -> UserError:
    """What ends a run that stops at such a step."""
    where = rows(fault.pairs)
    source = f"the pairs that made it: {where}" if fault.alone else f"no pair is faulty by itself; its pairs: {where}"
    return UserError(
        "not-finite",
        f"The {fault.what} of step {fault.step} is not finite ({source}). Nothing of this step was saved, and the checkpoints of before "
        "are there. Lower learning_rate, use more warmup_steps or a smaller max_grad_norm; if it is step 1, look at these rows and at the "
        "model's weights. nonfinite_steps: skip leaves such steps out.",
    )


def too_many(fault: Fault, rows: RowNames) -> UserError:
    """What ends a run that has skipped too many steps in a row."""
    return UserError(
        "not-finite-in-a-row",
        f"{MOST_IN_A_ROW} steps in a row were not finite and were skipped, the last of them step {fault.step} ({rows(fault.pairs)}). The "
        "model itself seems to be broken. Start again from the last checkpoint with a lower learning_rate, or look at the model's weights.",
    )
