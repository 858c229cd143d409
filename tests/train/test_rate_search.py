"""The search by trials on simulated models. Oracle: the simulated model itself, run for the planned steps at what was proposed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from jax_dpo.errors import UserError
from jax_dpo.train.rate_search import Found, Trial, better_beta, search

LIMIT = 0.075
TRIAL = [min(1.0, k / 3) for k in range(30)]
PLAN = [k / 50 if k < 50 else 1 - (k - 50) / 450 for k in range(500)]


@dataclass
class Model:
    """KL after a run: s u^2 / (1 + s u^2 / 0.1)^0.4 with u = rate * summed factors; betas in `accuracy` end at that share of pairs.

    Above `breaks` a step is not finite.
    """

    scale: float
    breaks: float = math.inf
    accuracy: dict[float, float] = field(default_factory=dict)
    beta_speed: float = 0.0
    made: list[tuple[float, float]] = field(default_factory=list)

    def kl(self, rate: float, factors: Sequence[float], beta: float = 0.1) -> float:
        x = self.scale * (rate * sum(factors)) ** 2 * (beta / 0.1) ** self.beta_speed
        return x / (1 + x / 0.1) ** 0.4

    def trial(self, rate: float, beta: float) -> Trial:
        self.made.append((rate, beta))
        broken = rate > self.breaks
        growth = () if broken else tuple((k, self.kl(rate, TRIAL[:k], beta)) for k in (8, 15, 30))
        kl = math.nan if broken else growth[-1][1]
        trouble = "step 2 is not finite" if broken else None
        return Trial(rate, beta, 30, kl, self.accuracy.get(beta, 0.8), 1.0, 0.6, 1.0, growth, trouble=trouble)

    def search(self, start: float = 1e-6, rates: Sequence[float] = (), betas: Sequence[float] = ()) -> Found:
        return search(
            self.trial,
            start=start,
            beta=0.1,
            limit=LIMIT,
            factors=TRIAL,
            planned=PLAN,
            held_out=64,
            rates=rates,
            betas=betas,
        )


@pytest.mark.parametrize("scale", [1e-2, 1e2, 1e6, 1e10, 1e14])
def test_the_proposed_rate_ends_the_planned_run_at_the_limit_wherever_the_search_starts(scale: float) -> None:
    model = Model(scale)
    found = model.search()
    end = model.kl(found.rate, PLAN)
    assert 0.85 * LIMIT < end <= 1.02 * LIMIT
    assert found.kl == pytest.approx(end, rel=0.05)
    assert not found.capped
    assert len(model.made) <= 14
    assert model.kl(30 * found.rate, PLAN) > 3 * LIMIT  # so no rate that is 30 times too low


def test_rates_that_break_are_passed_over() -> None:
    """The rate whose trial reaches the limit is 100 times the proposed one, and trials above it break."""
    model = Model(1e6)
    reaches = math.sqrt(LIMIT / 1e6) / sum(TRIAL)
    model.breaks = 2.5 * reaches
    found = model.search(start=1.0)
    assert 0.85 * LIMIT < model.kl(found.rate, PLAN) <= 1.02 * LIMIT
    assert any(t.trouble for t in found.trials)
    assert not found.capped


def test_no_rate_is_proposed_above_one_that_broke() -> None:
    """Trials break at a rate that the planned run would need."""
    needed = math.sqrt(LIMIT / 1e6) / sum(PLAN)
    model = Model(1e6, breaks=0.5 * needed)
    rates = [x * needed for x in (0.2, 0.4, 0.8)]
    found = search(
        model.trial, start=1.0, beta=0.1, limit=1e-4, factors=TRIAL, planned=TRIAL[:8], held_out=64, rates=rates
    )
    assert found.rate == pytest.approx(0.4 * needed, rel=0.1)
    assert found.rate <= 0.4 * needed
    assert found.capped


def test_given_rates_are_the_only_trials() -> None:
    model = Model(1e6)
    centre = math.sqrt(LIMIT / 1e6) / sum(TRIAL)
    found = model.search(rates=[centre / 3, centre, 2 * centre])
    assert [rate for rate, _ in model.made] == [centre / 3, centre, 2 * centre]
    assert 0.85 * LIMIT < model.kl(found.rate, PLAN) <= 1.05 * LIMIT


def test_betas_are_compared_where_the_planned_run_will_go() -> None:
    model = Model(1e6, accuracy={0.1: 0.7, 0.05: 0.72, 0.2: 0.71})
    found = model.search(betas=(0.05, 0.1, 0.2))
    assert [t.beta for t in found.compared] == [0.1, 0.05, 0.2]
    assert len({t.rate for t in found.compared}) == 1
    assert model.kl(found.compared[0].rate, TRIAL) == pytest.approx(LIMIT, rel=0.1)
    assert found.beta == 0.1


@pytest.mark.parametrize("speed", [-1.0, 0.5])
def test_a_better_beta_is_taken_and_the_rate_makes_up_for_its_speed(speed: float) -> None:
    model = Model(1e6, accuracy={0.1: 0.6, 0.05: 0.9}, beta_speed=speed)
    found = model.search(betas=(0.05, 0.2))
    assert found.beta == 0.05
    assert "0.900" in found.why_beta
    end = model.kl(found.rate, PLAN, beta=0.05)
    assert 0.7 * LIMIT < end <= 1.1 * LIMIT
    assert found.kl == pytest.approx(end, rel=0.15)


def test_beta_by_hand() -> None:
    """sqrt((0.7 * 0.3 + 0.78 * 0.22) / 64) = 0.0773 < 0.08; with 0.77 it is 0.0778 > 0.07."""
    one = Model(1.0, accuracy={0.1: 0.70, 0.05: 0.78, 0.2: 0.77})
    base, low, high = (one.trial(1e-6, beta) for beta in (0.1, 0.05, 0.2))
    assert better_beta([base, low, high], 64)[0] is low
    assert better_beta([base, high], 64)[0] is None


def test_a_model_that_does_not_move_is_no_guide() -> None:
    with pytest.raises(UserError, match=r"No trial says how the KL grows toward 0\.075") as caught:
        Model(0.0).search()
    assert caught.value.name == "tune-no-guide"
    with pytest.raises(UserError, match="step 2 is not finite"):
        Model(1.0, breaks=0.0).search()
