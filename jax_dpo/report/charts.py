"""Curves as SVG, drawn here so that a page shows them without a script, a network or a font of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from jax_dpo.report import format as fmt
from jax_dpo.report.markup import Markup, el, join
from jax_dpo.report.summary import Point

# The view box, in its own units: about one pixel each in three columns on a desk, a little less on a phone.
WIDTH, HEIGHT = 360.0, 204.0
_TOP, _RIGHT, _BOTTOM = 20.0, 10.0, 24.0
_CHARACTER = 6.7  # width of a character of an axis label
MAX_POINTS = 400
_HUGE = 1e150  # what diverges may reach the end of the floats, where a difference overflows


@dataclass(frozen=True)
class Series:
    """One curve: (step, value or None) in the order of the steps. `style` is its class in report.css."""

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Line:
    """A level drawn across the chart. What lies above a `bound` is shaded."""

    value: float
    label: str
    bound: bool = False


@dataclass(frozen=True)
class Marker:
    """An event at a step, numbered as in the table of the actions."""

    step: float
    number: int
    text: str


@dataclass(frozen=True)
class Chart:
    key: str
    title: str
    unit: str
    series: Sequence[Series]
    text: Callable[[float | None], str] = fmt.number
    axis: Callable[[float | None], str] | None = None  # None: as many decimals as the ticks need
    lines: Sequence[Line] = ()
    markers: Sequence[Marker] = ()
    from_zero: bool = False
    may_be_log: bool = False
    sides: bool = False  # two curves of equal rank
    several: bool = False  # curves of several runs: no value speaks for all


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] onto [start, end] of the view box."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points of the same shape: of each stretch the lowest, the highest and one gap are kept."""
    if len(points) <= limit:
        return list(points)
    inner, stretches = points[1:-1], (limit - 2) // 3
    kept = [0]
    for i in range(stretches):
        first, last = i * len(inner) // stretches, (i + 1) * len(inner) // stretches
        known = [j for j in range(first, last) if inner[j][1] is not None]
        gaps = [j for j in range(first, last) if inner[j][1] is None]
        ends = (
            {min(known, key=lambda j: inner[j][1] or 0.0), max(known, key=lambda j: inner[j][1] or 0.0)}
            if known
            else set()
        )
        kept += [j + 1 for j in sorted({*ends, *gaps[:1]})]
    return [points[j] for j in [*kept, len(points) - 1]]


def nice_step(span: float, count: int) -> float:
    """The width of a tick: 1, 2 or 5 times a power of ten, so that about `count` of them fill the span."""
    raw = span / max(1, count)
    base = 10.0 ** math.floor(math.log10(raw))
    return next(m * base for m in (1.0, 2.0, 5.0, 10.0) if m * base >= raw * 0.999)


def y_scale(chart: Chart, series: Sequence[Series]) -> Scale:
    """The vertical scale: from one round number to another around all values and levels."""
    values = [min(_HUGE, max(-_HUGE, y)) for s in series for _, y in s.points if y is not None]
    levels = [line.value for line in chart.lines]
    start, end = HEIGHT - _BOTTOM, _TOP
    if chart.may_be_log and values and min(values) > 1 / _HUGE and max(values) / min(values) > 50:
        bottom = math.floor(math.log10(min([*values, *(v for v in levels if v > 0)])))
        top = math.ceil(math.log10(max([*values, *levels])) + 1e-9)
        stride = max(1, math.ceil((top - bottom) / 5))
        return Scale(10.0**bottom, 10.0**top, start, end, True, [10.0**e for e in range(bottom, top + 1, stride)])
    everything = [*values, *levels, *([0.0] if chart.from_zero else [])] or [0.0]
    low, high = min(everything), max(everything)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-300):
        pad = abs(high) * 0.5 or 1.0
        low, high = (0.0, high + pad) if low == 0 or chart.from_zero else (low - pad, high + pad)
    elif chart.lines and any(line.bound and line.value == high for line in chart.lines):
        high += 0.12 * (high - low)  # a bound at the very edge would not look like one
    step = nice_step(high - low, 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, last * step, start, end, False, [i * step for i in range(first, last + 1)])


