"""KL control over sequences of KLs. The oracles are tables written by hand from the rules, and the rules' own arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from jax_dpo.train.control import KL_ACTIONS, TRAIN, Action, Controls, ControlState, KLControl, react
from jax_dpo.train.controllers import BETA_RANGE, AdaptiveBeta

STANDARD = ("halve_lr", "raise_beta", "rollback")
HIGH, LOW = 0.2, 0.06  # over the bound of 0.1; within it and not below half of it


def start(beta: float = 0.1) -> ControlState:
    return ControlState.start(learning_rate=1e-6, beta=beta, kl_coef=1.0)


def one(
    state: ControlState, kl: float, actions: Sequence[str] = STANDARD, **more: Any
) -> tuple[ControlState, list[Action]]:
    at = {name: more.pop(name) for name in ("step", "good_step", "judged_on", "last") if name in more}
    return react(state, KLControl(0.1, tuple(actions), **more), kl=kl, **{"step": 10, **at})


def simulate(kls: Sequence[float], actions: Sequence[str], **more: Any) -> tuple[ControlState, list[list[str]]]:
    """A run with an evaluation every 10 steps and a checkpoint at each that held the bound, as the loop would do it."""
    state, step, good, taken = start(), 0, 0, []
    for kl in kls:
        step += 10
        state, done = one(state, kl, actions, step=step, good_step=good, **more)
        if kl <= 0.1:
            good = step
        if done and done[-1].kind == "rollback":
            step = int(done[-1].new)
        taken.append([action.kind for action in done])
    return state, taken


def test_within_the_bound_nothing_happens() -> None:
    for kl in (0.0, 0.05, 0.1):
        assert one(start(), kl) == (start(), [])


def test_no_actions_named_only_watches() -> None:
    assert one(start(), 5.0, ()) == (start(), [])


def test_before_the_first_step_nothing_happens() -> None:
    assert one(start(), 5.0, step=0, controller=AdaptiveBeta(0.1)) == (start(), [])


@pytest.mark.parametrize(
    ("actions", "kls", "expected"),
    [
        # The order given, not the order of KL_ACTIONS, and round again.
        (STANDARD, [HIGH] * 4, [["halve_lr"], ["raise_beta"], ["halve_lr", "rollback"], ["halve_lr"]]),
        (["raise_beta", "halve_lr"], [HIGH] * 3, [["raise_beta"], ["halve_lr"], ["raise_beta"]]),
        (["halve_lr"], [HIGH] * 3, [["halve_lr"]] * 3),
        # An evaluation within the bound takes nothing and does not start the order anew.
        (STANDARD, [HIGH, LOW, HIGH, LOW, HIGH], [["halve_lr"], [], ["raise_beta"], [], ["halve_lr", "rollback"]]),
        # The same action named twice is taken twice.
        (["halve_lr", "halve_lr", "raise_beta"], [HIGH] * 3, [["halve_lr"], ["halve_lr"], ["raise_beta"]]),
    ],
)
def test_order(actions: list[str], kls: list[float], expected: list[list[str]]) -> None:
    assert simulate(kls, actions)[1] == expected


def test_values_of_one_round() -> None:
    state, (halved,) = one(start(), 0.131, step=200)
    assert state.controls == Controls(0.5, 0.1, 1.0)
    assert halved.record() == {
        "action": "halve_lr",
        "reason": "KL 0.131 at step 200 is over target_kl 0.1: learning rate halved from 1e-06 to 5e-07",
        "kl": 0.131,
        "target_kl": 0.1,
        "option": "learning_rate",
        "old": 1e-6,
        "new": 5e-7,
        "judged_on": "eval",
    }
    state, (raised,) = one(state, 0.12, step=300)
    assert state.controls.learning_rate_scale == 0.5
    assert (raised.option, raised.old, raised.new) == ("beta", 0.1, pytest.approx(0.15))
    assert state.controls.beta == raised.new
    state, (back,) = one(state, 0.12, step=400, good_step=100)
    assert (back.kind, back.option, back.old, back.new) == ("rollback", "step", 400, 100)
    assert "back to checkpoint-100" in back.reason
    assert state.controls == Controls(0.5, raised.new, 1.0), "what was changed stays changed"
    assert state.counts == {"halve_lr": 1, "raise_beta": 1, "rollback": 1}


def test_rollback_goes_to_the_start_where_no_checkpoint_held_the_bound() -> None:
    """... with half the rate, though the values have changed since."""
    state, (halved, back) = one(
        ControlState(Controls(1.0, 0.1, 1.0), 1e-6, 0.1, changed_at=5), 0.12, ["rollback"], good_step=0
    )
    assert back.new == 0 and state.controls.learning_rate_scale == 0.5
    assert "the bound was broken before any checkpoint held it" in halved.reason
    assert "the start: no checkpoint held the bound" in back.reason


@pytest.mark.parametrize(
    ("kls", "expected"),
    [
        # Nothing has changed since the start: the first rollback alone would only repeat the same steps.
        ([HIGH], [["halve_lr", "rollback"]]),
        ([HIGH, HIGH], [["halve_lr", "rollback"]] * 2),
        # A newer good checkpoint: what was changed before it is no change to the way that led away from it.
        ([HIGH, LOW, HIGH], [["halve_lr", "rollback"], [], ["halve_lr", "rollback"]]),
        # A newer good checkpoint begins a count of its own.
        ([HIGH, HIGH, LOW, HIGH, HIGH], [["halve_lr", "rollback"]] * 2 + [[]] + [["halve_lr", "rollback"]] * 2),
        # Three times to one step; then the rate alone is halved and the run goes forward.
        ([HIGH] * 5, [["halve_lr", "rollback"]] * 3 + [["halve_lr"]] * 2),
    ],
)
def test_rollback_never_repeats_itself(kls: list[float], expected: list[list[str]]) -> None:
    assert simulate(kls, ["rollback"])[1] == expected


def test_a_rollback_from_far_over_the_bound_halves_as_often_as_the_kl_asks_for() -> None:
    """KL like the rate: twice the aim (0.09) needs one halving, 4 times two, and so on."""
    changed = ControlState(Controls(1.0, 0.1, 1.0), 1e-6, 0.1, changed_at=5)
    for kl, halvings in ((0.12, 0), (0.179, 0), (0.181, 1), (0.359, 1), (0.361, 2), (1.45, 4)):
        state, done = one(changed, kl, ["rollback"], good_step=2)
        assert state.controls.learning_rate_scale == 0.5**halvings
        assert [a.kind for a in done] == ["halve_lr"] * (halvings > 0) + ["rollback"]
    state, (halved, _) = one(start(), 1.45, ["rollback"])
    assert state.controls.learning_rate_scale == 0.5**4 and "halved 4 times from 1e-06 to 6.25e-08" in halved.reason
    state, _ = one(start(), 1e9, ["rollback"])
    assert state.controls.learning_rate_scale == 1 / 1024
    assert one(start(), math.nan, ["rollback"])[0].controls.learning_rate_scale == 0.5


def test_after_the_last_step_only_a_rollback_helps() -> None:
    held = {"patience": {"rollback": 9}, "cooldown": {"halve_lr": 99}}
    state, (first,) = one(start(), HIGH, step=10, **held)
    assert first.kind == "halve_lr" and one(state, HIGH, step=20, **held)[1] == []
    _, done = one(state, 0.12, step=20, good_step=5, last=True, **held)
    assert [a.kind for a in done] == ["rollback"]
    assert one(start(), HIGH, ["halve_lr", "raise_beta"], last=True)[1] == []
    assert one(start(), LOW, last=True)[1] == []
    state = start()
    for _ in range(3):
        state, done = one(state, HIGH, step=10, last=True)
        assert done[-1].kind == "rollback"
    assert one(state, HIGH, step=10, last=True)[1] == [], "three to one step, then the run ends as it is"


@pytest.mark.parametrize("times", [1.0, 1.5, 3.0, 6.0, 13.0, 30.0, 100.0])
@pytest.mark.parametrize("power", [1.5, 2.0, 2.5])
def test_a_run_at_any_rate_ends_within_the_bound(times: float, power: float) -> None:
    """A plant: the KL is a power of the way, each step's length is the rate times a cosine schedule, evaluations at 6, 12, 18 and 24. At
    rate 1 it just reaches 0.09."""
    schedule = [0.5 + 0.5 * math.cos(math.pi * k / 24) for k in range(24)]
    unit = 0.09 ** (1 / power) / sum(schedule)
    state, step, way, good, taken = start(), 0, 0.0, {0: 0.0}, 0
    while step < 24:
        way += sum(schedule[step : step + 6]) * times * unit * state.controls.learning_rate_scale
        step, taken = step + 6, taken + 6
        if way**power <= 0.1:
            good[step] = way
        state, done = one(state, way**power, step=step, good_step=max(good), last=step == 24)
        if done and done[-1].kind == "rollback":
            step = max(good)
            way = good[step]
    assert way**power <= 0.1
    assert taken <= 4 * 24


def test_a_start_over_the_bound_ends() -> None:
    """KL that nothing lowers: in a run of 1000 steps every list of actions comes to its end."""
    for actions in (["rollback"], STANDARD, ["rollback", "raise_beta"]):
        state, step, evaluations = start(), 0, 0
        while step < 1000:
            step, evaluations = step + 10, evaluations + 1
            state, done = one(state, HIGH, actions, step=step)
            if done and done[-1].kind == "rollback":
                step = int(done[-1].new)
        assert evaluations < 150


def test_actions_that_are_at_their_end_are_passed_over() -> None:
    state, taken = simulate([HIGH] * 12, ["halve_lr"])
    assert taken == [["halve_lr"]] * 10 + [[]] * 2
    assert state.controls.learning_rate_scale == 1 / 1024
    state, taken = simulate([HIGH] * 9, ["raise_beta"])
    assert taken == [["raise_beta"]] * 6 + [[]] * 3
    assert state.controls.beta == pytest.approx(1.0)
    _, taken = simulate([HIGH] * 14, ["raise_beta", "halve_lr"])
    assert taken == [["raise_beta"], ["halve_lr"]] * 6 + [["halve_lr"]] * 2


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_rolls_back(kl: float) -> None:
    state, done = one(start(), kl, STANDARD, step=30, good_step=10, controller=AdaptiveBeta(0.1))
    assert [action.kind for action in done] == ["halve_lr", "rollback"]
    assert done[-1].new == 10
    assert done[0].record()["kl"] is None
    assert state.controls.beta == 0.1
    _, done = one(start(), kl, ["raise_beta", "halve_lr"])
    assert [action.kind for action in done] == ["raise_beta"]


# Patience, cool-down, most often


@pytest.mark.parametrize(
    ("more", "kls", "expected"),
    [
        # Two judgements in a row over the bound; one within it starts the count anew, and so does an action.
        ({"patience": {"halve_lr": 2}}, [HIGH, LOW, HIGH, HIGH, HIGH], [[], [], [], ["halve_lr"], []]),
        ({"patience": {"halve_lr": 3}}, [HIGH] * 6, [[], [], ["halve_lr"], [], [], ["halve_lr"]]),
        # Quiet for 25 steps after step 10: the judgements at 20 and 30 count for nothing.
        ({"cooldown": {"halve_lr": 25}}, [HIGH] * 5, [["halve_lr"], [], [], ["halve_lr"], []]),
        (
            {"cooldown": {"halve_lr": 15}, "patience": {"halve_lr": 2}},
            [HIGH] * 5,
            [[], ["halve_lr"], [], [], ["halve_lr"]],
        ),
        ({"most": {"halve_lr": 2}}, [HIGH] * 4, [["halve_lr"], ["halve_lr"], [], []]),
    ],
)
def test_patience_cooldown_and_most(more: dict[str, Any], kls: list[float], expected: list[list[str]]) -> None:
    assert simulate(kls, ["halve_lr"], **more)[1] == expected


def test_each_action_has_its_own_patience() -> None:
    """The order stays: what is next is waited for, although another one has waited long enough."""
    _, taken = simulate([HIGH] * 5, ["raise_beta", "halve_lr"], patience={"halve_lr": 3})
    assert taken == [["raise_beta"], [], [], ["halve_lr"], ["raise_beta"]]
    _, taken = simulate([HIGH] * 4, ["raise_beta", "halve_lr"], most={"raise_beta": 1})
    assert taken == [["raise_beta"], ["halve_lr"], ["halve_lr"], ["halve_lr"]]


def test_quiet_after_a_rollback_counts_from_where_it_went() -> None:
    state, _ = one(start(), HIGH, ["rollback"], step=40, good_step=20, cooldown={"rollback": 15})
    assert state.quiet_until == 35
    assert one(state, HIGH, ["rollback"], step=30, good_step=20)[1] == []
    assert one(state, HIGH, ["rollback"], step=40, good_step=20)[1] != []


def test_nothing_waits_where_the_kl_is_not_finite() -> None:
    waiting = {"patience": {"rollback": 5}, "cooldown": {"rollback": 100}}
    state, done = one(start(), math.nan, ["rollback"], step=30, **waiting)
    assert done[-1].kind == "rollback"
    _, done = one(state, math.nan, ["rollback"], step=30, **waiting)
    assert done[-1].kind == "rollback"


def test_a_window_of_train_steps_is_named() -> None:
    _, (action,) = one(start(), HIGH, ["halve_lr"], step=40, judged_on=TRAIN, window=20)
    assert action.reason.startswith("mean KL 0.2 of the train steps 21 to 40 is over target_kl 0.1: ")
    assert action.record()["judged_on"] == "train"
    both = KLControl(0.1, judged_on=("eval", "train"), window=4)
    assert [step for step in range(1, 13) if both.judges_train_at(step)] == [4, 8, 12]
    assert not any(KLControl(0.1).judges_train_at(step) for step in range(1, 30))


# Adaptive beta


@pytest.mark.parametrize(("kl", "factor"), [(0.11, 1.1), (0.1, 1.0), (0.05, 1.0), (0.049, 0.9), (0.0, 0.9)])
def test_adaptive_beta(kl: float, factor: float) -> None:
    state, done = one(start(0.2), kl, (), controller=AdaptiveBeta(0.1))
    assert state.controls.beta == pytest.approx(0.2 * factor)
    assert [action.kind for action in done] == (["adaptive_beta"] if factor != 1 else [])


def test_adaptive_beta_takes_its_rate() -> None:
    assert one(start(), HIGH, (), controller=AdaptiveBeta(0.25))[0].controls.beta == pytest.approx(0.125)


def test_adaptive_beta_stays_in_its_range() -> None:
    for kl, bound in ((0.0, BETA_RANGE[0]), (1.0, BETA_RANGE[1])):
        state, taken = simulate([kl] * 40, (), controller=AdaptiveBeta(0.1))
        assert state.controls.beta == pytest.approx(0.1 * bound)
        assert taken[-1] == [], "an action that changes nothing is none"


def test_adaptive_beta_comes_before_the_listed_action() -> None:
    state, done = one(start(), HIGH, ["raise_beta"], controller=AdaptiveBeta(0.1))
    assert [(action.kind, action.new) for action in done] == [
        ("adaptive_beta", pytest.approx(0.11)),
        ("raise_beta", pytest.approx(0.165)),
    ]
    assert state.controls.beta == done[-1].new


# State


def test_the_state_goes_through_json_and_on_as_if_it_had_not() -> None:
    state, _ = simulate([HIGH, LOW, HIGH, HIGH], STANDARD)
    copy = ControlState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert copy == state
    assert one(copy, HIGH, step=70, good_step=20) == one(state, HIGH, step=70, good_step=20)


def test_react_leaves_its_state_alone() -> None:
    state = start()
    one(state, HIGH)
    assert state == start()


def test_unknown_action() -> None:
    with pytest.raises(ValueError, match="kl_actions: unknown \\['halve'\\]; known are halve_lr, raise_beta, rollback"):
        one(start(), 0.0, ["halve"])
    with pytest.raises(ValueError, match="kl_judged_on: unknown \\['test'\\]; known are eval, train"):
        KLControl(0.1, judged_on=("test",))
    assert KL_ACTIONS == STANDARD
