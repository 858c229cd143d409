"""What makes a run a good one: the score of a checkpoint, the best of them, and the verdict at the end.

A score is the reward margin of an evaluation if its KL is within the bound, else minus infinity. The margin must be that
of the configured beta: a beta raised on the way would raise the margin of one and the same model. Evaluations at a moving
beta say so in their `beta` field and are brought back here by the ratio of the two.

Of several evaluation sets one ranks and judges: the one that is named, else the first that was evaluated. The verdict
says which.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jax_dpo.errors import GATE_FAILED, OK, UserError
from jax_dpo.train.digest import write_json
from jax_dpo.train.disk import disk_error

PASSED, FAILED, NOT_JUDGED = "passed", "failed", "not judged"
_TITLES = {"completed": "completed", "kl": "KL", "margin": "margin", "improving": "improving"}
_SET_LOSS = re.compile(r"eval_(.+)_loss")

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What the run knows beside its evaluations; a None or 0 is not spoken of.

    Attributes:
        done, planned: optimizer steps.
        warmup_steps: of the schedule.
        all_rates_zero: no step had a learning rate above zero.
        skipped: steps left out because their gradient was not finite.
        learning_rate, beta: as configured; the advice names them, and margins are brought back to this beta.
        sync_steps: the reference moves every so many steps; margins and losses from before and after a move do not compare.
    """

    done: int = 0
    planned: int = 0
    warmup_steps: int = 0
    all_rates_zero: bool = False
    skipped: int = 0
    learning_rate: float | None = None
    beta: float | None = None
    sync_steps: int = 0

    def moved(self, entry: Entry) -> str:
        """Why the margin and the loss of an evaluation say nothing of the way from the start; empty where they do."""
        if not self.sync_steps or (entry.get("step") or 0) < self.sync_steps:
            return ""
        return f"the reference moved on the way (sync_ref_model, every {self.sync_steps} steps)"


@dataclass(frozen=True)
class Gate:
    """One condition: `value` was found, `bound` is what it is held against; a failed one has a reason and advice."""

    name: str
    status: str
    value: float | None = None
    bound: float | None = None
    reason: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """The gates of a run, its best and last checkpoint, and how the process is to end."""

    gates: tuple[Gate, ...]
    best: Mapping[str, Any] | None
    final: Mapping[str, Any]
    set: str | None
    headline: str
    exit_code: int = field(default=OK)

    @property
    def passed(self) -> bool:
        """No gate failed; one that was not judged fails nothing."""
        return all(gate.status != FAILED for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """The fields of a `verdict` record. Numbers that are not finite are null: strict JSON."""
        fields = {**asdict(self), "gates": [asdict(gate) for gate in self.gates], "passed": self.passed}
        return _finite(fields)


@dataclass(frozen=True)
class Ranking:
    """How checkpoints are compared.

    Attributes:
        target_kl: the bound, or None where there is none.
        metric: `metric_for_best_model`, with or without `eval_`; None is the score of this module.
        greater_is_better: of that metric; None: unless its name ends in "loss", as in Hugging Face's trainer.
        set: the evaluation set that ranks, None where there is only one.
        beta: the configured beta.
    """

    target_kl: float | None
    metric: str | None = None
    greater_is_better: bool | None = None
    set: str | None = None
    beta: float | None = None

    @property
    def greater(self) -> bool:
        """Whether a higher value is the better one."""
        if self.metric is None:
            return True
        return not self.metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better

    def score(self, entry: Entry) -> float:
        """The value of one evaluation.

        Raises:
            UserError: the evaluation has no such metric; names those that it has.
        """
        if self.metric is None:
            return score(margin(entry, self.set, self.beta), _value(entry, "kl_divergence", self.set), self.target_kl)
        name = self.metric.removeprefix("eval_")
        found = _value(entry, name, self.set)
        if found is None:
            prefix = f"eval_{self.set}_" if self.set else "eval_"
            known = sorted(key.removeprefix(prefix) for key in entry if key.startswith(prefix))
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                "metric-for-best-model-unknown",
                f"metric_for_best_model: an evaluation has no {self.metric}.{hint} It has: {', '.join(known)}.",
            )
        return found

    def best(self, scores: Mapping[int, float]) -> int | None:
        """The step of the best score by step; of equal ones the oldest; None where none is a number above -inf."""
        usable = {step: value for step, value in sorted(scores.items()) if math.isfinite(value)}
        if not usable:
            return None
        return max(usable, key=lambda step: usable[step] if self.greater else -usable[step])


def score(margin: float | None, kl: float | None, target_kl: float | None) -> float:
    """`margin` if `kl` is within the bound, else -inf. Without a bound, or where no exact KL was measured (None), the
    margin stands alone; a margin or KL that is not a number is -inf."""
    if margin is None or math.isnan(margin):
        return -math.inf
    if target_kl is None or kl is None:
        return margin
    return margin if kl <= target_kl else -math.inf