def x_scale(series: Sequence[Series], markers: Sequence[Marker], left: float) -> Scale:
    steps = [x for s in series for x, _ in s.points] + [m.step for m in markers]
    low, high = min(steps), max(steps)
    if low == high:
        low, high = max(0.0, low - 1), high + 1
    step = max(1.0, nice_step(high - low, 5))
    ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Scale(low, high, left, WIDTH - _RIGHT, False, ticks)


def _axis_text(chart: Chart, ticks: Sequence[float]) -> list[str]:
    if chart.axis is not None:
        return [chart.axis(t) for t in ticks]
    gap = min((b - a for a, b in pairwise(ticks)), default=1.0)
    biggest = max((abs(t) for t in ticks), default=0.0)
    if biggest and (gap < 1e-4 or biggest >= 1e5):
        return ["0" if t == 0 else fmt.power(t) for t in ticks]
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap > 0 else 0
    return [f"{t:,.{decimals}f}" if abs(t) > gap / 1e3 else "0" for t in ticks]


def draw(chart: Chart) -> Markup:
    """The figure of one chart: caption with legend and last value, the curves, and a description of them in words."""
    series = [Series(s.name, s.style, thin(s.points), s.dots) for s in chart.series if s.points]
    y = y_scale(chart, series)
    labels = [fmt.power(t) for t in y.ticks] if y.log else _axis_text(chart, y.ticks)
    left = 10 + _CHARACTER * max(len(label) for label in labels)
    x = x_scale(series, chart.markers, left)
    parts = [
        el("desc", describe(chart), id=f"{chart.key}-desc"),
        *_grid(x, y, labels, left),
        *(_level(line, x, y) for line in chart.lines if y.low <= line.value <= y.high),
        *_markers(chart.markers, x, y),
        *(_curve(s, x, y, back=i == 0 and len(series) > 1 and s.style == "train") for i, s in enumerate(series)),
    ]
    svg = el(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_labelledby=f"{chart.key}-title",
        aria_describedby=f"{chart.key}-desc",
        data_chart=_hover(chart, series, x, y),
    )
    return el("figure", _caption(chart, series), svg, cls="chart", id=f"chart-{chart.key}")


def _caption(chart: Chart, series: Sequence[Series]) -> Markup:
    entries = [(s.style, s.name, s.dots) for s in series] if len(series) > 1 or chart.several else []
    legend = [el("li", _swatch(style, dots), name) for style, name, dots in entries]
    legend += [el("li", _swatch("bound" if line.bound else "level", False), line.label) for line in chart.lines]
    if chart.markers:
        legend.append(el("li", el("span", "n", cls="badge", aria_hidden="true"), "what the KL control did"))
    now, style = ("", "") if chart.several else _now(chart, series)
    return el(
        "figcaption",
        el(
            "h3", chart.title, el("span", f" {chart.unit}", cls="unit") if chart.unit else None, id=f"{chart.key}-title"
        ),
        el("span", now, cls=f"now {style}".strip(), title="last value") if now else None,
        el("ul", *legend, cls="legend") if legend else None,
    )


def _now(chart: Chart, series: Sequence[Series]) -> tuple[str, str]:
    """The last value of the curve that counts, which is the held-out one where there is one; of both, where both do."""
    last = [next((y for _, y in reversed(s.points) if y is not None), None) for s in series]
    if chart.sides:
        return " / ".join(chart.text(y) for y in last), ""
    places = [i for i, y in enumerate(last) if y is not None and series[i].style != "train"] or [0]
    return chart.text(last[places[0]]), series[places[0]].style if len(series) > 1 else ""


def _swatch(style: str, dots: bool) -> Markup:
    line = el("line", x1=1, y1=5, x2=19, y2=5, cls=f"line {style}")
    dot = el("circle", cx=10, cy=5, r=3, cls=f"dot {style}") if dots else None
    return el("svg", line, dot, viewBox="0 0 20 10", cls="swatch", aria_hidden="true")


