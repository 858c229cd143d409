"""KL control: what is done when an evaluation's KL is over its bound. Pure: (state, KL) -> (state, actions).

The loop carries the actions out. How the plain form is read here:

- Each evaluation whose KL is over `target_kl` takes one action, the next of `kl_actions` in the order given; after the
  last it begins again with the first. An evaluation within the bound takes none, and does not start the order anew.
- `halve_lr` multiplies the learning rate by 0.5, down to 1/1024 of the configured one. `raise_beta` multiplies beta by
  1.5, up to 10 times the configured one. An action at its end is passed over.
- `rollback` goes back to the last checkpoint that held the bound, or to the start. The values in force now stay in
  force: only parameters, optimizer and data position are the checkpoint's. Training is deterministic, so a rollback
  with the values that led away from that checkpoint would arrive at the same place: where neither learning rate nor
  beta has changed since, the learning rate is halved as well. Rolling back to one and the same step is done three times
  at most (a start that is over the bound itself would be gone back to for ever); after that the rollback is replaced by
  halving the learning rate.
- A KL that is not finite means parameters that no learning rate mends: it goes straight to `rollback` where that is in
  `kl_actions`.
- A controller (`controllers.py`) comes first and acts at every evaluation whose KL is finite.
- Before step 1 nothing has been trained, so nothing is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jax_dpo.train.controllers import BETA_RANGE, Controller, Setting

KL_ACTIONS = ("halve_lr", "raise_beta", "rollback")
HALVE = 0.5
RAISE = 1.5
LEAST_LEARNING_RATE_SCALE = 1 / 1024
ROLLBACKS_TO_ONE_STEP = 3


@dataclass(frozen=True)
class Controls:
    """The values that a step takes as data: changing them compiles nothing anew."""

    learning_rate_scale: float
    beta: float
    kl_coef: float


@dataclass(frozen=True)
class Action:
    """One thing done about the KL, as `run.jsonl` has it.

    `kind` is "halve_lr", "raise_beta", "rollback" or a controller's; `option` is what it changes: "learning_rate" (old
    and new are the schedule's peak), "beta", "kl_coef" or "step".
    """

    kind: str
    reason: str
    kl: float
    target_kl: float
    option: str
    old: float
    new: float

    def record(self) -> dict[str, Any]:
        """The fields of a `kl_action` record, beside `kind`, `step` and `time`. A KL that is not finite is null."""
        fields = asdict(self)
        fields["action"] = fields.pop("kind")
        return {**fields, "kl": self.kl if math.isfinite(self.kl) else None}


@dataclass(frozen=True)
class ControlState:
    """Everything that the control remembers; a checkpoint's `meta` holds it as `to_dict`.

    Attributes:
        controls: the values in force.
        learning_rate, beta, kl_coef: as configured.
        turn: index into `kl_actions` of the action that is next.
        counts: how often each kind was taken.
        changed_at: the step, on the path that leads to the present, from which on the last change is in force.
        rollback_step, rollbacks: the step last gone back to, and how often in a row.
        memory: what the controller remembers.
    """

    controls: Controls
    learning_rate: float
    beta: float
    turn: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    changed_at: int = 0
    rollback_step: int = -1
    rollbacks: int = 0
    kl_coef: float = 0.0
    memory: float = 0.0

    @classmethod
    def start(cls, *, learning_rate: float, beta: float, kl_coef: float) -> ControlState:
        """The state of a fresh run, from the configured values."""
        return cls(Controls(1.0, beta, kl_coef), learning_rate, beta, kl_coef=kl_coef)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "counts": dict(self.counts)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ControlState:
        """The inverse of `to_dict`."""
        return cls(**{**data, "controls": Controls(**data["controls"]), "counts": dict(data["counts"])})


def react(
    state: ControlState,
    *,
    kl: float,
    target_kl: float,
    kl_actions: Sequence[str],
    controller: Controller | None = None,
    step: int,
    good_step: int = 0,
) -> tuple[ControlState, list[Action]]:
    """What an evaluation's KL leads to.

    Args:
        kl: nats per token of the evaluation at `step`.
        kl_actions: names out of `KL_ACTIONS`.
        controller: follows the KL at every evaluation; None for none.
        good_step: the step of the newest checkpoint whose KL held the bound; 0 is the start.

    Returns:
        The state from now on, and the actions to carry out, in order. A rollback is always the last.

    Raises:
        ValueError: a name that is not in `KL_ACTIONS`.
    """
    unknown = [name for name in kl_actions if name not in KL_ACTIONS]
    if unknown:
        raise ValueError(f"kl_actions: unknown {unknown}; known are {', '.join(KL_ACTIONS)}")
    if step <= 0:
        return state, []
    turn = _Turn(state, kl, target_kl, step, good_step)
    if controller is not None and math.isfinite(kl):
        turn.follow(controller)
    over = not kl <= target_kl  # so that NaN is over
    if over and kl_actions:
        turn.take_next(list(kl_actions))
    return turn.state, turn.actions


class _Turn:
    """One evaluation's worth of decisions, gathered into a new state and a list of actions."""

    def __init__(self, state: ControlState, kl: float, target_kl: float, step: int, good_step: int) -> None:
        self.state = state
        self.actions: list[Action] = []
        self.kl, self.target_kl, self.step, self.good_step = kl, target_kl, step, good_step
        self.over = f"KL {kl:.4g} at step {step} is over target_kl {target_kl:g}"

    def follow(self, controller: Controller) -> None:
        state, option = self.state, controller.option
        old, configured = getattr(state.controls, option), getattr(state, option)
        new = controller(Setting(old, state.memory), kl=self.kl, target_kl=self.target_kl, configured=configured)
        self.state = replace(state, memory=new.memory)
        if new.value == old:
            return
        where = "over" if self.kl > self.target_kl else "below half of" if self.kl < self.target_kl / 2 else "within"
        reason = f"KL {self.kl:.4g} at step {self.step} is {where} target_kl {self.target_kl:g}"
        self._set(replace(state.controls, **{option: new.value}))
        self._note(controller.kind, f"{reason}: {option} from {old:.4g} to {new.value:.4g}", option, old, new.value)

    def take_next(self, names: list[str]) -> None:
        take = {"halve_lr": self._halve_lr, "raise_beta": self._raise_beta, "rollback": self._rollback}
        first = self.state.turn % len(names)
        order = [(first + offset) % len(names) for offset in range(len(names))]
        if not math.isfinite(self.kl):
            order.sort(key=lambda index: names[index] != "rollback")
        for index in order:
            if take[names[index]]():
                self.state = replace(self.state, turn=(index + 1) % len(names))
                return

    def _halve_lr(self, because: str = "") -> bool:
        controls = self.state.controls
        scale = controls.learning_rate_scale * HALVE
        if scale < LEAST_LEARNING_RATE_SCALE:
            return False
        old, new = (self.state.learning_rate * factor for factor in (controls.learning_rate_scale, scale))
        self._set(replace(controls, learning_rate_scale=scale))
        reason = f"{self.over}: learning rate halved from {old:.3g} to {new:.3g}{because}"
        self._note("halve_lr", reason, "learning_rate", old, new)
        return True

    def _raise_beta(self) -> bool:
        beta = self.state.controls.beta
        new = min(beta * RAISE, self.state.beta * BETA_RANGE[1])
        if new <= beta:
            return False
        self._set_beta("raise_beta", new, f"{self.over}: beta raised from {beta:.4g} to {new:.4g}")
        return True

    def _rollback(self) -> bool:
        state, to = self.state, self.good_step
        times = state.rollbacks + 1 if state.rollback_step == to else 1
        if times > ROLLBACKS_TO_ONE_STEP:
            return self._halve_lr(
                f", in place of another rollback to step {to}, which {ROLLBACKS_TO_ONE_STEP} did not help"
            )
        if state.changed_at <= to and not self._halve_lr(
            ": going back with the same values would end in the same place"
        ):
            return False
        # The change is in force from the checkpoint on: there is nothing new about it for a second rollback to there.
        self.state = replace(self.state, changed_at=to, rollback_step=to, rollbacks=times)
        where = f"checkpoint-{to}, the last within the bound" if to else "the start: no checkpoint held the bound"
        self._note("rollback", f"{self.over}: back to {where}", "step", self.step, to)
        return True

    def _set_beta(self, kind: str, new: float, reason: str) -> None:
        old = self.state.controls.beta
        self._set(replace(self.state.controls, beta=new))
        self._note(kind, reason, "beta", old, new)

    def _set(self, controls: Controls) -> None:
        self.state = replace(self.state, controls=controls, changed_at=self.step)

    def _note(self, kind: str, reason: str, option: str, old: float, new: float) -> None:
        counts = {**self.state.counts, kind: self.state.counts.get(kind, 0) + 1}
        self.state = replace(self.state, counts=counts)
        self.actions.append(Action(kind, reason, self.kl, self.target_kl, option, old, new))