def margin(entry: Entry, set_name: str | None = None, beta: float | None = None) -> float | None:
    """`rewards/margins` of an evaluation at the configured `beta`, whatever beta was in force when it was made."""
    found = _value(entry, "rewards/margins", set_name)
    used = entry.get("beta")
    return found if found is None or not beta or not used else found * beta / used


def judge(
    entries: Sequence[Entry],
    *,
    completed: bool,
    target_kl: float | None,
    best: Mapping[str, Any] | None = None,
    final_step: int | None = None,
    set_name: str | None = None,
    facts: Facts | None = None,
) -> Verdict:
    """Hold a run against its gates.

    Args:
        entries: its evaluations in order, the one before step 1 first where there was one. What is not an evaluation,
            and those of other sets, are passed over, so `log_history` may be given as it is.
        completed: every planned step was done.
        target_kl: the bound in nats per token; None: KL is not judged.
        best: {step, path, score} of the best checkpoint.
        final_step: the last step; `facts.done` where it is not given.
        set_name: the evaluation set that judges; None: the first one that was evaluated.
        facts: what reasons and advice can say more about.
    """
    facts = facts or Facts()
    name = set_name or _first_set(entries)
    seen = [entry for entry in entries if _of_set(entry, name)]
    last_step = facts.done if final_step is None else final_step
    missing = "no evaluation"
    if seen and last_step > 0 and not seen[-1].get("step"):
        seen, missing = [], "no evaluation after step 0"  # what was measured is the model before it was trained
    gates = (
        _completed(completed, facts),
        _kl(seen, name, target_kl, facts, missing),
        _margin(seen, name, facts, missing),
        _improving(seen, name, facts, missing),
    )
    failed = any(gate.status == FAILED for gate in gates)
    exit_code = GATE_FAILED if failed else OK
    headline = _headline(gates, completed, best, exit_code)
    return Verdict(gates, best, {"step": last_step}, name, headline, exit_code)


def write_verdict(path: str | Path, verdict: Verdict) -> None:
    """Write `verdict.json`: whole, or not at all. Raises UserError where the disk refuses."""
    try:
        write_json(Path(path), verdict.to_dict())
    except OSError as error:
        raise disk_error(error, Path(path), "write") or error from error


def _completed(completed: bool, facts: Facts) -> Gate:
    if completed:
        left_out = f"{facts.skipped} of {facts.done} steps were skipped: not finite" if facts.skipped else ""
        return Gate("completed", PASSED, facts.done or None, facts.planned or None, left_out)
    reason = f"stopped at step {facts.done} of {facts.planned}" if facts.planned else "the run did not reach its end"
    advice = "Run the same command again with resume_from_checkpoint auto: it goes on from the last checkpoint."
    if facts.skipped:
        reason += f"; {facts.skipped} steps had a gradient that was not finite"
        advice = _stability(facts)
    return Gate("completed", FAILED, facts.done, facts.planned or None, reason, advice)


def _kl(seen: Sequence[Entry], name: str | None, target_kl: float | None, facts: Facts, missing: str) -> Gate:
    if target_kl is None:
        return Gate("kl", NOT_JUDGED, reason="target_kl is not set")
    if not seen:
        return Gate("kl", NOT_JUDGED, bound=target_kl, reason=missing)
    value = _value(seen[-1], "kl_divergence", name)
    if value is None:
        return Gate("kl", NOT_JUDGED, bound=target_kl, reason="no exact KL was measured")
    if value <= target_kl:
        return Gate("kl", PASSED, value, target_kl)
    if not math.isfinite(value):
        return Gate("kl", FAILED, value, target_kl, f"KL is {value}: training diverged", _stability(facts))
    reason = f"{_number(value, target_kl)} > {target_kl:g} nats per token at the last evaluation"
    rate, beta = _try(facts.learning_rate, 0.5), _try(facts.beta, 1.5)
    return Gate("kl", FAILED, value, target_kl, reason, f"Lower learning_rate{rate}, or raise beta{beta}.")


def _margin(seen: Sequence[Entry], name: str | None, facts: Facts, missing: str) -> Gate:
    values = [(entry.get("step", 0), margin(entry, name, facts.beta)) for entry in seen]
    values = [(step, value) for step, value in values if value is not None]
    if not values:
        return Gate("margin", NOT_JUDGED, bound=0.0, reason=missing)
    if moved := facts.moved(seen[-1]):
        return Gate("margin", NOT_JUDGED, values[-1][1], reason=moved)
    (first_step, first), (_, last) = values[0], values[-1]
    assert first is not None and last is not None
    bound, against = 0.0, "0"
    if len(values) > 1 and first > 0:
        bound, against = first, f"{first:.4g} of the first evaluation (step {first_step})"
    # With one evaluation there is only the sign to judge.
    if last > bound:
        return Gate("margin", PASSED, last, bound)
    advice = f"Check the quality of the data; a higher learning_rate{_try(facts.learning_rate, 2)} or a lower beta"
    advice = f"{advice}{_try(facts.beta, 0.5)} moves the policy further."
    if not math.isfinite(last):
        return Gate("margin", FAILED, last, bound, f"margin is {last}: training diverged", _stability(facts))
    return Gate(
        "margin", FAILED, last, bound, f"{_number(last, bound)} is not above {against}", _cause(facts) or advice
    )


