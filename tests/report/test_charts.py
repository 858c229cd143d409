"""Curves as SVG. Oracles: geometry worked out here (an independent scale from the ticks that are drawn), and the view box."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise

import pytest
from report_svg import Svg, assert_inside

from jax_dpo.report.charts import MAX_POINTS, Chart, Line, Marker, Series, draw, nice_step, thin


def path_points(svg: Svg, cls: str) -> list[tuple[float, float]]:
    (path,) = svg.of("path", cls)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([^ ]+) ([^ ]+)", path["d"])]


def test_points_lie_where_the_ticks_say() -> None:
    points = [(10 * i, 0.02 * i * i) for i in range(11)]
    svg = Svg(draw(Chart("c", "Title", "", [Series("training", "train", points)])))
    assert_inside(svg)
    up = [(float(t), float(a["y"]) - 4) for a, t in svg.texts if a.get("text-anchor") == "end" and float(a["x"]) < 80]
    along = [(float(t), float(a["x"])) for a, t in svg.texts if a.get("text-anchor") == "middle"]
    (v0, y0), (v1, y1) = up[0], up[-1]
    (s0, x0), (s1, x1) = along[0], along[-1]
    for (step, value), (x, y) in zip(points, path_points(svg, "train"), strict=True):
        assert x == pytest.approx(x0 + (step - s0) / (s1 - s0) * (x1 - x0), abs=0.6)
        assert y == pytest.approx(y0 + (value - v0) / (v1 - v0) * (y1 - y0), abs=0.6)


def test_a_gap_splits_the_curve_and_a_lone_point_is_a_dot() -> None:
    points = [(1, 0.5), (2, 0.4), (3, None), (4, 0.3), (5, None), (6, 0.2), (7, 0.1)]
    svg = Svg(draw(Chart("c", "Title", "", [Series("training", "train", points)])))
    (path,) = svg.of("path", "train")
    assert path["d"].count("M") == 2 and path["d"].count("L") == 2
    assert len(svg.of("circle", "dot")) == 1


def test_the_bound_is_drawn_and_shaded_above() -> None:
    kl = [(step, 0.001 * step) for step in range(0, 60, 10)]
    chart = Chart(
        "kl", "KL", "", [Series("training", "train", kl)], lines=[Line(0.1, "bound 0.1", True)], from_zero=True
    )
    svg = Svg(draw(chart))
    assert_inside(svg)
    (line,) = svg.of("line", "bound")
    (above,) = svg.of("rect", "over")
    assert float(line["y1"]) == float(line["y2"]) > 20
    assert float(above["y"]) + float(above["height"]) == pytest.approx(float(line["y1"]), abs=0.2)
    assert min(y for _, y in path_points(svg, "train")) > float(line["y1"])


def test_markers_stand_at_their_steps_and_their_numbers_do_not_overlap() -> None:
    points = [(step, 0.1) for step in range(0, 1001, 10)]
    marks = [Marker(step, i + 1, f"action {i}") for i, step in enumerate(range(500, 1000, 10))]
    text = draw(Chart("kl", "KL", "", [Series("training", "train", points)], markers=marks))
    svg = Svg(text)
    assert_inside(svg)
    assert len(svg.of("line", "event")) == 50
    centres = sorted(float(a["cx"]) for a in svg.of("circle", "event"))
    assert 1 < len(centres) < 50
    assert all(b - a >= 15 for a, b in pairwise(centres))
    assert "step 500: action 0" in text


def test_thinning_keeps_the_extremes_the_ends_and_the_gaps() -> None:
    rng = random.Random(0)
    points = [(i, rng.random()) for i in range(10_000)]
    points[4321] = (4321, 77.0)
    points[6543] = (6543, -5.0)
    points[2222] = (2222, None)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert {(4321, 77.0), (6543, -5.0), (2222, None)} <= set(kept)
    assert kept == sorted(kept, key=lambda p: p[0])
    assert thin(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_a_wide_range_of_norms_is_drawn_on_a_logarithmic_scale() -> None:
    points = [(i, 10.0**i) for i in range(1, 6)]
    svg = Svg(draw(Chart("g", "Norm", "", [Series("training", "train", points)], may_be_log=True)))
    heights = [y for _, y in path_points(svg, "train")]
    gaps = [a - b for a, b in pairwise(heights)]
    assert max(gaps) - min(gaps) < 0.3


@pytest.mark.parametrize(("span", "count", "expected"), [(1.0, 4, 0.5), (0.7, 4, 0.2), (24, 5, 5.0), (3e-6, 4, 1e-6)])
def test_ticks_are_round_numbers(span: float, count: int, expected: float) -> None:
    assert nice_step(span, count) == pytest.approx(expected)


_VALUES = [0.0, -0.0, 1.0, -1.0, 1e-6, 5e-324, 1e308, -1e308, 0.1, 123456.0, None]


@pytest.mark.parametrize("seed", range(60))
def test_any_values_stay_inside(seed: int) -> None:
    rng = random.Random(seed)
    steps = sorted(rng.choice([0, 1, 7, 1000, 10**7]) for _ in range(rng.randint(1, 6)))
    points = [(step, rng.choice(_VALUES)) for step in steps]
    if all(y is None for _, y in points):
        points.append((5, 1.0))
    lines = rng.choice([(), [Line(0.1, "bound 0.1", True)], [Line(-3.0, "level")]])
    marks = rng.choice([(), [Marker(0, 1, "a"), Marker(10**7, 2, "b")]])
    text = draw(
        Chart("c", "T", "", [Series("training", "train", points)], lines=lines, markers=marks,
              from_zero=rng.random() < 0.5, may_be_log=rng.random() < 0.5)
    )  # fmt: skip
    assert_inside(Svg(text))
    assert "nan" not in text and "inf" not in text.replace("infinite", "").replace("finite", "")


def test_the_description_has_the_numbers() -> None:
    text = draw(Chart("c", "Loss", "", [Series("training", "train", [(1, math.log(2)), (5, 0.9), (24, 0.5)])]))
    assert "training: from 0.6931 at step 1 to 0.5000 at step 24, between 0.5000 and 0.9000." in text
    assert 'aria-labelledby="c-title"' in text and 'aria-describedby="c-desc"' in text
