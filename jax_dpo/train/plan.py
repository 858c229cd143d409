"""What a run will do when: steps, epochs, and where it logs, evaluates and saves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jax_dpo.data.order import START, Position, position_after, steps_per_epoch


@dataclass(frozen=True)
class Plan:
    """`pairs` are those of one epoch. `micro_batch` pairs make one of TRL's micro-batches, `accumulation` micro-batches (over all
    devices) one step. An interval of 0 means never."""

    pairs: int
    micro_batch: int
    accumulation: int
    total: int
    logging_steps: int
    eval_steps: int
    save_steps: int
    saves_best: bool = False
    """whether each evaluation that is the best so far is followed by a checkpoint"""
    logging_first_step: bool = False
    eval_on_start: bool = False
    eval_delay: float = 0.0
    """steps before which nothing is evaluated, but for the start and the end"""
    logs_last: bool = False
    """whether the last step is logged wherever it falls"""
    sync_steps: int = 0

    @property
    def per_epoch(self) -> int:
        return steps_per_epoch(self.pairs, self.micro_batch, self.accumulation)

    @property
    def pairs_per_step(self) -> int:
        return self.micro_batch * self.accumulation

    def after(self, step: int, start: Position = START) -> Position:
        return position_after(step, self.pairs, self.micro_batch, self.accumulation, start)

    def epoch(self, position: Position) -> float:
        """TRL's fractional epoch: whole epochs plus the share of the epoch's micro-batches that are used up."""
        micro_batches = -(-self.pairs // self.micro_batch)
        return position.epoch + math.ceil(position.consumed / self.micro_batch) / micro_batches

    def logs_at(self, step: int) -> bool:
        if (step == 1 and self.logging_first_step) or (step == self.total and self.logs_last):
            return True
        return self.logging_steps > 0 and step % self.logging_steps == 0

    def evaluates_at(self, step: int) -> bool:
        """At every interval once the delay is over, and at the end."""
        if self.eval_steps == 0:
            return False
        return step == self.total or (step % self.eval_steps == 0 and step >= self.eval_delay)

    def saves_at(self, step: int) -> bool:
        return self.save_steps > 0 and (step % self.save_steps == 0 or step == self.total)

    def syncs_at(self, step: int) -> bool:
        """Whether the reference moves after the optimizer's update of this step, before anything looks at it (TRL's order)."""
        return self.sync_steps > 0 and step % self.sync_steps == 0


def interval(value: float | None, total: int, default: int) -> int:
    """An option in steps, or as a share in (0, 1) of the run (rounded up, as transformers does)."""
    if value is None:
        return default
    return math.ceil(total * value) if 0 < value < 1 else int(value)


def total_steps(pairs: int, micro_batch: int, accumulation: int, max_steps: int, epochs: float) -> int:
    """TRL's number of optimizer steps: `max_steps` if it is above 0, else `epochs` times the steps of one, rounded up."""
    if max_steps > 0:
        return max_steps
    return math.ceil(epochs * steps_per_epoch(pairs, micro_batch, accumulation))
