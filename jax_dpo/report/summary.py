"""What the records of a run add up to: the one reading that terminal, report and model card share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_dpo.errors import named
from jax_dpo.report import format as fmt
from jax_dpo.report.records import Record
from jax_dpo.report.trend import slope_text

Point = tuple[float, float | None]

# How a run stands. A log without an end may belong to a run that goes on, or to one that was killed: it looks the same.
RUNNING, PASSED, FAILED, STOPPED, BROKEN, ENDED = "running", "passed", "failed", "stopped", "broken", "ended"


@dataclass(frozen=True)
class Run:
    """The records of a run by kind. Of each step (and evaluation set) only the last record counts.

    `verdict` and `end` are those of the last start or resumption; before it they speak of an earlier part of the run.
    """

    records: Sequence[Record]
    start: Record
    train: list[Record]
    evals: list[Record]
    nonfinite: list[Record]
    actions: list[Record]
    checkpoints: list[Record]
    samples: list[Record]
    resumes: list[Record]
    verdict: Record | None
    end: Record | None

    @property
    def step(self) -> int:
        """The last step that anything is known of."""
        return max((r["step"] for r in (*self.train, *self.evals, *self.checkpoints)), default=0)

    @property
    def total(self) -> int | None:
        steps = part(self.start, "plan").get("steps")
        return int(steps) if steps else None

    @property
    def time(self) -> float | None:
        """When the last record was written, in unix seconds."""
        return self.records[-1].get("time") if self.records else None

    @property
    def target_kl(self) -> float | None:
        """The bound that KL is held at, in nats per token."""
        for place in (part(self.start, "options"), *reversed(self.actions)):
            if fmt.finite(place.get("target_kl")) is not None:
                return float(place["target_kl"])
        return None

    @property
    def kl_title(self) -> str:
        """What the KL is measured against."""
        moved = part(self.start, "options").get("sync_ref_model")
        return "KL to the moved reference" if moved else "KL to the reference"

    @property
    def adapter(self) -> bool:
        """Whether only adapters are trained."""
        model = part(self.start, "model")
        some = model.get("trainable_parameters")
        return bool(part(self.start, "options").get("use_peft")) or (
            some is not None and some != model.get("parameters")
        )

    @property
    def state(self) -> str:
        if self.verdict is not None:
            return PASSED if self.verdict.get("passed") else FAILED
        if self.end is None:
            return RUNNING
        return {"signal": STOPPED, "error": BROKEN}.get(str(self.end.get("reason")), ENDED)

    @property
    def headline(self) -> str:
        """One line: the verdict, or how far the run is."""
        where = f"step {self.step:,}" + (f" of {self.total:,}" if self.total else "")
        if self.verdict is not None:
            passed = "trained; every gate that was judged passed" if self.verdict.get("passed") else "a gate failed"
            return str(self.verdict.get("headline") or passed)
        return {
            RUNNING: f"running, {where}",
            STOPPED: f"stopped by a signal at {where}; run it again to go on",
            BROKEN: f"ended by an error at {where}",
        }.get(self.state, f"ended at {where}")

    @property
    def set_names(self) -> list[str | None]:
        """The evaluation sets in the order in which they were first evaluated; None is the only, unnamed one."""
        return list(dict.fromkeys(r.get("set") for r in self.evals))

    def evals_of(self, name: str | None) -> list[Record]:
        return [r for r in self.evals if r.get("set") == name]

    def pairs_of(self, name: str | None) -> int | None:
        """How many pairs an evaluation set has."""
        sets = part(part(self.start, "data"), "eval")
        kept = part(sets, name or next(iter(sets), "")).get("kept")
        return int(kept) if kept else None

    @property
    def best(self) -> dict[str, Any] | None:
        """`step`, `path` and `score` of the best checkpoint."""
        if self.verdict is not None:
            best = self.verdict.get("best")
            return best if isinstance(best, dict) else None
        return next((c for c in reversed(self.checkpoints) if c.get("best")), None)

    def train_points(self, metric: str) -> list[Point]:
        """The curve of a training metric; null where it was not finite."""
        return [(r["step"], fmt.finite(r.get(metric))) for r in self.train if metric in r]

    def eval_points(self, metric: str, name: str | None) -> list[Point]:
        found = [(r["step"], r) for r in self.evals_of(name)]
        return [(step, fmt.finite(eval_value(r, metric))) for step, r in found if eval_key(r, metric) is not None]

    def not_finite(self) -> dict[str, list[int]]:
        """The steps at which a metric was not finite, by the name of the metric."""
        steps: dict[str, list[int]] = {}
        for record in (*self.train, *self.evals):
            for name in record.get("non_finite", ()):
                steps.setdefault(name, []).append(record["step"])
        return steps


def summarise(records: Iterable[Record]) -> Run:
    """Sorts the records of a run.jsonl into a `Run`."""
    everything = list(records)
    begun = max((i for i, r in enumerate(everything) if r.get("kind") in ("start", "resume")), default=-1)
    now = everything[begun + 1 :]

    def of(kind: str, among: Sequence[Record] = everything) -> list[Record]:
        return [r for r in among if r.get("kind") == kind]

    train = {r["step"]: r for r in of("train")}
    evals = {(r["step"], str(r.get("set") or "")): r for r in of("eval")}
    checkpoints = {r["step"]: r for r in of("checkpoint")}
    samples = {(r["step"], r.get("title")): r for r in of("samples")}
    return Run(
        records=everything,
        start=next(iter(reversed(of("start"))), {}),
        train=[train[k] for k in sorted(train)],
        evals=[evals[k] for k in sorted(evals, key=lambda k: k[0])],
        nonfinite=of("nonfinite"),
        actions=of("kl_action"),
        checkpoints=[checkpoints[k] for k in sorted(checkpoints)],
        samples=list(samples.values()),
        resumes=of("resume"),
        verdict=next(iter(reversed(of("verdict", now))), None),
        end=next(iter(reversed(of("end", now))), None),
    )


def part(record: Record, name: str) -> dict[str, Any]:
    """A nested object of a record; empty where it is not there."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def eval_key(record: Record, metric: str) -> str | None:
    """The key of a metric in an evaluation record, with or without the name of its set."""
    named = f"eval_{record.get('set')}_{metric}"
    return (
        named if record.get("set") and named in record else next((k for k in (f"eval_{metric}",) if k in record), None)
    )


