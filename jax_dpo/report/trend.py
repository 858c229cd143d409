"""Straight lines through evaluations: ordinary least squares of a metric over the step, with standard errors.

Formulas: Draper and Smith, Applied Regression Analysis (3rd ed.), sections 1.2 to 1.4 and 3.1. With n points (x_i, y_i), means X and Y,
Sxx = sum (x_i - X)^2: slope b = sum (x_i - X)(y_i - Y) / Sxx, scatter s^2 = sum of squared residuals / (n - 2), standard error of the slope
s / sqrt(Sxx), of the line at x  s sqrt(1/n + (x - X)^2 / Sxx), of one more point there  s sqrt(1 + 1/n + (x - X)^2 / Sxx).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trend:
    """A line through `count` points. Two of them lie on it, so nothing is known of its errors (None)."""

    count: int
    center: float
    """mean of the steps"""
    level: float
    """mean of the values"""
    slope: float
    """value per step"""
    spread: float
    """Sxx"""
    scatter: float | None
    """standard deviation of the values around the line"""

    @property
    def slope_error(self) -> float | None:
        """Standard error of the slope."""
        return None if self.scatter is None else self.scatter / math.sqrt(self.spread)

    def at(self, step: float) -> float:
        """The line's value at a step."""
        return self.level + self.slope * (step - self.center)

    def error_at(self, step: float) -> float:
        """Standard error of `at`; 0 where the scatter is not known."""
        return (self.scatter or 0.0) * math.sqrt(1 / self.count + (step - self.center) ** 2 / self.spread)

    def error_of_one_at(self, step: float) -> float:
        """Standard deviation of one more value at this step around `at`; 0 where the scatter is not known."""
        return math.hypot(self.scatter or 0.0, self.error_at(step))

    @property
    def text(self) -> str:
        return slope_text(self.slope, self.slope_error)


def slope_text(slope: float, error: float | None) -> str:
    """A slope per step, with its standard error: "+0.012 ± 0.003 per 100 steps". Fewer steps where 100 would be a whole unit
    and more, further than the run that was so fast can have been long."""
    steps = next((n for n in (100, 10) if abs(slope) * n < 1), 1)
    plus = "" if error is None else f" ± {_short(error * steps)}"
    return f"{'+' if slope > 0 else ''}{_short(slope * steps)}{plus} per {_steps(steps)}"


def fit(points: Sequence[tuple[float, float]]) -> Trend | None:
    """The line through points (step, value); None where they have fewer than two steps, or a value that is not finite."""
    if len({x for x, _ in points}) < 2 or not all(math.isfinite(y) for _, y in points):
        return None
    n = len(points)
    center, level = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - center) ** 2 for x, _ in points)
    slope = sum((x - center) * (y - level) for x, y in points) / spread
    if n < 3:
        return Trend(n, center, level, slope, spread, None)
    squares = sum((y - level - slope * (x - center)) ** 2 for x, y in points)
    return Trend(n, center, level, slope, spread, math.sqrt(squares / (n - 2)))


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"


def _short(value: float) -> str:
    return f"{value:.2g}"
