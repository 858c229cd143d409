"""The sections of the report, each a function of the run; one that has nothing to say gives None."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_dpo.errors import named
from jax_dpo.report import format as fmt
from jax_dpo.report import summary
from jax_dpo.report.charts import Chart, Line, Marker, Series, draw
from jax_dpo.report.diagnosis import NAMES, diagnose
from jax_dpo.report.markup import Markup, el, join
from jax_dpo.report.records import Record
from jax_dpo.report.summary import Run, eval_value, part

SHOWN_ROWS = 20


def section(key: str, title: str, *children: Markup | None) -> Markup:
    return el("section", el("h2", title, id=f"{key}-title"), *children, id=key, aria_labelledby=f"{key}-title")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], cls: str = "") -> Markup:
    """A table with a caption; cells carry the name of their column, so that a narrow screen can stack them."""
    body = []
    for row in rows:
        cells = [el("th", row[0], scope="row", data_label=head[0])]
        cells += [el("td", cell, data_label=name) for name, cell in zip(head[1:], row[1:])]
        body.append(el("tr", *cells))
    top = el("tr", *(el("th", name, scope="col") for name in head))
    return el("table", el("caption", caption), el("thead", top), el("tbody", *body), cls=cls or None)


def facts(pairs: Sequence[tuple[str, str]]) -> Markup:
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in pairs), cls="facts")


def about(run: Run) -> Markup:
    start = run.start
    rows = [
        ("Model", summary.model_sentence(start)),
        ("Trained", summary.trained_sentence(start)),
        ("Reference", str(start.get("reference") or fmt.NONE)),
        *((f"Data, {name}", text) for name, text in summary.data_sentences(start)),
        *(("Order", text) for text in summary.order_sentences(start)),
        ("Devices", summary.device_sentence(start)),
        ("Plan", summary.plan_sentence(start)),
        *(("Readers", str(text)) for text in part(start, "model").get("readers") or ()),
    ]
    if run.resumes:
        rows.append(("Resumed", ", ".join(f"from {r.get('from')} at step {r['step']:,}" for r in run.resumes)))
    changed = part(start, "changed")
    count = len(changed)
    inside = (
        table(
            "Options that differ from the defaults",
            ("Option", "Value"),
            [(k, fmt.option(v)) for k, v in changed.items()],
            "options",
        )
        if changed
        else el("p", "Every option has its default.")
    )
    title = f"{count} option{'' if count == 1 else 's'} that differ{'s' if count == 1 else ''} from the defaults"
    more = el("details", el("summary", title), inside)
    return section("about", "What was trained on what", facts(rows), _buckets(start), more)


def _buckets(start: Record) -> Markup | None:
    """The buckets of a curriculum, each with its gaps."""
    order = part(start, "curriculum")
    ranges = [r for r in order.get("ranges") or () if isinstance(r, dict)]
    if not ranges:
        return None
    rows = [
        (str(i), fmt.whole(r.get("pairs")), summary.gap(r.get("widest")), summary.gap(r.get("narrowest")))
        for i, r in enumerate(ranges, 1)
    ]
    more = f", the first {len(rows)} of {fmt.whole(order['buckets'])}" if order.get("buckets", 0) > len(rows) else ""
    inside = table(f"Buckets in the order of the run{more}", ("Bucket", "Pairs", "Widest gap", "Narrowest gap"), rows)
    return el("details", el("summary", "Buckets of the curriculum and their gaps"), inside)


def warnings(run: Run) -> Markup | None:
    resumed = [w for r in run.resumes for w in r.get("warnings") or ()]
    found = list(dict.fromkeys(str(w) for w in [*(part(run.start, "plan").get("warnings") or ()), *resumed]))
    found += [summary.nonfinite_text(r) for r in run.nonfinite[:20]]
    if len(run.nonfinite) > 20:
        found.append(f"{len(run.nonfinite) - 20:,} more such steps and evaluations: run.jsonl, kind nonfinite.")
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, steps in run.not_finite().items():
        alike.setdefault(tuple(steps), []).append(name)
    for places, names in alike.items():
        first = ", ".join(f"{s:,}" for s in places[:5]) + (f" and {len(places) - 5:,} more" if len(places) > 5 else "")
        found.append(
            named(
                "metrics-not-finite",
                f"Not finite at step {first}: {', '.join(names)}. Lower the learning rate, or clip tighter (max_grad_norm).",
            )
        )
    return section("warnings", "Warnings", el("ul", *(el("li", w) for w in found))) if found else None


def gates(run: Run) -> Markup | None:
    listed = (run.verdict or {}).get("gates") or []
    if not listed:
        return None
    rows = []
    for gate in listed:
        status = str(gate.get("status"))
        mark = {"passed": "good", "failed": "bad"}.get(status, "quiet")
        why = el(
            "div",
            el("span", reason) if (reason := summary.gate_reason(gate)) else None,
            el("span", str(gate["advice"]), cls="advice") if gate.get("advice") and status == "failed" else None,
        )
        pill = el("span", status, cls=f"pill {mark}")
        rows.append(
            (
                str(gate.get("name")),
                pill,
                *(el("span", _value(gate.get(k)), cls="nowrap") for k in ("value", "bound")),
                why,
            )
        )
    head = ("Gate", "Result", "Value", "Bound", "Why")
    return section("gates", "Gates", table("What the run was judged by at its end", head, rows, "stack"))


def diagnosis(run: Run) -> Markup | None:
    """What the run suffers from; made anew from the records, so that it is there in the middle of a run and after an error too."""
    found = diagnose(run)
    if not found:
        if run.verdict is None:
            return None
        return section("diagnosis", "Diagnosis", el("p", f"None of the known diseases was found: {', '.join(NAMES)}."))
    rows = []
    for one in found:
        mark = {"serious": "bad", "warning": "warn"}.get(one.severity, "quiet")
        why = el("div", el("span", one.text), el("span", one.advice, cls="advice"))
        rows.append((one.name, el("span", one.severity, cls=f"pill {mark}"), why))
    head = ("Found", "How bad", "What was seen, and what to change")
    return section("diagnosis", "Diagnosis", table("What stands out in the numbers of the run", head, rows, "stack"))


def _value(value: Any) -> str:
    x = fmt.finite(value)
    if x is not None:
        return f"{x:,.4g}" if abs(x) < 1e6 else fmt.number(x)
    return fmt.NONE if value is None else fmt.option(value)


def markers(run: Run, *names: str) -> list[Marker]:
    """The actions on KL as events of a chart, numbered over the whole run; those named, or all."""
    numbered = enumerate(run.actions, start=1)
    return [Marker(a["step"], i, summary.action_text(a)) for i, a in numbered if not names or a.get("action") in names]


def _held_out(run: Run, metric: str) -> list[Series]:
    names = run.set_names
    series = []
    for i, name in enumerate(names):
        points = run.eval_points(metric, name)
        if metric == "rewards/accuracies":  # where all rewards are equal an accuracy says nothing
            equal = {r["step"] for r in run.evals_of(name) if summary.no_preference(r)}
            points = [p for p in points if p[0] not in equal]
        series.append(Series(name or "held-out", f"eval{i % 4}", points, dots=True))
    return series


def _train(run: Run, metric: str) -> Series:
    points = run.train_points(metric)
    if metric == "rewards/accuracies":
        equal = {r["step"] for r in run.train if r.get("rewards/margins") == 0 and not r.get(metric)}
        points = [p for p in points if p[0] not in equal]
    return Series("training", "train", points)


def charts(run: Run) -> list[Chart]:
    """The charts of a run, most telling first."""

    def both(metric: str) -> list[Series]:
        return [_train(run, metric), *_held_out(run, metric)]

    bound, options = run.target_kl, part(run.start, "options")
    limit = [] if bound is None else [Line(bound, f"bound {bound:g}", bound=True)]
    sides = [Series(side, side, run.train_points(f"rewards/{side}")) for side in ("chosen", "rejected")]
    if not any(s.points for s in sides):
        first = run.set_names[0] if run.evals else None
        sides = [Series(side, side, run.eval_points(f"rewards/{side}", first), True) for side in ("chosen", "rejected")]
    clip = fmt.finite(options.get("max_grad_norm"))
    norms = run.train_points("grad_norm")
    clipped = clip and any(y is not None and y > clip for _, y in norms)
    return [
        Chart("loss", "Loss", "", both("loss")),
        Chart("margin", "Reward margin", "", both("rewards/margins"), text=fmt.signed, from_zero=True),
        Chart(
            "accuracy",
            "Accuracy",
            "",
            both("rewards/accuracies"),
            text=fmt.percent,
            axis=lambda v: f"{100 * (v or 0):.0f} %",
            lines=[Line(0.5, "chance")],
        ),
        Chart("kl", "KL", "nats per token", both("kl_divergence"), lines=limit, markers=markers(run), from_zero=True),
        *_on_policy(run, limit),
        Chart("rewards", "Rewards", "", sides, text=fmt.signed, from_zero=True, sides=True),
        Chart("grad", "Gradient norm", "before clipping", [Series("training", "train", norms)],
              text=lambda v: fmt.number(v, 2), lines=[Line(clip or 0.0, f"clipped to {clip:g}")] if clipped else (),
              may_be_log=True),
        Chart("rate", "Learning rate", "", [_train(run, "learning_rate")], text=fmt.power,
              markers=markers(run, "halve_lr", "rollback"), from_zero=True),
        Chart("beta", "Beta", "", [_train(run, "beta")], text=lambda v: fmt.number(v, 3),
              markers=markers(run, "raise_beta", "adaptive_beta", "pi_beta", "rollback"), from_zero=True),
        *_kl_coef(run),
        Chart("speed", "Speed", "pairs per second", [_train(run, "pairs_per_second")], text=lambda v: fmt.number(v, 2),
              from_zero=True),
    ]  # fmt: skip


def _on_policy(run: Run, limit: Sequence[Line]) -> list[Chart]:
    """The KL along answers that the policy sampled, where it did; beside that along the answers of the data, where there is one set."""
    names = run.set_names
    drawn = [
        Series(name or "answers it samples", f"eval{(i if len(names) > 1 else 1) % 4}", points, dots=True)
        for i, name in enumerate(names)
        if (points := run.eval_points("kl_on_policy", name))
    ]
    if not drawn:
        return []
    if len(names) == 1:
        drawn.append(Series("answers of the data", "eval0", run.eval_points("kl_divergence", names[0]), dots=True))
    return [Chart("kl-on-policy", "KL where the policy goes", "nats per token", drawn, lines=limit, from_zero=True)]


def _kl_coef(run: Run) -> list[Chart]:
    """The penalty's weight, where a controller turned it."""
    if not any(a.get("option") == "kl_coef" for a in run.actions):
        return []
    marks = markers(run, "dual_kl_coef", "rollback")
    return [Chart("kl_coef", "KL penalty", "", [_train(run, "kl_coef")], text=fmt.power, markers=marks, from_zero=True)]


