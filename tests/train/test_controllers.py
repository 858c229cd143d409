"""KL controllers on a simulated plant. The oracle is the plant's own equilibrium, and each rule worked out by hand.

The plant is what DPO does to the KL, in short: it drifts by a share of the way to an equilibrium that is inverse to beta (or to
1 + kl_coef), as gradient and penalty balance there.
"""

from __future__ import annotations

import math

import pytest

from jax_dpo.train.control import ControlState, KLControl, react
from jax_dpo.train.controllers import AIM, BETA_RANGE, AdaptiveBeta, Controller, DualKLCoef, PIBeta, Setting

TARGET, BETA = 0.1, 0.1


def drive(controller: Controller, steps: int, *, free: float, drift: float = 0.25, kl: float = 0.0) -> list[float]:
    """KLs of a run whose uncontrolled equilibrium is `free` nats per token; the loop's own `react` carries the controller."""
    state, seen = ControlState.start(learning_rate=1e-6, beta=BETA, kl_coef=0.0), []
    for step in range(1, steps + 1):
        equilibrium = free * BETA / state.controls.beta / (1 + state.controls.kl_coef)
        kl += drift * (equilibrium - kl)
        state, _ = react(state, KLControl(TARGET, controller=controller), kl=kl, step=step)
        seen.append(kl)
    return seen


@pytest.mark.parametrize("controller", [PIBeta(1.0, 0.3), DualKLCoef(1.0)], ids=lambda c: c.kind)
@pytest.mark.parametrize("free", [0.15, 0.3, 0.8])
def test_ends_at_its_aim_below_the_bound(controller: Controller, free: float) -> None:
    seen = drive(controller, 150, free=free)
    assert max(seen[100:]) < TARGET
    assert seen[-1] == pytest.approx(AIM * TARGET, rel=0.02)


@pytest.mark.parametrize("controller", [PIBeta(1.0, 0.3), DualKLCoef(1.0), AdaptiveBeta(0.1)], ids=lambda c: c.kind)
def test_holds_the_kl_nearer_than_no_control(controller: Controller) -> None:
    assert max(drive(controller, 60, free=0.3)) < 0.75 * 0.3


@pytest.mark.parametrize("controller", [PIBeta(1.0, 0.3), DualKLCoef(1.0)], ids=lambda c: c.kind)
def test_leaves_a_run_within_the_bound_alone(controller: Controller) -> None:
    state = ControlState.start(learning_rate=1e-6, beta=BETA, kl_coef=0.5)
    for step in range(1, 200):
        state, actions = react(state, KLControl(TARGET, controller=controller), kl=0.03, step=step)
        assert actions == []
    assert (state.controls.beta, state.controls.kl_coef) == (BETA, 0.5)


def test_pi_by_hand() -> None:
    rule = PIBeta(0.5, 0.2)
    kl = AIM * TARGET * math.exp(0.4)
    first = rule(Setting(BETA), kl=kl, target_kl=TARGET, configured=BETA)
    assert first.memory == pytest.approx(0.2 * 0.4)
    assert first.value == pytest.approx(BETA * math.exp(0.5 * 0.4 + 0.2 * 0.4))
    second = rule(first, kl=kl, target_kl=TARGET, configured=BETA)
    assert second.value == pytest.approx(BETA * math.exp(0.5 * 0.4 + 2 * 0.2 * 0.4))


def test_pi_cuts_the_error_and_stays_in_its_range() -> None:
    rule = PIBeta(0.5, 0.2)
    wild = rule(Setting(BETA), kl=1e6, target_kl=TARGET, configured=BETA)
    assert wild.value == pytest.approx(BETA * math.exp(0.7))
    setting = Setting(BETA)
    for _ in range(100):
        setting = rule(setting, kl=1e6, target_kl=TARGET, configured=BETA)
    assert setting.value == pytest.approx(BETA * BETA_RANGE[1])


def test_pi_does_not_wind_up() -> None:
    """After 500 evaluations at KL 0 the first one above the bound is answered as on the first day, and so after 500 above it."""
    rule = PIBeta(1.0, 0.3)
    fresh = rule(Setting(BETA), kl=0.2, target_kl=TARGET, configured=BETA)
    setting = Setting(BETA)
    for _ in range(500):
        setting = rule(setting, kl=0.0, target_kl=TARGET, configured=BETA)
    assert rule(setting, kl=0.2, target_kl=TARGET, configured=BETA) == fresh
    for _ in range(500):
        setting = rule(setting, kl=10.0, target_kl=TARGET, configured=BETA)
    falling = [setting := rule(setting, kl=0.02, target_kl=TARGET, configured=BETA) for _ in range(6)]
    assert falling[-1].value < BETA * BETA_RANGE[1] / 5


def test_dual_by_hand() -> None:
    rule = DualKLCoef(2.0)
    risen = rule(Setting(0.5), kl=AIM * TARGET * 1.25, target_kl=TARGET, configured=0.5)
    assert risen.value == pytest.approx(0.5 + 2.0 * 0.25)
    assert rule(Setting(0.5), kl=1e9, target_kl=TARGET, configured=0.5).value == pytest.approx(2.5), (
        "the excess is cut at 1"
    )
    assert rule(risen, kl=0.0, target_kl=TARGET, configured=0.5).value == 0.5, "never under the configured one"


def test_memory_survives_a_checkpoint() -> None:
    state = ControlState.start(learning_rate=1e-6, beta=BETA, kl_coef=0.0)
    state, _ = react(state, KLControl(TARGET, controller=PIBeta(1.0, 0.3)), kl=0.2, step=1)
    assert state.memory > 0
    assert ControlState.from_dict(state.to_dict()) == state