def eval_value(record: Record | None, metric: str) -> Any:
    """The value of a metric in an evaluation record, or None."""
    key = eval_key(record, metric) if record else None
    return record[key] if record and key else None


def no_preference(record: Record | None) -> bool:
    """Whether all rewards are equal, as at a start from the reference itself: an accuracy of 0 would then mislead."""
    accuracy = eval_value(record, "rewards/accuracies")
    return eval_value(record, "rewards/margins") == 0 and (accuracy is None or accuracy == 0)


def accuracy_text(record: Record | None) -> str:
    """The accuracy of an evaluation in words."""
    if record is None:
        return fmt.NONE
    return "no preference yet" if no_preference(record) else fmt.percent(eval_value(record, "rewards/accuracies"))


def on_policy_text(record: Record | None) -> str:
    """The KL per token along sampled answers with its standard error; empty where nothing was sampled."""
    if eval_key(record or {}, "kl_on_policy") is None:
        return ""
    error = fmt.finite(eval_value(record, "kl_on_policy/se"))
    return fmt.number(eval_value(record, "kl_on_policy")) + ("" if error is None else f" ± {fmt.number(error)}")


def nonfinite_text(record: Record) -> str:
    """What was not finite, where, and what was done."""
    step, rows, what = record.get("step"), record.get("rows"), record.get("what")
    if what == "evaluation":
        where = "" if step is None else f"step {fmt.whole(step)}: "
        return named(
            "evaluation-not-finite", f"{where}held-out pairs whose numbers are not finite, counted all the same: {rows}"
        )
    made = f"the pairs that made it: {rows}" if what == "loss" else f"no pair is faulty by itself; its pairs: {rows}"
    return named("step-skipped", f"step {fmt.whole(step)} skipped: its {what} is not finite ({made})")


def action_text(action: Record) -> str:
    """What an action on KL changed, in a few words."""
    name, old, new = action.get("action"), action.get("old"), action.get("new")
    if name == "rollback":
        return f"rolled back from step {fmt.whole(old)} to step {fmt.whole(new)}"
    words = {"halve_lr": "learning rate halved", "raise_beta": "beta raised"}.get(str(name))
    controlled = {
        "adaptive_beta": "adaptive beta",
        "pi_beta": "PI control: beta",
        "dual_kl_coef": "dual update: kl_coef",
    }
    if name in controlled:
        rose = (fmt.finite(new) or 0) >= (fmt.finite(old) or 0)
        words = f"{controlled[str(name)]} {'raised' if rose else 'lowered'}"
    return f"{words or fmt.plain(name)}, {fmt.power(old)} to {fmt.power(new)}"


def gate_reason(gate: Mapping[str, Any]) -> str:
    """Why a gate came out as it did, and which way its evaluations went."""
    slope, error = fmt.finite(gate.get("slope")), fmt.finite(gate.get("slope_error"))
    trend = "" if slope is None else f"trend {slope_text(slope, error)}"
    return "; ".join(text for text in (str(gate.get("reason") or ""), trend) if text)


