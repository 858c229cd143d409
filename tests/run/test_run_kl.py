"""A run whose KL passes its bound: what is done, in which order, and where it ends. Oracle: the log, checked against itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from jax_dpo.train.controllers import DualKLCoef, PIBeta, Setting
from jax_dpo.train.loop import Loop

FAST = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 8,
    "logging_steps": 1,
    "save_steps": 1,
    "eval_steps": 1,
}


@pytest.fixture(scope="module")
def controlled(
    evaluated: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tiny.Ended, list[int]]:
    """A run that takes every action; also how often the step was compiled."""
    out = tmp_path_factory.mktemp("kl") / "out"
    compiled: list[int] = []
    original = Loop._compile
    options = {
        **evaluated,
        **FAST,
        "target_kl": 0.06,
        "kl_actions": ["halve_lr", "raise_beta", "rollback"],
        "save_total_limit": 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_compile", lambda self, args: compiled.append(1) or original(self, args))
        ended = tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", out)
    return out, ended, compiled


def test_actions_come_in_the_order_given(controlled: tuple[Path, tiny.Ended, list[int]]) -> None:
    out, ended, _ = controlled
    actions = tiny.records(out, "kl_action")
    assert [a["action"] for a in actions][:2] == ["halve_lr", "raise_beta"]
    assert "rollback" in [a["action"] for a in actions], ended.out
    assert all(a["kl"] > 0.06 and a["target_kl"] == 0.06 for a in actions)
    for before, after in itertools.pairwise(actions):
        if before["option"] == after["option"] == "learning_rate":
            assert after["old"] == before["new"]
    assert "KL control" in ended.out


def test_the_run_ends_at_its_planned_step_within_the_bound(controlled: tuple[Path, tiny.Ended, list[int]]) -> None:
    out, ended, _ = controlled
    steps = [r["step"] for r in tiny.records(out, "train")]
    assert steps == list(range(1, 9))
    last = tiny.records(out, "eval")[-1]
    assert last["step"] == 8
    assert (last["eval_kl_divergence"] <= 0.06) == (ended.code == 0)


def test_changed_values_are_in_force_without_a_new_trace(controlled: tuple[Path, tiny.Ended, list[int]]) -> None:
    out, _, compiled = controlled
    written = tiny.records(out)
    last = max(i for i, r in enumerate(written) if r["kind"] == "train")
    actions = [r for r in written[:last] if r["kind"] == "kl_action"]
    rates = [a["new"] for a in actions if a["option"] == "learning_rate"]
    betas = [a["new"] for a in actions if a["option"] == "beta"]
    assert written[last]["learning_rate"] == pytest.approx(rates[-1], rel=1e-9)
    assert written[last]["beta"] == pytest.approx(betas[-1], rel=1e-9)
    assert len(compiled) == 1


def test_abandoned_steps_leave_nothing(controlled: tuple[Path, tiny.Ended, list[int]]) -> None:
    out, _, _ = controlled
    evaluations = [r["step"] for r in tiny.records(out, "eval")]
    assert evaluations == sorted(set(evaluations))
    state = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())
    logged = [e["step"] for e in state["log_history"] if "loss" in e]
    assert logged == list(range(1, 9))


def test_evaluations_are_at_the_configured_beta(controlled: tuple[Path, tiny.Ended, list[int]]) -> None:
    out, _, _ = controlled
    assert {r["beta"] for r in tiny.records(out, "eval")} == {0.1}


def test_a_rollback_goes_on_from_the_checkpoint(evaluated: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the same run resumed by hand from that checkpoint, with the learning rate that the rollback halved."""
    options = {**evaluated, **FAST, "learning_rate": 4e-4, "max_steps": 2}
    plain, by_hand, out = tmp_path / "plain", tmp_path / "by hand", tmp_path / "out"
    tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", plain)
    first, second = (r["eval_kl_divergence"] for r in tiny.records(plain, "eval")[1:])
    between = {"target_kl": (first + second) / 2}
    tiny.jax_dpo("train", *tiny.flags({**options, **between, "kl_actions": ["rollback"]}), "--output_dir", out)
    halved, back = tiny.records(out, "kl_action")[:2]
    assert (halved["action"], halved["new"]) == ("halve_lr", 2e-4)
    assert (back["action"], back["old"], back["new"]) == ("rollback", 2, 1)
    resumed = {**options, "learning_rate": 2e-4, "resume_from_checkpoint": plain / "checkpoint-1"}
    # The control state of the checkpoint holds the configured rate of its run, and the schedule is constant: only the rate differs.
    tiny.jax_dpo("train", *tiny.flags(resumed), "--output_dir", by_hand)
    want, got = tiny.records(by_hand, "train")[-1], tiny.records(out, "train")[-1]
    assert got["step"] == want["step"] == 2
    assert got["learning_rate"] == want["learning_rate"] == 2e-4
    assert got["loss"] == want["loss"]
    assert (
        tiny.records(out, "eval")[-1]["eval_kl_divergence"] == tiny.records(by_hand, "eval")[-1]["eval_kl_divergence"]
    )


