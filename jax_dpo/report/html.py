"""report.html: the page that a person reads about a run, made from its run.jsonl, in the middle of it or after."""

from __future__ import annotations

import math
import os
from pathlib import Path

from jax_dpo.report import format as fmt
from jax_dpo.report import sections, summary
from jax_dpo.report.document import document, write_page
from jax_dpo.report.kl_section import kl_detail
from jax_dpo.report.markup import Markup, el
from jax_dpo.report.records import Record, read_records
from jax_dpo.report.summary import Run, eval_value, part

PILLS = {
    summary.RUNNING: ("running", "live"),
    summary.PASSED: ("passed", "good"),
    summary.FAILED: ("gate failed", "bad"),
    summary.STOPPED: ("stopped", "warn"),
    summary.BROKEN: ("error", "bad"),
    summary.ENDED: ("ended", "quiet"),
}


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Makes `run_dir`/report.html from run.jsonl (and dropped.jsonl, where there is one), and returns its path.

    One self-contained file. It replaces the one before it in one piece, so that a browser never sees half of it.
    Raises `UserError` where run.jsonl is missing or broken, or the page cannot be written.
    """
    folder = Path(run_dir)
    run = summary.summarise(read_records(folder / "run.jsonl"))
    return write_page(folder / "report.html", page(run, folder), f"jax-dpo report {folder}")


def page(run: Run, run_dir: Path) -> str:
    """The whole page as text."""
    body = el(
        "main",
        hero(run),
        tiles(run),
        sections.gates(run),
        sections.diagnosis(run),
        sections.warnings(run),
        sections.about(run),
        sections.curves(run),
        sections.actions(run),
        sections.evaluation(run),
        kl_detail(run),
        sections.samples(run),
        sections.dropped(run, sections.read_dropped(run_dir / "dropped.jsonl")),
        sections.going_on(run, run_dir),
    )
    version = run.start.get("version")
    made = f"Made by jax_dpo {version or ''} from run.jsonl; last record {fmt.moment(run.time)}."
    return document(f"{PILLS[run.state][0]}: {_name(run)}", body, made)


def _name(run: Run) -> str:
    return str(part(run.start, "model").get("name") or "DPO run")


def hero(run: Run) -> Markup:
    word, mark = PILLS[run.state]
    begun = run.start.get("time")
    seconds = (run.end or {}).get("seconds")
    if seconds is None and begun and run.time and not run.resumes:
        seconds = run.time - begun
    meta = [f"Started {fmt.moment(begun)}" if begun else None, fmt.duration(seconds) if seconds else None]
    if run.state == summary.RUNNING:
        if run.total and run.step and seconds:
            meta.append(f"{fmt.about(seconds * (run.total - run.step) / run.step)} left")
        meta.append(f"as of {fmt.moment(run.time)}")
    elif run.total:
        meta.append(f"step {run.step:,} of {run.total:,}")
    progress = None
    if run.state in (summary.RUNNING, summary.STOPPED, summary.BROKEN) and run.total:
        done = f"{100 * run.step / run.total:.0f} %"
        progress = el("progress", done, value=min(run.step, run.total), max=run.total, aria_label="steps done")
    return el(
        "header",
        el("p", el("span", word, cls=f"pill {mark}"), el("span", "Direct Preference Optimization"), cls="eyebrow"),
        el("h1", _name(run)),
        el("p", run.headline, cls="headline"),
        progress,
        el("p", " · ".join(m for m in meta if m), cls="note"),
    )


def tiles(run: Run) -> Markup | None:
    """The four figures that say how far the policy came: at the end, and where it started."""
    if not run.evals:
        return _train_tiles(run)
    name = run.set_names[0]
    first, last = run.evals_of(name)[0], run.evals_of(name)[-1]
    bound = run.target_kl
    kl = fmt.finite(eval_value(last, "kl_divergence"))
    pairs = run.pairs_of(name)
    boxes = [
        _tile(
            "Held-out accuracy",
            summary.accuracy_text(last),
            _since(first, last, summary.accuracy_text(first)),
            _error(last, pairs),
        ),
        _tile(
            "Held-out margin",
            fmt.signed(eval_value(last, "rewards/margins")),
            _since(first, last, fmt.signed(eval_value(first, "rewards/margins"))),
        ),
        _tile(
            run.kl_title,
            fmt.number(kl),
            f"bound {bound:g} nats per token" if bound is not None else "nats per token",
            meter=_meter(kl, bound),
            over=kl is not None and bound is not None and kl > bound,
        ),
        _tile(
            "Held-out loss",
            fmt.number(eval_value(last, "loss")),
            _since(first, last, fmt.number(eval_value(first, "loss"))),
        ),
    ]
    note = (
        f"Evaluation at step {last['step']:,}"
        + (f" on {name}" if name else "")
        + (f", {pairs:,} pairs" if pairs else "")
    )
    return el("div", *boxes, el("p", note, cls="note"), cls="tiles", role="group", aria_label="Key figures")


def _train_tiles(run: Run) -> Markup | None:
    if not run.train:
        return None
    last: Record = run.train[-1]
    kl, bound = fmt.finite(last.get("kl_divergence")), run.target_kl
    over = kl is not None and bound is not None and kl > bound
    boxes = [
        _tile("Training accuracy", fmt.percent(last.get("rewards/accuracies"))),
        _tile("Training margin", fmt.signed(last.get("rewards/margins"))),
        _tile(run.kl_title, fmt.number(kl), f"bound {bound:g} nats per token" if bound else "nats per token",
              meter=_meter(kl, bound), over=over),
        _tile("Training loss", fmt.number(last.get("loss"))),
    ]  # fmt: skip
    note = f"Training batches, logged at step {last['step']:,}; nothing has been evaluated yet"
    return el("div", *boxes, el("p", note, cls="note"), cls="tiles", role="group", aria_label="Key figures")


def _tile(
    name: str,
    value: str,
    note: str | None = None,
    more: str | None = None,
    meter: Markup | None = None,
    over: bool = False,
) -> Markup:
    words = not any(c.isdigit() for c in value)
    return el(
        "div",
        el("p", name, cls="name"),
        el("p", value, cls="value" + (" bad" if over else "") + (" words" if words else "")),
        meter,
        el("p", note, cls="note") if note else None,
        el("p", more, cls="note") if more else None,
        cls="tile",
    )


def _since(first: Record, last: Record, text: str) -> str | None:
    return None if first is last else f"at step {first['step']:,}: {text}"


def _error(record: Record, pairs: int | None) -> str | None:
    """One standard error of the accuracy, so that small differences are not read as progress."""
    p = fmt.finite(eval_value(record, "rewards/accuracies"))
    if p is None or not pairs or summary.no_preference(record):
        return None
    return f"± {100 * math.sqrt(p * (1 - p) / pairs):.1f} points (one standard error)"


def _meter(kl: float | None, bound: float | None) -> Markup | None:
    """How much of the bound is used: the bar ends at twice the bound at most, the tick is the bound."""
    if kl is None or not bound:
        return None
    whole = max(1.25 * bound, min(kl, 2 * bound))
    used, tick = 100 * min(kl, whole) / whole, 100 * bound / whole
    return el(
        "svg",
        el("rect", x=0, y=2, width=100, height=4, cls="track"),
        el("rect", x=0, y=2, width=used, height=4, cls="fill over" if kl > bound else "fill"),
        el("rect", x=tick - 0.4, y=0, width=0.8, height=8, cls="tick"),
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        cls="meter",
        role="img",
        aria_label=f"KL {fmt.number(kl)} of a bound of {bound:g}",
    )
