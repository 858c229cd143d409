"""How the KL grows with rate and steps: laws fitted to short trials, so that the end of a longer run is known before it is made.

Near its start a policy's KL is half a quadratic form in how far its parameters have moved (the Fisher metric; Amari, "Natural Gradient
Works Efficiently in Learning", 1998). An adaptive optimizer moves each parameter by about the learning rate a step, whatever the size of
the gradient. So the KL is a function of one number, the distance

    u = rate * d,    d = (sum_k f_k^(1/r))^r,

f_k being the schedule's factor of step k, and r how much of a step lasts: 1 where all steps pull the same way (d is the summed schedule),
1/2 where they are a random walk. A trial at a high rate so stands for a longer run at a low one. The law is

    log KL = a + p log u + c (log u)^2,    c <= 0, since growth slows as the loss saturates (p is about 2 for small steps, c about 0).

`careful_law` takes r = 1, the farthest that a run of so many steps can go, and the ends of the trials alone. `likely_law` finds r from
rates and steps together. Neither knows what the trials have not seen: pairs that are seen again, a loss that turns after hundreds of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LASTS = (0.5, 1.0)  # a random walk, a straight line
_GRID = np.linspace(*LASTS, 51)
# Only KLs of the bound's own size are fitted: far below it nothing has saturated yet, far above it the policy is another one.
RANGE = (1 / 100, 3.5)
_SLOPES = (0.5, 2.2)  # of log KL over log u beyond what was measured


class Point(NamedTuple):
    """A KL (nats per token, above that of the start) after the first `steps` steps of a trial at `rate`."""

    rate: float
    steps: int
    kl: float


def distance(factors: Sequence[float], r: float) -> float:
    """How far a run with these factors of its rate goes, in steps at the full rate."""
    f = np.asarray(factors, np.float64)
    return float(np.sum(f[f > 0] ** (1 / r)) ** r)


@dataclass(frozen=True)
class Growth:
    """A fitted law. `lasts` is r; `noise` the scatter of log KL around the law."""

    lasts: float
    coefficients: tuple[float, float, float]
    """a, p, c of log KL over log u - `middle`"""
    middle: float
    seen: tuple[float, float]
    """log u - `middle` of the nearest and the farthest point"""
    noise: float
    points: int

    def kl(self, rate: float, factors: Sequence[float]) -> float:
        """KL at the end of a run, nats per token above that of its start."""
        far = rate * distance(factors, self.lasts)
        return 0.0 if far == 0 else math.exp(self._log_kl(math.log(far) - self.middle))

    def rate(self, kl: float, factors: Sequence[float]) -> float:
        """The rate at which a run ends at this KL."""
        low, high = -60.0, 60.0
        for _ in range(200):  # log KL rises with log u everywhere
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self._log_kl(middle) < math.log(kl) else (low, middle)
        return math.exp(low + self.middle) / distance(factors, self.lasts)

    def slope(self, rate: float, factors: Sequence[float]) -> float:
        """d log KL / d log rate there."""
        x = math.log(rate * distance(factors, self.lasts)) - self.middle
        return self._slope(min(max(x, self.seen[0]), self.seen[1]))

    def _slope(self, x: float) -> float:
        _, p, c = self.coefficients
        return min(max(p + 2 * c * x, _SLOPES[0]), _SLOPES[1])

    def _log_kl(self, x: float) -> float:
        """Inside what was seen the fitted parabola; beyond it straight on."""
        a, p, c = self.coefficients
        inside = min(max(x, self.seen[0]), self.seen[1])
        return a + p * inside + c * inside**2 + self._slope(inside) * (x - inside)


def usable(points: Sequence[Point], limit: float) -> list[Point]:
    """Those that say something about the KL `limit`."""
    low, high = RANGE
    return [point for point in points if math.isfinite(point.kl) and low * limit <= point.kl <= high * limit]


def careful_law(points: Sequence[Point], factors: Sequence[float]) -> Growth:
    """The law if all steps last, through the ends of the trials (through all points where fewer than 3 trials came to their end).

    All trials' steps have the same `factors`; `points` are at least 2.
    """
    ends = [point for point in points if point.steps == len(factors)]
    return _fit(ends if len(ends) >= 3 else points, factors, 1.0)


def likely_law(points: Sequence[Point], factors: Sequence[float]) -> Growth:
    """The law with the r of the least squares, through all points; of equals the straightest."""
    return min((_fit(points, factors, r) for r in _GRID[::-1]), key=lambda law: round(law.noise, 9))


def _fit(points: Sequence[Point], factors: Sequence[float], r: float) -> Growth:
    x = np.array([math.log(p.rate * distance(factors[: p.steps], r)) for p in points])
    y = np.array([math.log(p.kl) for p in points])
    middle = float(x.mean())
    x = x - middle
    c, p, a = 0.0, 0.0, 0.0
    # A parabola needs three distances, far enough apart, and must rise all the way.
    if len({round(v, 3) for v in x}) >= 3 and np.ptp(x) > 1.0:
        c, p, a = (float(v) for v in np.polyfit(x, y, 2))
    if not (c < 0 and p + 2 * c * x.max() >= _SLOPES[0]):
        c = 0.0
        p = float(np.polyfit(x, y, 1)[0]) if np.ptp(x) > 0.1 else 2.0
        p = min(max(p, _SLOPES[0]), _SLOPES[1])
        a = float((y - p * x).mean())
    noise = float(np.sqrt(np.mean((y - a - p * x - c * x**2) ** 2)))
    return Growth(float(r), (a, p, c), middle, (float(x.min()), float(x.max())), noise, len(points))
