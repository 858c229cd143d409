"""The verdict at the end of a run: its gates, and what to change where one failed.

Of several evaluation sets one judges: the one that is named, else the first that was evaluated. The verdict says which.

- **completed**: every planned step was done.
- **kl**: the KL of the last evaluation is within the bound. A bound is held or not: no trend softens it.
- **margin**: the reward margin is positive and higher than at the first evaluation (bar: the larger of 0 and the first one).
- **improving**: the evaluation loss is below that of the start (bar: the first evaluation's).

The last two speak of where the run has come to, of which the last evaluation is one sample. With three evaluations or more a line is
fitted through all of them by least squares (`report/trend.py`), and its slope, with its standard error, stands beside the gate. The last
evaluation decides, but:

- It is beyond the bar, and yet the line goes the wrong way and ends on the wrong side of it: **failed**, this one evaluation was luck.
- It misses the bar, but five evaluations or more say that this is noise: **passed**. All three must hold: it lies within two standard
  deviations of what the line through those before it foretells (so a real collapse, which leaves that line, fails); that line foretells
  a value beyond the bar; and the line through all of them, this one included, ends beyond the bar by more than its own standard error.

Two standard deviations are the usual 95 %. Five, since a line through three points knows its scatter from one of them only. With two
evaluations there are the two points. All are made on the same held-out pairs, so what scatters is the model on its way, not the pairs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jax_dpo.errors import GATE_FAILED, OK
from jax_dpo.report.diagnosis import Finding
from jax_dpo.report.diseases import LEAST_GAIN
from jax_dpo.report.trend import Trend, fit
from jax_dpo.train.digest import write_json
from jax_dpo.train.disk import disk_error
from jax_dpo.train.ranking import Entry, margin, value_of

PASSED, FAILED, NOT_JUDGED = "passed", "failed", "not judged"
_TITLES = {"completed": "completed", "kl": "KL", "margin": "margin", "improving": "improving"}
_SET_LOSS = re.compile(r"eval_(.+)_loss")
LEAST_FOR_NOISE = 5
"""evaluations from which on the last one may be called noise"""


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
    """One condition: `value` was found, `bound` is what it is held against; a failed one has a reason and advice.

    `slope` is that of the line through the evaluations, per step, `slope_error` its standard error; None where there is no line, or
    only two points.
    """

    name: str
    status: str
    value: float | None = None
    bound: float | None = None
    reason: str = ""
    advice: str = ""
    slope: float | None = None
    slope_error: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The gates of a run, its best and last checkpoint, how the process is to end, and what else was found (`report/diagnosis.py`)."""

    gates: tuple[Gate, ...]
    best: Mapping[str, Any] | None
    final: Mapping[str, Any]
    set: str | None
    headline: str
    exit_code: int = field(default=OK)
    findings: tuple[Finding, ...] = ()

    @property
    def passed(self) -> bool:
        """No gate failed; one that was not judged fails nothing."""
        return all(gate.status != FAILED for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """The fields of a `verdict` record. Numbers that are not finite are null: strict JSON."""
        fields = {**asdict(self), "gates": [asdict(gate) for gate in self.gates], "passed": self.passed}
        return _finite(fields)


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
    value = value_of(seen[-1], "kl_divergence", name)
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
    points = [(entry.get("step", 0), value) for entry in seen if (value := margin(entry, name, facts.beta)) is not None]
    if not points:
        return Gate("margin", NOT_JUDGED, bound=0.0, reason=missing)
    (first_step, first), (_, last) = points[0], points[-1]
    if moved := facts.moved(seen[-1]):
        return Gate("margin", NOT_JUDGED, last, reason=moved)
    bar, against = 0.0, "0"
    if len(points) > 1 and first > 0:
        bar, against = first, f"{first:.4g} of the first evaluation (step {first_step})"
    # With one evaluation there is only the sign to judge.
    found = _settle(points, bar, up=True)
    if found.passed:
        return found.gate("margin", last, bar, found.noise)
    if not math.isfinite(last):
        return found.gate("margin", last, bar, f"margin is {last}: training diverged", _stability(facts))
    reason = found.luck or f"{_number(last, bar)} is not above {against}"
    return found.gate("margin", last, bar, reason, _cause(facts) or _further(facts))


def _improving(seen: Sequence[Entry], name: str | None, facts: Facts, missing: str) -> Gate:
    points = [(entry.get("step", 0), value) for entry in seen if (value := value_of(entry, "loss", name)) is not None]
    if not points:
        return Gate("improving", NOT_JUDGED, reason=missing)
    if len(points) == 1:
        return Gate("improving", NOT_JUDGED, reason="one evaluation only, nothing to compare with")
    (first_step, first), (_, last) = points[0], points[-1]
    if moved := facts.moved(seen[-1]):
        return Gate("improving", NOT_JUDGED, last, reason=moved)
    found = _settle(points, first, up=False)
    if found.passed:
        return found.gate("improving", last, first, found.noise)
    start = "the start" if first_step == 0 else f"the first evaluation (step {first_step})"
    reason = found.luck or f"evaluation loss {_number(last, first)} is not below {first:.4g} of {start}"
    margins = [value for entry in seen if (value := margin(entry, name, facts.beta)) is not None]
    still = len(margins) > 1 and abs(margins[-1] - margins[0]) < LEAST_GAIN
    return found.gate("improving", last, first, reason, _cause(facts) or (_further if still else _stability)(facts))


@dataclass(frozen=True)
class _Settled:
    """Whether the run has come beyond a bar; `luck` and `noise` say why the last evaluation alone did not decide."""

    passed: bool
    trend: Trend | None
    luck: str = ""
    noise: str = ""

    def gate(self, name: str, value: float, bound: float, reason: str = "", advice: str = "") -> Gate:
        slope, error = (None, None) if self.trend is None else (self.trend.slope, self.trend.slope_error)
        return Gate(name, PASSED if self.passed else FAILED, value, bound, reason, advice, slope, error)


def _settle(points: Sequence[tuple[float, float]], bar: float, *, up: bool) -> _Settled:
    """The rule at the head of this module, for (step, value) of every evaluation; `up`: beyond the bar is above it."""
    sign = 1.0 if up else -1.0
    beyond = lambda value: sign * (value - bar)  # noqa: E731
    step, last = points[-1]
    known = [point for point in points if math.isfinite(point[1])]
    line = fit(known)
    if not math.isfinite(last) or line is None or line.count < 3:
        return _Settled(beyond(last) > 0, line)
    side, way = ("below", "falls") if up else ("above", "rises")
    end = line.at(step)
    if beyond(last) > 0:
        if sign * line.slope >= 0 or beyond(end) > 0:
            return _Settled(True, line)
        luck = (
            f"the line through {line.count} evaluations {way} ({line.text}) and ends at {_number(end, bar)}, {side} {bar:.4g}: "
            f"the last one alone, {_number(last, bar)}, is not"
        )
        return _Settled(False, line, luck=luck)
    before = fit(known[:-1])
    if line.count < LEAST_FOR_NOISE or before is None:
        return _Settled(False, line)
    foretold, wide = before.at(step), 2 * before.error_of_one_at(step)
    if abs(last - foretold) > wide or beyond(foretold) <= 0 or beyond(end) <= line.error_at(step):
        return _Settled(False, line)
    noise = (
        f"the last evaluation, {_number(last, bar)}, is within the noise of those before it ({foretold:.3g} ± {wide:.2g}); the line "
        f"through all {line.count} ends at {_number(end, bar)} ± {line.error_at(step):.2g}"
    )
    return _Settled(True, line, noise=noise)


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


def _further(facts: Facts) -> str:
    rate, beta = _try(facts.learning_rate, 2), _try(facts.beta, 0.5)
    return (
        f"Check the quality of the data; a higher learning_rate{rate} or a lower beta{beta} moves the policy further."
    )


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
