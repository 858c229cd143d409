"""The tables and pictures of docs/kl-study.md, out of the runs of scripts/kl_study.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from jax_dpo.report.markup import Markup, el, join

BOUND = 0.1
TITLES = {
    "off": "control off",
    "actions": "actions",
    "trust_region": "trust region",
    "penalty_sequence_1": "penalty per sequence, kl_coef 1",
    "penalty_sequence_0.3": "penalty per sequence, kl_coef 0.3",
    "penalty_token_1": "penalty per token, kl_coef 1",
    "penalty_token_100": "penalty per token, kl_coef 100",
    "penalty_and_actions": "standard recipe: penalty and actions",
}
COLOURS = {"off": "#b23b3b", "actions": "#8a6d1f", "trust_region": "#1f6f8a", "penalty_and_actions": "#3c7d3c"}
OF_BETAS = ("#b23b3b", "#7a4a9e", "#d08a2e")
WIDTH, HEIGHT, GAP = 380.0, 300.0, 20.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 14.0, 34.0, 44.0


class Point(NamedTuple):
    """Answers that the policy sampled at one evaluation: KL along them (nats per answer), and minus their sentiment, each with its standard
    error."""

    step: int
    kl: float
    kl_se: float
    reward: float
    reward_se: float


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
    points: tuple[Point, ...] = ()

    @property
    def error(self) -> float:
        """The standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.pairs)


def ended(
    control: str,
    rate: float,
    beta: float,
    seed: int,
    records: Iterable[dict[str, Any]],
    score: Callable[[str], float],
) -> Ended:
    """Reads a run's log; `score` gives the sentiment of an answer."""
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
        tuple(_point(r, score) for r in kept if r["kind"] == "eval" and r.get("sampled")),
    )


def _point(record: dict[str, Any], score: Callable[[str], float]) -> Point:
    rewards = [-score(answer["answer"]) for answer in record["sampled"]]
    n, mean = len(rewards), sum(rewards) / len(rewards)
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - 1)) if n > 1 else 0.0
    kl, error = (record.get(f"eval_kl_on_policy/{name}") or 0.0 for name in ("sequence", "sequence_se"))
    return Point(record["step"], kl, error, mean, spread / math.sqrt(n))


def rate_text(rate: float) -> str:
    """A learning rate with two digits: 1.5e-4."""
    digits, power = f"{rate:.1e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def table(runs: Sequence[Ended], *, seeds: bool = False) -> str:
    """A row a run: what it ended at."""
    head = "| control | learning rate | beta |" + (" seed |" if seeds else "")
    head += " KL at the end | highest | held-out margin | held-out accuracy | actions |"
    lines = [head, "|---|---|---|" + ("---|" if seeds else "") + "---|---|---|---|---|"]
    for r in runs:
        over = "**" if r.kl > BOUND else ""
        seed = f" {r.seed} |" if seeds else ""
        what = f"{TITLES.get(r.control, r.control)} | {rate_text(r.rate)} | {r.beta:g}"
        lines.append(
            f"| {what} |{seed} {over}{r.kl:.4f}{over} | {r.highest_kl:.4f} | "
            f"{r.margin:+.3f} | {r.accuracy:.1%} +- {r.error:.1%} | {r.actions or ''} |"
        )
    return "\n".join(lines)


Scale = Callable[[float], float]


def picture(runs: Sequence[Ended]) -> str:
    """Two panels over the learning rate: the KL at the end against the bound, and the held-out accuracy with its standard error."""
    rates = sorted({r.rate for r in runs})
    kls = [r.kl for r in runs]
    down, up = math.floor(math.log10(min([*kls, BOUND]))), math.ceil(math.log10(max([*kls, BOUND])))
    decades = [(10.0**e, f"{10.0**e:g}") for e in range(down, up + 1)]
    least = math.floor(10 * min(r.accuracy - r.error for r in runs)) / 10
    shares = [(least + i / 10, f"{least + i / 10:.0%}") for i in range(round((1 - least) * 10) + 1)]
    x_ticks = [(rate, rate_text(rate)) for rate in rates]
    parts = []
    for i, (title, ticks, log) in enumerate(
        (("KL at the end, nats per token", decades, True), ("accuracy on held-out pairs", shares, False))
    ):
        left = i * (WIDTH + GAP)
        across = _scale((rates[0], rates[-1]), (left + LEFT + 8, left + WIDTH - RIGHT - 8), log=True)
        height = _scale((ticks[0][0], ticks[-1][0]), (HEIGHT - BOTTOM, TOP), log=log)
        parts.append(_frame(left, title, "learning rate", x_ticks, ticks, across, height))
        if log:
            parts.append(_bound(left, height))
        for j, control in enumerate(dict.fromkeys(r.control for r in runs)):
            mine = sorted((r for r in runs if r.control == control), key=lambda r: r.rate)
            # A little apart, so that bars do not lie on each other.
            x = [across(r.rate) + 5 * (j - 1) * (not log) for r in mine]
            y = [(r.kl, 0.0) if log else (r.accuracy, r.error) for r in mine]
            parts.append(_curve(x, y, height, COLOURS.get(control, "#444")))
            if log:
                parts.append(_label(left, j, TITLES.get(control, control), COLOURS.get(control, "#444")))
    return _svg(2 * WIDTH + GAP, parts)


