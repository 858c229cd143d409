"""The laws of KL growth on simulated runs. Oracle: the simulated run's own closed form, solved for its rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from jax_dpo.train.kl_growth import Growth, Point, careful_law, distance, likely_law, usable

LIMIT = 0.075
TRIAL = [min(1.0, k / 3) for k in range(30)]
PLAN = [k / 100 if k < 100 else 0.5 * (1 + math.cos(math.pi * (k - 100) / 900)) for k in range(1000)]

Shape = Callable[[float], float]  # KL of distance times rate


def quadratic(u: float) -> float:
    return 9e6 * u**2


def saturating(u: float) -> float:
    """About 9e6 u^2 while it is small; around LIMIT the exponent has fallen to about 1.2."""
    return 9e6 * u**2 / (1 + 9e6 * u**2 / 0.05) ** 0.5


def rate_of(shape: Shape, far: float) -> float:
    """The rate at which a run that goes `far` ends at LIMIT."""
    low, high = 1e-12, 1.0
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if shape(middle * far) < LIMIT else (low, middle)
    return low


def points_of(shape: Shape, r: float, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """What a ladder of trials around the right rate would measure."""
    random, centre = np.random.default_rng(seed), rate_of(shape, distance(TRIAL, r))
    return [
        Point(centre * x, k, shape(centre * x * distance(TRIAL[:k], r)) * math.exp(noise * random.standard_normal()))
        for x, k in itertools.product((0.25, 0.5, 1.0, 2.0), (8, 15, 30))
    ]


def test_distances_by_hand() -> None:
    assert distance([0.0, 0.5, 1.0], 1.0) == 1.5
    assert distance([0.0, 3.0, 4.0], 0.5) == pytest.approx(5.0)


@pytest.mark.parametrize("shape", [quadratic, saturating])
@pytest.mark.parametrize("law", [careful_law, likely_law])
def test_where_steps_last_both_laws_find_the_rate(shape: Shape, law: Callable[..., Growth]) -> None:
    found = law(usable(points_of(shape, 1.0), LIMIT), TRIAL)
    assert found.lasts == 1.0
    rate = found.rate(LIMIT, PLAN)
    assert rate == pytest.approx(rate_of(shape, sum(PLAN)), rel=0.03)
    assert found.kl(rate, PLAN) == pytest.approx(LIMIT, rel=1e-6)


@pytest.mark.parametrize("r", [0.5, 0.75])
@pytest.mark.parametrize("shape", [quadratic, saturating])
def test_where_steps_undo_each_other_the_likely_law_finds_how_much_and_the_careful_one_stays_below(
    shape: Shape, r: float
) -> None:
    points, truth = usable(points_of(shape, r), LIMIT), rate_of(shape, distance(PLAN, r))
    likely = likely_law(points, TRIAL)
    assert likely.lasts == pytest.approx(r, abs=0.02)
    assert likely.rate(LIMIT, PLAN) == pytest.approx(truth, rel=0.07)
    # By hand: the careful law takes the trial's distance at r for one at r = 1, and so on.
    short = (sum(TRIAL) / distance(TRIAL, r)) / (sum(PLAN) / distance(PLAN, r))
    assert careful_law(points, TRIAL).rate(LIMIT, PLAN) == pytest.approx(truth * short, rel=0.07)


def test_noise_moves_the_rate_by_little() -> None:
    truth = rate_of(saturating, sum(PLAN))
    found = [careful_law(points_of(saturating, 1.0, 0.1, seed), TRIAL).rate(LIMIT, PLAN) for seed in range(40)]
    # An error of 0.1 in log KL is one of about 0.1 / 1.2 in log rate.
    assert np.std(np.log(found)) < 0.1
    assert abs(np.mean(np.log(found)) - math.log(truth)) < 0.05


def test_a_small_rate_follows_the_square_of_small_steps() -> None:
    law = careful_law(points_of(saturating, 1.0), TRIAL)
    rate = rate_of(saturating, sum(PLAN)) / 30
    assert 0.3 < law.kl(rate, PLAN) / saturating(rate * sum(PLAN)) < 3
    assert law.kl(0.0, PLAN) == 0.0


def test_kl_rises_with_the_rate_everywhere() -> None:
    turning = [
        Point(rate, 30, kl) for rate, kl in ((1e-5, 0.02), (2e-5, 0.06), (4e-5, 0.07), (8e-5, 0.03), (1e-6, 0.001))
    ]
    for points in (turning, points_of(saturating, 0.8, 0.3)):
        for law in (careful_law(points, TRIAL), likely_law(points, TRIAL)):
            rates = np.geomspace(1e-9, 1e-1, 200)
            assert np.all(np.diff([law.kl(rate, PLAN) for rate in rates]) > 0)


@pytest.mark.parametrize("kl", [math.nan, math.inf, -1e-9, 0.0, LIMIT / 200, LIMIT * 10])
def test_what_is_far_from_the_bound_says_nothing(kl: float) -> None:
    near: Sequence[Point] = [Point(1e-6, 30, LIMIT / 3)]
    assert usable([*near, Point(1e-6, 15, kl)], LIMIT) == near
