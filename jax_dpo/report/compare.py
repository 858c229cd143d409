"""Several runs on one page, each from its run.jsonl alone: what differs, the curves over each other, the ends side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_dpo.report import format as fmt
from jax_dpo.report import summary
from jax_dpo.report.charts import Chart, Line, Series, draw
from jax_dpo.report.diagnosis import diagnose
from jax_dpo.report.document import document, write_page
from jax_dpo.report.html import PILLS
from jax_dpo.report.markup import Markup, el, join
from jax_dpo.report.records import read_records
from jax_dpo.report.sections import section, table
from jax_dpo.report.summary import Point, Run, eval_value, part

STYLES = 8
"""Curves that look different (report.css); more of them begin again."""
# Where a run lies and what it is told to does not make it another run.
PLACES = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "run_name", "report_to", "disable_tqdm")


class Named(NamedTuple):
    """A run under the name that the page gives it."""

    name: str
    run: Run

    @property
    def set(self) -> str | None:
        """The evaluation set that judges it."""
        return (self.run.verdict or {}).get("set") or next(iter(self.run.set_names), None)


def write_comparison(
    run_dirs: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str], names: Sequence[str] | None = None
) -> Path:
    """Writes one page on the runs of these directories, in their order, and returns its path.

    `names` are those that the page gives them; None: as much of their paths as tells them apart. Raises `UserError` where a
    run.jsonl is missing or broken, or the page cannot be written.
    """
    folders = [Path(folder) for folder in run_dirs]
    shown = names or names_of(folders)
    runs = [Named(n, summary.summarise(read_records(f / "run.jsonl"))) for n, f in zip(shown, folders, strict=True)]
    again = f"jax-dpo report {' '.join(str(f) for f in folders)}"
    return write_page(Path(target), page(runs), again)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The fewest last parts of the paths that tell the runs apart; a number behind those that nothing tells apart."""
    parts = [folder.absolute().parts for folder in folders]
    names: list[str] = []
    for count in range(1, 1 + max(len(p) for p in parts)):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [f"{n} ({names[: i + 1].count(n)})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def page(runs: Sequence[Named]) -> str:
    """The whole page as text."""
    body = el(
        "main",
        _hero(runs),
        _verdicts(runs),
        _ends(runs),
        _options(runs),
        _curves(runs),
        _findings(runs),
    )
    last = max((r.run.time or 0 for r in runs), default=0)
    return document(
        f"{len(runs)} runs compared", body, f"Made by jax_dpo from run.jsonl; last record {fmt.moment(last or None)}."
    )


def _hero(runs: Sequence[Named]) -> Markup:
    models = list(dict.fromkeys(str(part(r.run.start, "model").get("name") or "unknown model") for r in runs))
    return el(
        "header",
        el("p", el("span", "Direct Preference Optimization"), cls="eyebrow"),
        el("h1", f"{len(runs)} runs compared"),
        el("p", ", ".join(models), cls="headline"),
    )


def _pill(run: Run) -> Markup:
    word, mark = PILLS[run.state]
    return el("span", word, cls=f"pill {mark}")


def _verdicts(runs: Sequence[Named]) -> Markup:
    rows = [(r.name, _pill(r.run), r.run.headline) for r in runs]
    return section("verdicts", "Verdicts", table("How each run ended", ("Run", "Result", "In words"), rows, "stack"))


def _ends(runs: Sequence[Named]) -> Markup:
    """The last evaluation of each; of several sets the one that judged."""
    betas = {fmt.finite(part(r.run.start, "options").get("beta")) for r in runs}
    several = len(betas) > 1
    rows = []
    for r in runs:
        run, beta = r.run, fmt.finite(part(r.run.start, "options").get("beta"))
        last = next(iter(reversed(run.evals_of(r.set))), None) if run.evals else None
        margin, kl, bound = (
            fmt.finite(eval_value(last, "rewards/margins")),
            fmt.finite(eval_value(last, "kl_divergence")),
            run.target_kl,
        )
        over = kl is not None and bound is not None and kl > bound
        best = run.best or {}
        by_beta = [fmt.signed(None if margin is None or not beta else margin / beta, 2)] if several else []
        rows.append(
            (
                r.name,
                fmt.whole(last["step"] if last else run.step),
                fmt.number(eval_value(last, "loss")),
                summary.accuracy_text(last),
                fmt.signed(margin),
                *by_beta,
                el("span", fmt.number(kl), el("span", " over", cls="mark"), cls="bad") if over else fmt.number(kl),
                fmt.NONE if bound is None else f"{bound:g}",
                f"step {best['step']:,}, {fmt.signed(best.get('score'))}" if "step" in best else fmt.NONE,
            )
        )
    head = (
        "Run",
        "Step",
        "Loss",
        "Accuracy",
        "Margin",
        *(("Margin / beta",) if several else ()),
        "KL",
        "Bound",
        "Best checkpoint",
    )
    caption = "The last evaluation of each run, on its held-out pairs" + (
        "; margins are times a beta of their own, so margin / beta (nats) compares" if several else ""
    )
    return section("ends", "Where they ended", table(caption, head, rows, "stack"))


def different(runs: Sequence[Named]) -> list[tuple[str, list[Any]]]:
    """(name, its value in each run) of what is not the same in all: model, reference, data and options."""
    facts: list[dict[str, Any]] = []
    for r in runs:
        start = r.run.start
        data = {f"data, {name}": text for name, text in summary.data_sentences(start)}
        whole = {"model": part(start, "model").get("name"), "reference": start.get("reference"), **data}
        facts.append({**whole, **{k: v for k, v in part(start, "options").items() if k not in PLACES}})
    names = dict.fromkeys(name for fact in facts for name in fact)
    values = {name: [fact.get(name) for fact in facts] for name in names}
    return [(name, found) for name, found in values.items() if any(v != found[0] for v in found)]


def _options(runs: Sequence[Named]) -> Markup:
    rows = [(name, *(fmt.option(v) for v in values)) for name, values in different(runs)]
    if not rows:
        return section("options", "What differs", el("p", "Model, data and options are the same in all of them."))
    head = ("Option", *(r.name for r in runs))
    return section("options", "What differs", table("All else is the same in all of them", head, rows, "options stack"))


def _curves(runs: Sequence[Named]) -> Markup:
    def over(values: Callable[[Named], Sequence[Point]], dots: bool) -> list[Series]:
        return [Series(r.name, f"run{i % STYLES}", values(r), dots) for i, r in enumerate(runs)]

    def held_out(metric: str) -> list[Series]:
        return over(lambda r: r.run.eval_points(metric, r.set), True)

    def preferring(r: Named) -> list[Point]:
        """Without evaluations at which all rewards are equal: an accuracy of 0 would mislead there."""
        equal = {e["step"] for e in r.run.evals_of(r.set) if summary.no_preference(e)}
        return [p for p in r.run.eval_points("rewards/accuracies", r.set) if p[0] not in equal]

    def training(metric: str) -> list[Series]:
        return over(lambda r: r.run.train_points(metric), False)

    bounds = sorted({r.run.target_kl for r in runs if r.run.target_kl is not None})
    # One bound is shaded above; of several each is a line, since what is over one may be within another.
    limits = [Line(b, f"bound {b:g}", bound=len(bounds) == 1) for b in bounds]
    share: dict[str, Any] = {"text": fmt.percent, "axis": lambda v: f"{100 * (v or 0):.0f} %"}
    wanted = [
        Chart("eval-loss", "Held-out loss", "", held_out("loss"), several=True),
        Chart(
            "eval-margin", "Held-out margin", "", held_out("rewards/margins"), fmt.signed, from_zero=True, several=True
        ),
        Chart("eval-accuracy", "Held-out accuracy", "", over(preferring, True), **share, several=True),
        Chart(
            "eval-kl",
            "Held-out KL",
            "nats per token",
            held_out("kl_divergence"),
            lines=limits,
            from_zero=True,
            several=True,
        ),
        Chart(
            "eval-kl-on-policy",
            "KL along sampled answers",
            "nats per token",
            held_out("kl_on_policy"),
            lines=limits,
            from_zero=True,
            several=True,
        ),
        Chart("loss", "Training loss", "", training("loss"), several=True),
        Chart("margin", "Training margin", "", training("rewards/margins"), fmt.signed, from_zero=True, several=True),
        Chart("accuracy", "Training accuracy", "", training("rewards/accuracies"), **share, several=True),
        Chart(
            "kl", "Training KL", "nats per token", training("kl_divergence"), lines=limits, from_zero=True, several=True
        ),
        Chart("rate", "Learning rate", "", training("learning_rate"), fmt.power, from_zero=True, several=True),
        Chart("beta", "Beta", "", training("beta"), lambda v: fmt.number(v, 3), from_zero=True, several=True),
    ]
    drawn = [draw(c) for c in wanted if any(y is not None for s in c.series for _, y in s.points)]
    if not drawn:
        return section("curves", "Curves", el("p", "No step has been logged yet.", cls="quiet"))
    note = el("p", "Over optimizer steps.", cls="note")
    return section("curves", "Curves", note, el("div", *drawn, cls="grid"))


def _findings(runs: Sequence[Named]) -> Markup:
    rows: list[tuple[str, ...]] = []
    for r in runs:
        found = diagnose(r.run)
        rows += [
            (r.name, one.name, el("div", el("span", one.text), el("span", one.advice, cls="advice"))) for one in found
        ]
        if not found:
            rows.append((r.name, fmt.NONE, "nothing stands out"))
    head = ("Run", "Found", "What was seen, and what to change")
    failed = [
        (
            r.name,
            str(gate.get("name")),
            join(summary.gate_reason(gate), " ", el("span", str(gate.get("advice")), cls="advice")),
        )
        for r in runs
        for gate in (r.run.verdict or {}).get("gates") or []
        if gate.get("status") == "failed"
    ]
    gates = table("Gates that failed", ("Run", "Gate", "Why"), failed, "stack") if failed else None
    return section("findings", "Gates and diagnosis", gates, table("What stands out in each run", head, rows, "stack"))
