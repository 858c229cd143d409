"""What to change where a gate failed, for another attempt. Pure: (the verdict, what was tried) -> one change, or none.

The gates are asked in their order: completed, KL, margin, improving; the first that failed decides. Each has a ladder of changes, those
that its advice names, and another attempt at the same gate takes the next rung:

- numbers that were not finite, or a training loss that leaps (`loss-spikes`): halve the learning rate, double the warm-up, halve
  max_grad_norm;
- KL: halve the learning rate, raise beta by half;
- margin: double the learning rate, halve beta; none where the KL is above half of its bound: the policy moves and the margin does not,
  which is the data;
- improving: where the margin is flat (`flat-margins`) and the KL small as for the margin, else as for what is not finite.

A warm-up that outlasts the run is shortened before anything else, since the rate that was asked for was never reached. What was tried is
never tried again: a rung that leads to values which an earlier attempt had is passed over. Where nothing is left, and where a gate failed
for want of what no change brings (a learning rate of 0, steps that were not done), there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jax_dpo.train.gates import FAILED

CHANGED = ("learning_rate", "beta", "warmup_steps", "max_grad_norm")
"""The options that a change may be of."""


@dataclass(frozen=True)
class Change:
    """One option that the next attempt has another value of, and the gate that asked for it."""

    option: str
    old: float
    new: float
    gate: str
    reason: str

    @property
    def text(self) -> str:
        """In words: "learning_rate 1e-06 -> 5e-07, since gate kl failed: 0.13 > 0.1"."""
        return f"{self.option} {self.old:g} -> {self.new:g}, since gate {self.gate} failed: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `Change(**data)` is the inverse."""
        return asdict(self)


@dataclass(frozen=True)
class _Now:
    """Values in force, as the changes read them."""

    options: Mapping[str, Any]
    steps: int
    warmup: int

    def times(self, option: str, factor: float) -> tuple[str, float] | None:
        now = self.options.get(option)
        return (option, now * factor) if now else None

    def more_warmup(self) -> tuple[str, float] | None:
        """Doubled, a tenth of the run at least, half of it at most."""
        new = min(max(2 * self.warmup, self.steps // 10, 1), self.steps // 2)
        return ("warmup_steps", new) if new > self.warmup else None


Rung = Callable[[_Now], tuple[str, float] | None]
_STABLE: tuple[Rung, ...] = (
    lambda now: now.times("learning_rate", 0.5),
    lambda now: now.more_warmup(),
    lambda now: now.times("max_grad_norm", 0.5),
)
_CLOSER: tuple[Rung, ...] = (lambda now: now.times("learning_rate", 0.5), lambda now: now.times("beta", 1.5))
_FURTHER: tuple[Rung, ...] = (lambda now: now.times("learning_rate", 2.0), lambda now: now.times("beta", 0.5))


def next_change(
    verdict: Mapping[str, Any], start: Mapping[str, Any], earlier: Sequence[tuple[Change, Mapping[str, Any]]] = ()
) -> Change | None:
    """The change for the next attempt; None where no gate failed or nothing is left to change.

    Args:
      verdict: the fields of the attempt's `verdict` record.
      start: its `start` record: options and plan.
      earlier: of each attempt before it, the change that it led to, and its options.
    """
    failed = next((gate for gate in verdict.get("gates", ()) if gate.get("status") == FAILED), None)
    if failed is None or not start["options"].get("learning_rate"):
        return None
    options, plan = dict(start["options"]), start["plan"]
    now = _Now(options, int(plan["steps"]), int(plan.get("warmup_steps") or 0))
    if now.steps and now.warmup >= now.steps and failed["name"] in ("margin", "improving"):
        rungs: tuple[Rung, ...] = (lambda now: ("warmup_steps", max(1, now.steps // 10)),)
    else:
        rungs = _ladder(failed, {finding["name"] for finding in verdict.get("findings", ())}, _moved(verdict))
    turn = sum(change.gate == failed["name"] for change, _ in earlier)
    tried = [_values(options), *(_values(there) for _, there in earlier)]
    for k in range(len(rungs)):
        step = rungs[(turn + k) % len(rungs)](now)
        if step is None:
            continue
        option, new = step
        if _values({**options, option: new}) not in tried:
            return Change(option, float(options.get(option) or 0), new, failed["name"], str(failed.get("reason") or ""))
    return None


def _moved(verdict: Mapping[str, Any]) -> bool:
    """Whether the KL is above half of its bound: twice the rate would be over it, and the policy did not stand still."""
    kl: Mapping[str, Any] = next((gate for gate in verdict.get("gates", ()) if gate.get("name") == "kl"), {})
    value, bound = kl.get("value"), kl.get("bound")
    return value is not None and bound is not None and value > 0.5 * bound


def _ladder(failed: Mapping[str, Any], findings: set[str], moved: bool) -> tuple[Rung, ...]:
    name = failed["name"]
    if name == "completed":
        # Without steps that were not finite the same command goes on: nothing is wrong with the options.
        return _STABLE if "loss-spikes" in findings else ()
    if failed.get("value") is None or (name != "kl" and "loss-spikes" in findings):
        return _STABLE
    if name == "kl":
        return _CLOSER
    if name == "margin":
        return () if moved else _FURTHER
    return _FURTHER if "flat-margins" in findings and not moved else _STABLE


def _values(options: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(float(options.get(name) or 0) for name in CHANGED)