def _improving(seen: Sequence[Entry], name: str | None, facts: Facts, missing: str) -> Gate:
    values = [(entry.get("step", 0), _value(entry, "loss", name)) for entry in seen]
    losses = [(step, value) for step, value in values if value is not None]
    if not losses:
        return Gate("improving", NOT_JUDGED, reason=missing)
    if len(losses) == 1:
        return Gate("improving", NOT_JUDGED, reason="one evaluation only, nothing to compare with")
    if moved := facts.moved(seen[-1]):
        return Gate("improving", NOT_JUDGED, losses[-1][1], reason=moved)
    (first_step, first), (_, last) = losses[0], losses[-1]
    if last < first:
        return Gate("improving", PASSED, last, first)
    start = "the start" if first_step == 0 else f"the first evaluation (step {first_step})"
    reason = f"evaluation loss {_number(last, first)} is not below {first:.4g} of {start}"
    return Gate("improving", FAILED, last, first, reason, _cause(facts) or _stability(facts))


def _cause(facts: Facts) -> str:
    """A cause in the schedule, if there is one: then nothing else is worth changing first."""
    if facts.all_rates_zero:
        return "Every step had a learning rate of 0: nothing was trained. Set learning_rate, or fewer warmup_steps."
    if facts.warmup_steps and facts.planned and facts.warmup_steps >= facts.planned:
        return (
            f"Warm-up ({facts.warmup_steps} steps) outlasts the run ({facts.planned} steps), so the learning rate never "
            f"reached its peak. Set warmup_steps to {max(1, facts.planned // 10)} or train longer."
        )
    return ""


def _stability(facts: Facts) -> str:
    rate = _try(facts.learning_rate, 0.5)
    return f"Lower learning_rate{rate}; more warmup_steps, a larger batch or a smaller max_grad_norm help as well."


def _headline(gates: Sequence[Gate], completed: bool, best: Any, exit_code: int) -> str:
    """One line that says how it went: "trained; gate KL failed: 0.131 > 0.1; exit 3"."""
    failed = [gate for gate in gates if gate.status == FAILED]
    open_gates = [gate for gate in gates if gate.status == NOT_JUDGED]
    head = "trained" if completed else "not completed"
    if failed:
        word = "gate" if len(failed) == 1 else "gates"
        # The unit and the place are in the reason; the line names the numbers.
        short = [gate.reason.removesuffix(" nats per token at the last evaluation") for gate in failed]
        names = " and ".join(_TITLES[gate.name] for gate in failed)
        if len(failed) > 1:
            short = [f"{_TITLES[gate.name]} {text}" for gate, text in zip(failed, short, strict=True)]
        text = f"{word} {names} failed: {'; '.join(short)}"
    elif open_gates:
        titles = ", ".join(_TITLES[gate.name] for gate in open_gates)
        text = f"no gate failed; not judged: {titles} ({open_gates[0].reason})"
    else:
        text = "all gates passed"
    where = f"; best {best['path']}" if best and not failed else ""
    return f"{head}; {text}{where}; exit {exit_code}"


def _value(entry: Entry, metric: str, set_name: str | None) -> float | None:
    for key in ((f"eval_{set_name}_{metric}",) if set_name else ()) + (f"eval_{metric}",):
        if entry.get(key) is not None:
            return float(entry[key])
        if key in entry.get("non_finite", ()):  # as run.jsonl has it: null, and named
            return math.nan
    return None


def _first_set(entries: Sequence[Entry]) -> str | None:
    for entry in entries:
        if entry.get("set"):
            return entry["set"]
        if "eval_loss" not in entry:
            named = next((match[1] for key in entry if (match := _SET_LOSS.fullmatch(key))), None)
            if named:
                return named
    return None


def _of_set(entry: Entry, name: str | None) -> bool:
    if name is None:
        return "eval_loss" in entry
    return f"eval_{name}_loss" in entry or (entry.get("set") == name and "eval_loss" in entry)


def _try(now: float | None, factor: float) -> str:
    return "" if now is None else f" (now {now:g}; try {now * factor:.2g})"


def _number(value: float, bound: float) -> str:
    """As many digits as it takes to tell a value from its bound."""
    for digits in range(3, 17):
        text = f"{value:.{digits}g}"
        if float(text) != bound:
            return text
    return repr(value)


def _finite(value: Any) -> Any:
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