def _grid(x: Scale, y: Scale, labels: Sequence[str], left: float) -> list[Markup]:
    parts = []
    for tick, label in zip(y.ticks, labels):
        at = y.at(tick)
        parts.append(el("line", x1=left, y1=at, x2=WIDTH - _RIGHT, y2=at, cls="axis" if tick == 0 else "grid"))
        parts.append(el("text", label, x=left - 5, y=at + 4, text_anchor="end"))
    for tick in x.ticks:
        at, label = x.at(tick), f"{tick:,.0f}"
        half = _CHARACTER * len(label) / 2
        anchor, shift = ("end", WIDTH - 1) if at + half > WIDTH - 1 else ("middle", at)
        parts.append(el("line", x1=at, y1=y.start, x2=at, y2=y.start + 4, cls="axis"))
        parts.append(el("text", label, x=shift, y=HEIGHT - 6, text_anchor=anchor))
    return parts


def _level(line: Line, x: Scale, y: Scale) -> Markup:
    at = y.at(line.value)
    stroke = el("line", x1=x.start, y1=at, x2=x.end, y2=at, cls="line bound" if line.bound else "line level")
    if not line.bound:
        return stroke
    return join(el("rect", x=x.start, y=y.end, width=x.end - x.start, height=at - y.end, cls="over"), stroke)


def _markers(markers: Sequence[Marker], x: Scale, y: Scale) -> list[Markup]:
    parts, free = [], -1.0
    for m in markers:
        at = min(max(x.at(m.step), 8.0), WIDTH - 8.0)
        parts.append(el("line", x1=at, y1=_TOP - 4, x2=at, y2=y.start, cls="event"))
        if at >= free:  # numbers that would lie on each other are left to the table
            circle = el("circle", cx=at, cy=10, r=7.5, cls="event")
            label = el("text", str(m.number), x=at, y=13.5, text_anchor="middle", cls="event")
            parts.append(el("g", el("title", f"step {m.step:,.0f}: {m.text}"), circle, label))
            free = at + 17
    return parts


def _curve(s: Series, x: Scale, y: Scale, back: bool = False) -> Markup:
    runs: list[list[str]] = [[]]
    for step, value in s.points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append(f"{x.at(step):.1f} {y.at(value):.1f}")
    path = " ".join("M" + " L".join(run) for run in runs if len(run) > 1)
    alone = [run[0] for run in runs if len(run) == 1]
    places = [p for run in runs for p in run] if s.dots and len(s.points) <= 60 else alone
    dots = [el("circle", cx=p.split()[0], cy=p.split()[1], r=3, cls=f"dot {s.style}") for p in places]
    return join(el("path", d=path, cls=f"line {s.style}{' back' if back else ''}") if path else None, *dots)


def _hover(chart: Chart, series: Sequence[Series], x: Scale, y: Scale) -> str:
    """What report.js shows under the pointer: per curve its name and [x, y, step, value in words] of each point."""
    curves = []
    for s in series:
        points = [
            [round(x.at(a), 1), round(y.at(b), 1), f"{a:,.0f}", chart.text(b)] for a, b in s.points if b is not None
        ]
        curves.append({"name": s.name, "style": s.style, "points": points})
    return json.dumps(curves, ensure_ascii=False, separators=(",", ":"))


def describe(chart: Chart) -> str:
    """The chart in words, for whoever cannot see it."""
    sentences = []
    for s in chart.series:
        known = [(x, y) for x, y in s.points if y is not None]
        if not known:
            sentences.append(f"{s.name}: no finite value.")
        elif len(known) == 1:
            sentences.append(f"{s.name}: {chart.text(known[0][1])} at step {known[0][0]:,.0f}.")
        else:
            (x0, y0), (x1, y1) = known[0], known[-1]
            low, high = min(y for _, y in known), max(y for _, y in known)
            sentences.append(
                f"{s.name}: from {chart.text(y0)} at step {x0:,.0f} to {chart.text(y1)} at step {x1:,.0f}, "
                f"between {chart.text(low)} and {chart.text(high)}."
            )
    sentences += [f"{line.label}." for line in chart.lines]
    sentences += [f"Step {m.step:,.0f}: {m.text}." for m in chart.markers[:20]]
    return " ".join(sentences)