@pytest.mark.slow
def test_a_rollback_to_the_start_may_begin_with_another_beta(evaluated: dict[str, Any], tmp_path: Path) -> None:
    """The loss of two equal models is 1 / (2 beta)^2 with ipo: once beta was raised, the start is not that of the configured one."""
    options = {**evaluated, **FAST, "loss_type": "ipo", "learning_rate": 1e-2, "max_steps": 4, "target_kl": 1e-3}
    options |= {"save_strategy": "no", "kl_actions": ["raise_beta", "rollback"]}
    ended = tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", tmp_path / "out")
    assert ended.code in (0, 3), ended.err
    written = tiny.records(tmp_path / "out")
    (back,) = [i for i, r in enumerate(written) if r.get("action") == "rollback" and r["new"] == 0][-1:]
    again = next(r for r in written[back:] if r["kind"] == "train")
    assert again["step"] == 1 and again["beta"] > 0.1
    assert again["loss"] == pytest.approx((0.5 / again["beta"]) ** 2, rel=1e-5)


def test_adaptive_beta_follows_the_kl(evaluated: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {**evaluated, **FAST, "max_steps": 4, "adaptive_beta": True, "target_kl": 0.05, "save_strategy": "no"}
    tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", out)
    beta = 0.1
    for evaluation in tiny.records(out, "eval")[1:]:
        kl = evaluation["eval_kl_divergence"]
        factor = 1.1 if kl > 0.05 else 0.9 if kl < 0.025 else 1.0
        beta *= factor
        following = [r for r in tiny.records(out, "train") if r["step"] == evaluation["step"] + 1]
        if following:
            assert following[0]["beta"] == pytest.approx(beta, rel=1e-9)
    assert beta != 0.1


@pytest.mark.parametrize(
    ("controller", "turned", "more"),
    [("pi_beta", "beta", {}), ("dual_kl_coef", "kl_coef", {"kl_reduction": "sequence", "dual_kl_rate": 0.5})],
)
def test_controllers_turn_what_they_say(
    evaluated: dict[str, Any], tmp_path: Path, controller: str, turned: str, more: dict[str, Any]
) -> None:
    """What follows from the logged KLs by the controller's own rule is what the next step was taken with."""
    out = tmp_path / "out"
    bound = {"target_kl": 0.02, "save_strategy": "no", "max_steps": 4}
    tiny.jax_dpo(
        "train", *tiny.flags({**evaluated, **FAST, **bound, "kl_controller": controller, **more}), "--output_dir", out
    )
    configured = {"beta": 0.1, "kl_coef": 0.0}[turned]
    rule: Any = PIBeta(1.0, 0.3) if controller == "pi_beta" else DualKLCoef(0.5)
    setting = Setting(configured)
    for evaluation in tiny.records(out, "eval")[1:]:
        setting = rule(setting, kl=evaluation["eval_kl_divergence"], target_kl=0.02, configured=configured)
        for following in tiny.records(out, "train"):
            if following["step"] == evaluation["step"] + 1:
                assert following[turned] == pytest.approx(setting.value, rel=1e-9)
    assert setting.value > configured
    assert {r["action"] for r in tiny.records(out, "kl_action")} == {controller}
    # Evaluations are made at the configured values, or they could not be compared.
    assert {r["beta"] for r in tiny.records(out, "eval")} == {0.1}


def test_a_bound_that_is_broken_fails_the_gate(evaluated: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {**evaluated, **FAST, "max_steps": 3, "target_kl": 0.01}
    ended = tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", out)
    assert ended.code == 3
    assert "gate KL failed" in ended.last_line
    assert ended.last_line.endswith("exit 3")
    verdict = json.loads((out / "verdict.json").read_text())
    gate = next(g for g in verdict["gates"] if g["name"] == "kl")
    assert gate["status"] == "failed"
    assert gate["value"] > 0.01
    assert "learning_rate" in gate["advice"]
    assert (out / "final" / "model.safetensors").exists()
    assert not (out / "best").exists()
    assert np.isfinite(tiny.records(out, "eval")[-1]["eval_loss"])