def said(value: Any) -> str:
    """A prompt or an answer as text; a conversation line by line."""
    if isinstance(value, list):
        turns = [m for m in value if isinstance(m, Mapping)]
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in turns)
    return "" if value is None else fmt.plain(value)


def model_sentence(start: Record) -> str:
    """The model in one line: name, family, size and number formats."""
    model = part(start, "model")
    dtype, compute = model.get("dtype"), model.get("compute_dtype")
    facts = [str(model.get("family") or ""), f"{fmt.amount(model.get('parameters'))} parameters", str(dtype or "")]
    if compute and compute != dtype:
        facts.append(f"computed in {compute}")
    return f"{fmt.plain(model.get('name', 'unknown model'))} ({', '.join(f for f in facts if f)})"


def trained_sentence(start: Record) -> str:
    """Which part of the parameters is trained."""
    model = part(start, "model")
    everything, some = model.get("parameters"), model.get("trainable_parameters")
    if some is None or some == everything:
        return f"all {fmt.amount(everything)} parameters"
    return f"adapters only: {fmt.amount(some)} of {fmt.amount(everything)} parameters ({fmt.share(some, everything)})"


def device_sentence(start: Record) -> str:
    """The devices and how they are laid out."""
    devices = part(start, "devices")
    count = devices.get("count") or 1
    mesh = " x ".join(f"{axis} {size}" for axis, size in part(devices, "mesh").items())
    kind, platform = str(devices.get("kind") or ""), str(devices.get("platform") or "")
    name = kind if kind.lower().startswith(platform.lower()) else f"{platform} {kind}"
    text = f"{fmt.whole(count)} x {fmt.plain(name).strip() or 'device'}"
    if (devices.get("hosts") or 1) > 1:
        text += f" on {fmt.whole(devices['hosts'])} hosts"
    return f"{text}, mesh {mesh}" if mesh and count > 1 else text


def data_sentences(start: Record) -> list[tuple[str, str]]:
    """The data sets: (what it is for, a sentence with its rows)."""
    data = part(start, "data")
    evals = data.get("eval") if isinstance(data.get("eval"), dict) else {}
    sets = [("train", data.get("train"))]
    sets += [("held-out" if name == "eval" else f"held-out {name}", facts) for name, facts in (evals or {}).items()]
    return [(name, _rows(facts)) for name, facts in sets if isinstance(facts, dict)]


def _rows(facts: dict[str, Any]) -> str:
    rows, kept = facts.get("rows"), facts.get("kept")
    text = f"{fmt.plain(facts.get('name', ''))}: {fmt.whole(kept)} pairs"
    if rows != kept:
        dropped = ", ".join(f"{fmt.whole(n)} {why}" for why, n in part(facts, "dropped").items() if n)
        text += f" of {fmt.whole(rows)} rows" + (f" (dropped: {dropped})" if dropped else "")
    if facts.get("cut"):
        text += f", {fmt.whole(facts['cut'])} cut to fit"
    return text


def order_sentences(start: Record) -> list[str]:
    """The order of a curriculum in one sentence; nothing where the order is another."""
    order = part(start, "curriculum")
    if not order:
        return []
    count, ranges = order.get("buckets") or 1, [r for r in order.get("ranges") or () if isinstance(r, dict)]
    most = max((r.get("pairs") or 0 for r in ranges), default=0)
    text = (
        f"easy to hard by {fmt.plain(order.get('source') or fmt.NONE)}, gaps from {gap(order.get('widest'))} to "
        f"{gap(order.get('narrowest'))} in {fmt.whole(count)} bucket{'s' * (count > 1)} of {fmt.whole(most)} pairs"
    )
    later = "random" if order.get("later_epochs") == "random" else "the same, shuffled anew inside the buckets"
    return [f"{text}; epochs after the first: {later}"]


def gap(value: Any) -> str:
    """The gap of a pair, four significant digits."""
    x = fmt.finite(value)
    return fmt.NONE if x is None else f"{x:.4g}"


def plan_sentence(start: Record) -> str:
    """The plan of the run in one line."""
    plan = part(start, "plan")
    steps, epochs = plan.get("steps"), fmt.finite(plan.get("epochs"))
    pieces = [f"{fmt.whole(steps)} steps of {fmt.whole(plan.get('pairs_per_step'))} pairs"]
    if epochs is not None:
        pieces[0] += f" = {epochs:.2f} epochs"
    if plan.get("warmup_steps"):
        pieces.append(f"{fmt.whole(plan['warmup_steps'])} warm-up steps")
    if plan.get("row_tokens"):
        pieces.append(f"rows of {fmt.whole(plan['row_tokens'])} tokens")
    if plan.get("row_fill"):
        pieces.append(f"{fmt.percent(plan['row_fill'])} of them real")
    return ", ".join(pieces)