def reward_picture(runs: Sequence[Ended], rate: float) -> str:
    """Reward of sampled answers over the KL along them: a curve for each beta of the run without control at `rate`, its steps in order, and
    the ends of the runs that were held."""
    free = sorted((r for r in runs if r.control == "off" and r.rate == rate), key=lambda r: r.beta)
    held = [r for r in runs if r.control != "off"]
    start = next(p for r in runs for p in r.points if p.step == 0)
    curves = [[start, *(p for p in r.points if p.step)] for r in free]
    ends = [(r, r.points[-1]) for r in held]
    points = [p for curve in curves for p in curve] + [p for _, p in ends]
    most = math.ceil(max(p.kl + p.kl_se for p in points))
    low, high = (
        math.floor(5 * min(p.reward - p.reward_se for p in points)),
        math.ceil(5 * max(p.reward + p.reward_se for p in points)),
    )
    every = max(1, round(most / 6))
    x_ticks = [(float(x), f"{x}") for x in range(0, most + 1, every)]
    y_ticks = [(y / 5, f"{y / 5:+.1f}" if y else "0") for y in range(low, high + 1)]
    width = 1.5 * WIDTH
    across = _scale((0.0, float(most)), (LEFT + 8, width - RIGHT - 8), log=False)
    height = _scale((low / 5, high / 5), (HEIGHT - BOTTOM, TOP), log=False)
    frame = _frame(
        0,
        "reward: minus the sentiment of sampled answers",
        "KL along them, nats per answer",
        x_ticks,
        y_ticks,
        across,
        height,
        width,
    )
    parts = [frame]
    for i, (run, curve) in enumerate(zip(free, curves)):
        colour = OF_BETAS[i % len(OF_BETAS)]
        parts.append(_curve([across(p.kl) for p in curve], [(p.reward, p.reward_se) for p in curve], height, colour))
        parts.append(_label(0, i, f"beta {run.beta:g}, control off", colour))
    for run, p in ends:
        x, y = across(p.kl), height(p.reward)
        shape = f"{x:.1f},{y - 7:.1f} {x + 7:.1f},{y:.1f} {x:.1f},{y + 7:.1f} {x - 7:.1f},{y:.1f}"
        title = el("title", f"{TITLES[run.control]}, beta {run.beta:g}, KL {p.kl:.2f}, reward {p.reward:+.2f}")
        bar = {"y1": f"{height(p.reward - p.reward_se):.1f}", "y2": f"{height(p.reward + p.reward_se):.1f}"}
        parts.append(el("line", x1=f"{x:.1f}", x2=f"{x:.1f}", **bar, stroke=COLOURS.get(run.control, "#444")))
        parts.append(el("polygon", title, points=shape, fill=COLOURS.get(run.control, "#444"), stroke="#ffffff"))
    for i, control in enumerate(dict.fromkeys(r.control for r in held)):
        words = f"{TITLES[control]}, at the end"
        parts.append(_label(0, len(free) + i, words, COLOURS.get(control, "#444")))
    return _svg(width, parts)


def _scale(values: tuple[float, float], places: tuple[float, float], *, log: bool) -> Scale:
    """From a value to its place; values outside lie on the edge."""
    (low, high), (a, b) = values, places

    def place(value: float) -> float:
        inside = min(max(value, low), high)
        share = math.log(inside / low) / math.log(high / low) if log else (inside - low) / (high - low)
        return a + (b - a) * share

    return place


def _svg(width: float, parts: Sequence[Markup]) -> str:
    body = el(
        "svg",
        el("rect", width=width, height=HEIGHT, fill="#ffffff"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {HEIGHT:g}",
        role="img",
        font_family="system-ui, sans-serif",
        font_size="12",
    )
    return str(body) + "\n"


def _frame(
    left: float,
    title: str,
    below: str,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    across: Scale,
    height: Scale,
    width: float = WIDTH,
) -> Markup:
    parts = [el("text", title, x=left + LEFT, y=18, font_weight="600", fill="#222")]
    for value, text in y_ticks:
        y = height(value)
        ends = {"x1": left + LEFT, "x2": left + width - RIGHT, "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
        parts.append(el("line", **ends, stroke="#ddd"))
        parts.append(el("text", text, x=left + LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end", fill="#555"))
    for value, text in x_ticks:
        parts.append(el("text", text, x=f"{across(value):.1f}", y=HEIGHT - 26, text_anchor="middle", fill="#555"))
    middle = left + LEFT + (width - LEFT - RIGHT) / 2
    parts.append(el("text", below, x=middle, y=HEIGHT - 8, text_anchor="middle", fill="#555"))
    return join(*parts)


def _bound(left: float, height: Scale) -> Markup:
    y = height(BOUND)
    ends = {"x1": left + LEFT, "x2": left + WIDTH - RIGHT, "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
    line = el("line", **ends, stroke="#222", stroke_dasharray="5 4")
    return join(line, el("text", "bound", x=left + WIDTH - RIGHT, y=f"{y - 5:.1f}", text_anchor="end", fill="#222"))


def _curve(x: Sequence[float], y: Sequence[tuple[float, float]], height: Scale, colour: str) -> Markup:
    """A line through the points, each with the bar of its standard error."""
    places = [(a, height(value)) for a, (value, _) in zip(x, y)]
    parts = [
        el("line", x1=f"{a:.1f}", y1=f"{b:.1f}", x2=f"{c:.1f}", y2=f"{d:.1f}", stroke=colour, stroke_width="2")
        for (a, b), (c, d) in pairwise(places)
    ]
    for (a, b), (value, error) in zip(places, y):
        parts.append(el("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r="3.5", fill=colour))
        if error:
            ends = {"y1": f"{height(value - error):.1f}", "y2": f"{height(value + error):.1f}"}
            parts.append(el("line", x1=f"{a:.1f}", x2=f"{a:.1f}", **ends, stroke=colour))
    return join(*parts)


def _label(left: float, line: int, text: str, colour: str, top: float = TOP) -> Markup:
    return el("text", text, x=left + LEFT + 8, y=top + 14 + 15 * line, fill=colour)
