"""Margins against lengths. Oracle: numpy's polyfit and corrcoef on the same pairs."""

from __future__ import annotations

import numpy as np
import pytest

from jax_dpo.loss.scores import PairSums
from jax_dpo.train.length import length_effect


def sums(tokens: np.ndarray, logratio: np.ndarray) -> PairSums:
    zero = np.zeros_like(tokens, np.float64)
    return PairSums(logratio, zero, zero, tokens, zero, zero, zero, zero)


@pytest.mark.parametrize("own_beta", [False, True])
def test_the_line_of_margins_over_lengths(own_beta: bool) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(3, 40, (50, 2)).astype(np.float32)
    logratio = (0.2 * tokens + random.standard_normal((50, 2))).astype(np.float32)
    beta = random.uniform(0.05, 0.3, 50) if own_beta else 0.1
    d = (tokens[:, 0] - tokens[:, 1]).astype(np.float64)
    m = beta * (logratio[:, 0].astype(np.float64) - logratio[:, 1])
    slope, intercept = np.polyfit(d, m, 1)
    found = length_effect(sums(tokens, logratio), beta)
    assert [found["length/chosen"], found["length/rejected"]] == pytest.approx(tokens.mean(0).tolist())
    assert found["length/chosen_longer"] == (d > 0).mean()
    assert found["length/margin_slope"] == pytest.approx(slope)
    assert found["length/margin_correlation"] == pytest.approx(np.corrcoef(d, m)[0, 1])
    assert m.mean() == pytest.approx(intercept + found["length/margin_slope"] * d.mean())


@pytest.mark.parametrize("case", ["equal lengths", "equal margins", "not finite"])
def test_where_there_is_no_line(case: str) -> None:
    tokens = np.array([[4.0, 2.0], [6.0, 4.0], [9.0, 3.0]])
    logratio = np.array([[0.1, 0.0], [0.2, 0.0], [0.5, 0.1]])
    if case == "equal lengths":
        tokens[2] = [5.0, 3.0]
    elif case == "equal margins":
        logratio[:] = 0.0
    else:
        logratio[1, 0] = np.nan
    assert set(length_effect(sums(tokens, logratio), 0.1)) == {
        f"length/{name}" for name in ("chosen", "rejected", "chosen_longer")
    }
