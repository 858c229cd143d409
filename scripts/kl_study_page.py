"""docs/kl-study.md and docs/kl-study.svg out of the runs of scripts/kl_study.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jax_dpo.report.markup import Markup, el, join

BOUND = 0.1
TITLES = {
    "off": "control off",
    "actions": "actions",
    "trust_region": "trust region",
}
COLOURS = {"off": "#b23b3b", "actions": "#8a6d1f", "trust_region": "#1f6f8a"}
WIDTH, HEIGHT, GAP = 380.0, 300.0, 20.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 14.0, 34.0, 44.0


@dataclass(frozen=True)
class Ended:
    """What a run came to on the held-out pairs. `highest_kl` is that of all its evaluations, those rolled back left out."""

    control: str
    rate: float
    beta: float
    seed: int
    pairs: int
    kl: float
    highest_kl: float
    margin: float
    accuracy: float
    best: dict[str, Any] | None
    actions: int

    @property
    def error(self) -> float:
        """The standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.pairs)


def ended(control: str, rate: float, beta: float, seed: int, records: Iterable[dict[str, Any]]) -> Ended:
    """Reads a run's log."""
    kept = list(records)
    evaluations = [r for r in kept if r["kind"] == "eval" and r["step"]]
    last, start = evaluations[-1], next(r for r in kept if r["kind"] == "start")
    verdict = next((r for r in reversed(kept) if r["kind"] == "verdict"), {})
    return Ended(
        control,
        rate,
        beta,
        seed,
        sum(counts["kept"] for counts in start["data"]["eval"].values()),
        last["eval_kl_divergence"],
        max(r["eval_kl_divergence"] for r in evaluations),
        last["eval_rewards/margins"],
        last["eval_rewards/accuracies"],
        verdict.get("best"),
        sum(r["kind"] == "kl_action" for r in kept),
    )


def table(runs: Sequence[Ended], *, seeds: bool = False) -> str:
    """A row a run: what it ended at."""
    head = "| control | learning rate | beta |" + (" seed |" if seeds else "")
    head += " KL at the end | highest | held-out margin | held-out accuracy | actions |"
    lines = [head, "|---|---|---|" + ("---|" if seeds else "") + "---|---|---|---|---|"]
    for r in runs:
        over = "**" if r.kl > BOUND else ""
        seed = f" {r.seed} |" if seeds else ""
        lines.append(
            f"| {TITLES.get(r.control, r.control)} | {r.rate:g} | {r.beta:g} |{seed} {over}{r.kl:.4f}{over} | {r.highest_kl:.4f} | "
            f"{r.margin:+.3f} | {r.accuracy:.1%} +- {r.error:.1%} | {r.actions or ''} |"
        )
    return "\n".join(lines)


def picture(runs: Sequence[Ended]) -> str:
    """Two panels over the learning rate: the KL at the end against the bound, and the held-out accuracy with its standard error."""
    rates = sorted({r.rate for r in runs})
    kls = [r.kl for r in runs]
    low, high = 10 ** math.floor(math.log10(min([*kls, BOUND]))), 10 ** math.ceil(math.log10(max([*kls, BOUND])))
    least = math.floor(10 * min(r.accuracy - r.error for r in runs)) / 10
    whole = 2 * WIDTH + GAP
    parts = [
        el("rect", width=whole, height=HEIGHT, fill="#ffffff"),
        _panel(
            0, "KL at the end, nats per token", runs, rates, (low, high), True, lambda r: (r.kl, 0.0), "{:g}".format
        ),
        _panel(
            WIDTH + GAP,
            "accuracy on held-out pairs",
            runs,
            rates,
            (least, 1.0),
            False,
            lambda r: (r.accuracy, r.error),
            "{:.0%}".format,
        ),
    ]
    body = el(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {whole:g} {HEIGHT:g}",
        role="img",
        font_family="system-ui, sans-serif",
        font_size="12",
    )
    return str(body) + "\n"


def _panel(
    x0: float,
    title: str,
    runs: Sequence[Ended],
    rates: Sequence[float],
    span: tuple[float, float],
    log: bool,
    value: Callable[[Ended], tuple[float, float]],
    text: Callable[[float], str],
) -> Markup:
    down, up = span
    place = lambda v, a, b: (math.log(v / a) / math.log(b / a)) if log else (v - a) / (b - a)  # noqa: E731
    across = lambda rate: (  # noqa: E731
        x0 + LEFT + (WIDTH - LEFT - RIGHT) * math.log(rate / rates[0]) / math.log(rates[-1] / rates[0])
    )
    height = lambda v: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * place(min(max(v, down), up), down, up)  # noqa: E731
    ticks = [10.0**e for e in range(round(math.log10(down)), round(math.log10(up)) + 1)]
    if not log:
        ticks = [down + i * 0.1 for i in range(round((up - down) / 0.1) + 1)]
    parts = [el("text", title, x=x0 + LEFT, y=18, font_weight="600", fill="#222")]
    for tick in ticks:
        y = height(tick)
        parts += [
            el("line", x1=x0 + LEFT, x2=x0 + WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", stroke="#ddd"),
            el("text", text(tick), x=x0 + LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end", fill="#555"),
        ]
    for rate in rates:
        parts.append(el("text", f"{rate:g}", x=f"{across(rate):.1f}", y=HEIGHT - 26, text_anchor="middle", fill="#555"))
    middle = x0 + LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(el("text", "learning rate", x=f"{middle:.1f}", y=HEIGHT - 8, text_anchor="middle", fill="#555"))
    if log:
        y = height(BOUND)
        parts += [
            el(
                "line",
                x1=x0 + LEFT,
                x2=x0 + WIDTH - RIGHT,
                y1=f"{y:.1f}",
                y2=f"{y:.1f}",
                stroke="#222",
                stroke_dasharray="5 4",
            ),
            el("text", "bound", x=x0 + WIDTH - RIGHT, y=f"{y - 5:.1f}", text_anchor="end", fill="#222"),
        ]
    for i, control in enumerate(dict.fromkeys(r.control for r in runs)):
        mine = sorted((r for r in runs if r.control == control), key=lambda r: r.rate)
        # A little apart, so that bars do not lie on each other.
        points = [(across(r.rate) + 5 * (i - 1) * (not log), *value(r)) for r in mine]
        colour = COLOURS.get(control, "#444")
        line = " ".join(f"{x:.1f},{height(v):.1f}" for x, v, _ in points)
        parts.append(el("polyline", points=line, fill="none", stroke=colour, stroke_width="2"))
        for x, v, error in points:
            parts.append(el("circle", cx=f"{x:.1f}", cy=f"{height(v):.1f}", r="3.5", fill=colour))
            if error:
                ends = {"y1": f"{height(v - error):.1f}", "y2": f"{height(v + error):.1f}"}
                parts.append(el("line", x1=f"{x:.1f}", x2=f"{x:.1f}", **ends, stroke=colour))
        label = {"x": x0 + LEFT + 8, "y": TOP + 14 + 15 * i} if log else None
        if label:
            parts.append(el("text", TITLES.get(control, control), **label, fill=colour))
    return join(*parts)
