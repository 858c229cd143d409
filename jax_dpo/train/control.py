"""KL control: what is done when the KL is over its bound. Pure: (state, KL) -> (state, actions).

The loop carries the actions out. The KL is judged at evaluations, on the mean of the last train steps, or on both. How the
rules are read here:

- Each judgement over `target_kl` takes one action, the next of `kl_actions` in the order given; after the last it begins
  again with the first. A judgement within the bound takes none, and does not start the order anew.
- An action waits for as many judgements in a row over the bound as its patience says (1: none to wait for). After it there
  is quiet for the steps of its cool-down: judgements in that time count for nothing. An action that was taken as often as
  it may be is passed over.
- `halve_lr` multiplies the learning rate by 0.5, down to 1/1024 of the configured one. `raise_beta` multiplies beta by
  1.5, up to 10 times the configured one. An action at its end is passed over.
- `rollback` goes back to the last checkpoint that held the bound, or to the start. The values in force now stay in
  force: only parameters, optimizer and data position are the checkpoint's. Training is deterministic, so a rollback
  with the values that led away from that checkpoint would arrive at the same place: where neither learning rate nor
  beta has changed since, the learning rate is halved as well; and where it goes back to the start, since the bound was broken before
  there was anything else to go back to. Rolling back to one and the same step is done three times at most (a start that is over the
  bound itself would be gone back to for ever); after that the rollback is replaced by halving the learning rate.
- A rollback from a KL far over the bound halves the learning rate as often as brings the KL near the bound, if it grows with the rate:
  else a rate that is many times too high would take a way there and back for each halving. (Near the reference it grows with the
  square; whole runs at 1 to 30 times a rate ended with KLs that grew with its power of 0.6 to 1.4: docs/kl-study.md.)
- After the last step only a rollback can still hold the bound, so it is its turn then, without patience or quiet.
- A KL that is not finite means parameters that no learning rate mends: it goes straight to `rollback` where that is in
  `kl_actions`, without patience or quiet.
- A controller (`controllers.py`) comes first and acts at every judgement whose KL is finite.
- Before step 1 nothing has been trained, so nothing is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jax_dpo.train.controllers import AIM, BETA_RANGE, Controller, Setting

KL_ACTIONS = ("halve_lr", "raise_beta", "rollback")
EVAL, TRAIN = JUDGED_ON = ("eval", "train")
HALVE = 0.5
RAISE = 1.5
LEAST_LEARNING_RATE_SCALE = 1 / 1024
ROLLBACKS_TO_ONE_STEP = 3


@dataclass(frozen=True)
class KLControl:
    """How the KL is held.

    Attributes:
        target_kl: the bound, nats per token.
        actions: names out of `KL_ACTIONS`, in the order in which they are taken.
        controller: follows the KL at every judgement; None for none.
        judged_on: "eval" (every evaluation), "train" (the mean of each `window` train steps), or both.
        window: train steps of one judgement.
        patience: {action: judgements in a row over the bound that it takes}; 1 where it is not named.
        cooldown: {action: steps after it in which nothing is done}; 0 where it is not named.
        most: {action: how often it may be taken}; without end where it is not named.

    Raises:
        ValueError: a name that is not in `KL_ACTIONS` or `JUDGED_ON`.
    """

    target_kl: float
    actions: tuple[str, ...] = ()
    controller: Controller | None = None
    judged_on: tuple[str, ...] = (EVAL,)
    window: int = 10
    patience: Mapping[str, int] = field(default_factory=dict)
    cooldown: Mapping[str, int] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, names, known in (
            ("kl_actions", (*self.actions, *self.patience, *self.cooldown, *self.most), KL_ACTIONS),
            ("kl_judged_on", self.judged_on, JUDGED_ON),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(f"{option}: unknown {unknown}; known are {', '.join(known)}")

    def judges_train_at(self, step: int) -> bool:
        """Whether a window of train steps ends with this one."""
        return TRAIN in self.judged_on and step % self.window == 0


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
    judged_on: str = EVAL

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
        over: judgements in a row over the bound since the last action.
        quiet_until: the first step whose judgement may lead to an action again.
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
    over: int = 0
    quiet_until: int = 0

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
    rules: KLControl,
    *,
    kl: float,
    step: int,
    good_step: int = 0,
    judged_on: str = EVAL,
    last: bool = False,
) -> tuple[ControlState, list[Action]]:
    """What a judgement of the KL leads to.

    Args:
        kl: nats per token, of the evaluation at `step` or of the window of train steps that ends there.
        good_step: the step of the newest checkpoint whose KL held the bound; 0 is the start.
        judged_on: which of the two it is.
        last: whether no step follows.

    Returns:
        The state from now on, and the actions to carry out, in order. A rollback is always the last.
    """
    if step <= 0:
        return state, []
    turn = _Turn(state, rules, kl, step, good_step, judged_on, last)
    if rules.controller is not None and math.isfinite(kl):
        turn.follow(rules.controller)
    if rules.actions:
        turn.judge()
    return turn.state, turn.actions


class _Turn:
    """One judgement's worth of decisions, gathered into a new state and a list of actions."""

    def __init__(
        self, state: ControlState, rules: KLControl, kl: float, step: int, good_step: int, judged_on: str, last: bool
    ) -> None:
        self.state, self.rules = state, rules
        self.actions: list[Action] = []
        self.kl, self.target_kl, self.step, self.good_step = kl, rules.target_kl, step, good_step
        self.judged_on, self.last = judged_on, last
        self.seen = f"KL {kl:.4g} at step {step}"
        if judged_on == TRAIN:
            self.seen = f"mean KL {kl:.4g} of the train steps {max(step - rules.window, 0) + 1} to {step}"
        self.over = f"{self.seen} is over target_kl {self.target_kl:g}"

    def follow(self, controller: Controller) -> None:
        state, option = self.state, controller.option
        old, configured = getattr(state.controls, option), getattr(state, option)
        new = controller(Setting(old, state.memory), kl=self.kl, target_kl=self.target_kl, configured=configured)
        self.state = replace(state, memory=new.memory)
        if new.value == old:
            return
        where = "over" if self.kl > self.target_kl else "below half of" if self.kl < self.target_kl / 2 else "within"
        reason = f"{self.seen} is {where} target_kl {self.target_kl:g}"
        self._set(replace(state.controls, **{option: new.value}))
        self._note(controller.kind, f"{reason}: {option} from {old:.4g} to {new.value:.4g}", option, old, new.value)

    def judge(self) -> None:
        state, at_once = self.state, self.last or not math.isfinite(self.kl)
        if self.kl <= self.target_kl or (not at_once and self.step < state.quiet_until):
            self.state = replace(state, over=0)
            return
        self.state = replace(state, over=state.over + 1)
        names = self.rules.actions
        order = [(state.turn + offset) % len(names) for offset in range(len(names))]
        if at_once:
            order.sort(key=lambda index: names[index] != "rollback")
        for index in order:
            name = names[index]
            if self.last and name != "rollback":
                continue
            if self.state.counts.get(name, 0) >= self.rules.most.get(name, math.inf):
                continue
            if not at_once and self.state.over < self.rules.patience.get(name, 1):
                return
            if self._take(name):
                at = self.good_step if self.actions[-1].kind == "rollback" else self.step
                quiet = at + self.rules.cooldown.get(name, 0)
                self.state = replace(self.state, turn=(index + 1) % len(names), over=0, quiet_until=quiet)
                return

    def _take(self, name: str) -> bool:
        """Takes an action; False where it is at its end."""
        return {"halve_lr": self._halve_lr, "raise_beta": self._raise_beta, "rollback": self._rollback}[name]()

    def _halve_lr(self, because: str = "", times: int = 1) -> bool:
        controls = self.state.controls
        if controls.learning_rate_scale * HALVE < LEAST_LEARNING_RATE_SCALE:
            return False
        scale = max(controls.learning_rate_scale * HALVE**times, LEAST_LEARNING_RATE_SCALE)
        old, new = (self.state.learning_rate * factor for factor in (controls.learning_rate_scale, scale))
        self._set(replace(controls, learning_rate_scale=scale))
        often = f"halved {times} times" if times > 1 else "halved"
        reason = f"{self.over}: learning rate {often} from {old:.3g} to {new:.3g}{because}"
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
            return not self.last and self._halve_lr(
                f", in place of another rollback to step {to}, which {ROLLBACKS_TO_ONE_STEP} did not help"
            )
        unchanged, asked = state.changed_at <= to, self._halvings()
        because = ": going back with the same values would end in the same place"
        if asked:
            because = f", as a KL {self.kl / self.target_kl:.3g} times the bound asks for"
        elif not unchanged:
            because = ": the bound was broken before any checkpoint held it"
        halvings = max(asked, int(unchanged or to == 0))
        if halvings and not self._halve_lr(because, halvings) and unchanged:
            return False
        # The change is in force from the checkpoint on: there is nothing new about it for a second rollback to there.
        self.state = replace(self.state, changed_at=to, rollback_step=to, rollbacks=times)
        where = f"checkpoint-{to}, the last within the bound" if to else "the start: no checkpoint held the bound"
        self._note("rollback", f"{self.over}: back to {where}", "step", self.step, to)
        return True

    def _halvings(self) -> int:
        """How often the learning rate must be halved for the KL to end below twice its aim, if it grows with the rate."""
        return max(math.floor(math.log2(self.kl / (AIM * self.target_kl))), 0) if math.isfinite(self.kl) else 0

    def _set_beta(self, kind: str, new: float, reason: str) -> None:
        old = self.state.controls.beta
        self._set(replace(self.state.controls, beta=new))
        self._note(kind, reason, "beta", old, new)

    def _set(self, controls: Controls) -> None:
        self.state = replace(self.state, controls=controls, changed_at=self.step)

    def _note(self, kind: str, reason: str, option: str, old: float, new: float) -> None:
        counts = {**self.state.counts, kind: self.state.counts.get(kind, 0) + 1}
        self.state = replace(self.state, counts=counts)
        self.actions.append(Action(kind, reason, self.kl, self.target_kl, option, old, new, self.judged_on))