def curves(run: Run) -> Markup:
    drawn = [draw(c) for c in charts(run) if any(y is not None for s in c.series for _, y in s.points)]
    if not drawn:
        return section("curves", "Curves", el("p", "No step has been logged yet.", cls="quiet"))
    note = el("p", "Over optimizer steps. Held-out values are those of the evaluation set.", cls="note")
    return section("curves", "Curves", note, el("div", *drawn, cls="grid"))


def actions(run: Run) -> Markup | None:
    if not run.actions:
        return None
    numbered = list(enumerate(run.actions, start=1))
    shown = numbered if len(numbered) <= 2 * SHOWN_ROWS else numbered[-2 * SHOWN_ROWS :]
    rows = [
        (
            el("span", el("span", str(i), cls="badge"), f" step {a['step']:,}", cls="nowrap"),
            summary.action_text(a),
            f"{fmt.number(a.get('kl'))} (bound {_value(a.get('target_kl'))})",
            str(a.get("reason") or ""),
        )
        for i, a in shown
    ]
    caption = "The numbers are those in the curves" + ("" if len(shown) == len(numbered) else "; the last of them")
    head = ("When", "What", "KL", "Why")
    return section("actions", "What the KL control did", table(caption, head, rows, "stack"))


def evaluation(run: Run) -> Markup | None:
    if not run.evals:
        return None
    several, bound, best = len(run.set_names) > 1, run.target_kl, run.best or {}
    rows: list[Sequence[str]] = []
    for r in run.evals:
        kl = fmt.finite(eval_value(r, "kl_divergence"))
        over = kl is not None and bound is not None and kl > bound
        named = el("span", "best", cls="pill good") if r["step"] == best.get("step") else None
        row: list[str] = [join(f"{r['step']:,}", " " if named else None, named)]
        row += [fmt.plain(r.get("set") or "")] if several else []
        row += [
            fmt.number(eval_value(r, "loss")),
            fmt.signed(eval_value(r, "rewards/margins")),
            summary.accuracy_text(r),
            el("span", fmt.number(kl), el("span", " over", cls="mark"), cls="bad") if over else fmt.number(kl),
            fmt.signed(eval_value(r, "rewards/chosen")),
            fmt.signed(eval_value(r, "rewards/rejected")),
        ]
        rows.append(row)
    shown = rows if len(rows) <= 2 * SHOWN_ROWS else rows[: SHOWN_ROWS // 2] + rows[-SHOWN_ROWS * 3 // 2 :]
    head = ["Step", *(["Set"] if several else []), "Loss", "Margin", "Accuracy", "KL", "Chosen", "Rejected"]
    caption = "Held-out pairs; rewards are beta times the log-ratio to the reference"
    if len(shown) < len(rows):
        caption += f". {len(rows) - len(shown):,} rows in the middle are left out here; run.jsonl has them"
    return section("evaluation", "Evaluation", best_sentence(run), table(caption, head, shown, "numbers"))


def best_sentence(run: Run) -> Markup | None:
    """Names the best checkpoint, or says why there is none."""
    if run.best:
        path = str(run.best.get("path") or f"checkpoint-{run.best.get('step')}")
        text = f" at step {fmt.whole(run.best.get('step'))}, with a score of {fmt.signed(run.best.get('score'))}"
        return el(
            "p",
            "Best checkpoint: ",
            el("code", path),
            text,
            ". The score is the margin of a checkpoint whose KL is within its bound.",
        )
    if run.checkpoints and all(c.get("score") is None for c in run.checkpoints):
        return el("p", "No checkpoint is the best one: the KL of none of them was within its bound.")
    return None


def samples(run: Run) -> Markup | None:
    if not run.samples:
        return None
    *earlier, last = run.samples
    parts: list[Markup | None] = [_samples(last)]
    parts += [el("details", el("summary", _title(r)), _samples(r, titled=False)) for r in reversed(earlier)]
    return section("samples", "Samples", *parts)


def _title(record: Record) -> str:
    return str(record.get("title") or "Answers") + f", step {record['step']:,}"


def _samples(record: Record, titled: bool = True) -> Markup:
    cards = []
    for s in record.get("samples") or []:
        sides = [
            el("div", el("h4", name), el("p", summary.said(s.get(key)) or "(empty)", cls="text"), cls=key)
            for key, name in (("reference", "Reference"), ("policy", "Policy"))
        ]
        cards.append(
            el(
                "article",
                el("p", summary.said(s.get("prompt")), cls="prompt"),
                el("div", *sides, cls="sides"),
                cls="sample",
            )
        )
    return join(el("p", _title(record), cls="note") if titled else None, *cards)


def dropped(run: Run, rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The rows that were left out: counts by reason, and the first of them by name."""
    data = part(run.start, "data")
    sets = [("train", data.get("train")), *part(data, "eval").items()]
    counts = [
        (f"{name}", str(why), fmt.whole(n))
        for name, found in sets
        if isinstance(found, dict)
        for why, n in part(found, "dropped").items()
        if n
    ]
    if not counts and not rows:
        return None
    parts = []
    if counts:
        parts.append(table("Rows left out, by reason", ("Set", "Reason", "Rows"), counts, "narrow"))
    if rows:
        shown = [
            (fmt.option(r.get("row")), str(r.get("reason", "")), str(r.get("detail") or ""), str(r.get("file") or ""))
            for r in rows
        ]
        listing = table("The first of them, as in dropped.jsonl", ("Row", "Reason", "Detail", "File"), shown, "stack")
        parts.append(el("details", el("summary", f"The first {len(shown)} rows"), listing))
    return section("dropped", "Rows left out", *parts)


def read_dropped(path: Path, limit: int = SHOWN_ROWS) -> list[dict[str, Any]]:
    """The first rows of dropped.jsonl; none where there is no such file."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found += [row] if isinstance(row, dict) else []
            if len(found) == limit:
                break
    return found


def going_on(run: Run, run_dir: Path) -> Markup:
    """Where everything lies, and the way to use it."""
    places = []
    model = "final"
    if run.verdict and run.verdict.get("final"):
        places.append(("Final model", str(run_dir / "final")))
    if run.verdict and run.verdict.get("best"):
        places.append(("Best model", str(run_dir / "best")))
        model = "final" if run.verdict.get("passed") else "best"
    elif run.best:
        places.append(("Best checkpoint", str(run_dir / str(run.best.get("path")))))
    elif run.checkpoints:
        places.append(("Last checkpoint", str(run_dir / str(run.checkpoints[-1].get("path")))))
    places.append(("Log, all figures", str(run_dir / "run.jsonl")))
    if "tensorboard" in fmt.option(part(run.start, "options").get("report_to")):
        places.append(("TensorBoard", f"tensorboard --logdir {run_dir / 'tensorboard'}"))
    listing = facts([(name, el("code", where)) for name, where in places])
    if run.verdict is None:
        hint = "The same command goes on from the newest checkpoint with resume_from_checkpoint: auto."
        return section("next", "How to go on", listing, el("p", hint))
    base = part(run.start, "options").get("model_name_or_path") or part(run.start, "model").get("name")
    code = f"from jax_dpo import load_model\n\nmodel = load_model({str(run_dir / model)!r})"
    if run.adapter:
        code = f"from jax_dpo import load_model\n\nmodel = load_model({str(base)!r}, adapter={str(run_dir / model)!r})"
    return section("next", "How to go on", listing, el("pre", el("code", code)))
