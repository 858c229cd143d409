"""Lines by least squares. Oracle: the normal equations solved by numpy, (X'X)^-1 s^2 for the errors."""

from __future__ import annotations

import numpy as np
import pytest

from jax_dpo.report.trend import fit, slope_text

STEPS = [0, 10, 20, 50, 60, 100]
VALUES = [0.69, 0.66, 0.67, 0.60, 0.62, 0.55]


@pytest.mark.parametrize("at", [0.0, 48.0, 100.0, 130.0])
def test_a_line_and_its_errors(at: float) -> None:
    design = np.stack([np.ones(6), np.asarray(STEPS, float)], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ np.asarray(VALUES)
    residuals = np.asarray(VALUES) - design @ coefficients
    variance = residuals @ residuals / 4
    row = np.array([1.0, at])
    line = fit(list(zip(STEPS, VALUES)))
    assert line is not None
    assert line.slope == pytest.approx(coefficients[1], rel=1e-10)
    assert line.slope_error == pytest.approx(np.sqrt(variance * inverse[1, 1]), rel=1e-10)
    assert line.at(at) == pytest.approx(row @ coefficients, rel=1e-10)
    assert line.error_at(at) == pytest.approx(np.sqrt(variance * (row @ inverse @ row)), rel=1e-10)
    assert line.error_of_one_at(at) == pytest.approx(np.sqrt(variance * (1 + row @ inverse @ row)), rel=1e-10)


def test_two_points_lie_on_their_line() -> None:
    line = fit([(0, 1.0), (20, 0.5)])
    assert line is not None
    assert (line.slope, line.slope_error, line.at(20)) == (-0.025, None, 0.5)
    assert line.text == "-0.25 per 10 steps"


def test_where_there_is_no_line() -> None:
    assert fit([]) is None and fit([(5, 1.0)]) is None and fit([(5, 1.0), (5, 2.0)]) is None
    assert fit([(0, 1.0), (5, float("nan"))]) is None


def test_a_slope_in_words() -> None:
    assert slope_text(0.000123, 0.00003) == "+0.012 ± 0.003 per 100 steps"
    assert slope_text(-1e-7, None) == "-1e-05 per 100 steps"
    assert slope_text(0.012, 0.001) == "+0.12 ± 0.01 per 10 steps"
    assert slope_text(-0.5, None) == "-0.5 per step"
