"""Actions judged on train steps. Oracles: the log's own KLs, and the same run without an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

FAST = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 9,
    "save_steps": 1,
    "kl_judged_on": ["train"],
    "kl_window": 2,
    "target_kl": 0.03,
}


@pytest.fixture(scope="module")
def watched(usual: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without held-out pairs that every action was taken in."""
    out = tmp_path_factory.mktemp("judged") / "out"
    options = {
        **usual,
        **FAST,
        "kl_actions": ["halve_lr", "raise_beta", "rollback"],
        "kl_most_actions": {"rollback": 1},
        "learning_rate": 1e-3,
        "max_steps": 11,
        "target_kl": 0.1,
    }
    ended = tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", out)
    assert ended.code == 0, ended.err
    return out


def test_a_run_without_held_out_pairs_is_controlled(watched: Path) -> None:
    written = tiny.records(watched)
    actions = [r for r in written if r["kind"] == "kl_action"]
    in_turn = [
        a["action"] for a in actions if "asks for" not in a["reason"]
    ]  # without the halvings that belong to a rollback
    assert in_turn[:3] == ["halve_lr", "raise_beta", "rollback"]
    assert sum(a["action"] == "rollback" for a in actions) == 1
    assert all(a["judged_on"] == "train" and a["kl"] > 0.1 for a in actions)
    back = next(a for a in actions if a["action"] == "rollback")
    assert 0 < back["new"] < back["old"], "a checkpoint whose train steps held the bound"
    # What came after that checkpoint was given up, and is there once.
    assert [r["step"] for r in written if r["kind"] == "train"] == list(range(1, 12))


def test_the_mean_of_the_window_is_judged(usual: dict[str, Any], tmp_path: Path) -> None:
    options = {**usual, **FAST, "kl_actions": ["halve_lr"], "max_steps": 6, "logging_steps": 1}
    tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", tmp_path / "each")
    tiny.jax_dpo("train", *tiny.flags({**options, "logging_steps": 2}), "--output_dir", tmp_path / "window")
    actions = tiny.records(tmp_path / "each", "kl_action")
    means = {r["step"]: r["kl_divergence"] for r in tiny.records(tmp_path / "window", "train")}
    over = {s: kl for s, kl in means.items() if kl > 0.03 and s < 6}  # after the last step no halving does anything
    assert {a["step"]: a["kl"] for a in actions} == pytest.approx(over)
    assert len(actions) >= 2
    each = tiny.records(tmp_path / "each", "train")
    at = actions[0]["step"]
    assert [r["learning_rate"] for r in each] == [2e-3 if r["step"] <= at else r["learning_rate"] for r in each]
    assert each[at]["learning_rate"] == 1e-3


@pytest.mark.slow
def test_both_are_judged_and_patience_and_quiet_are_kept(evaluated: dict[str, Any], tmp_path: Path) -> None:
    options = {**evaluated, **FAST, "max_steps": 12, "eval_steps": 3, "kl_judged_on": ["eval", "train"]}
    options |= {"kl_actions": ["halve_lr"], "kl_patience": 2, "kl_cooldown": '{"halve_lr": 3}'}
    tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", tmp_path / "out")
    target, over, quiet, expected = 0.03, 0, 0, []
    kls = {r["step"]: ("eval", r["eval_kl_divergence"]) for r in tiny.records(tmp_path / "out", "eval") if r["step"]}
    train = {r["step"]: r["kl_divergence"] for r in tiny.records(tmp_path / "out", "train")}
    for step in range(2, 13, 2):
        # Steps of nearly equal numbers of tokens; none of these means is near the bound.
        kls.setdefault(step, ("train", (train[step - 1] + train[step]) / 2))
    for step in sorted(kls):
        if kls[step][1] <= target or step < quiet:
            over = 0
        elif (over := over + 1) == 2:
            expected.append((step, kls[step][0]))
            over, quiet = 0, step + 3
    actions = [(a["step"], a["judged_on"]) for a in tiny.records(tmp_path / "out", "kl_action")]
    assert actions == expected
    assert len(expected) >= 2


def test_it_goes_on_in_the_middle_of_a_window(watched: Path, usual: dict[str, Any], tmp_path: Path) -> None:
    """From a checkpoint inside a window of two steps, and with a patience that began before it."""
    options = {**usual, **FAST, "kl_actions": ["halve_lr"], "kl_patience": 2}
    tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", tmp_path / "whole")
    resumed = {**options, "resume_from_checkpoint": tmp_path / "whole" / "checkpoint-5"}
    tiny.jax_dpo("train", *tiny.flags(resumed), "--output_dir", tmp_path / "again")
    after = lambda folder, kind: [r for r in tiny.untimed(tiny.records(folder, kind)) if r["step"] > 5]  # noqa: E731
    for kind in ("train", "kl_action"):
        assert after(tmp_path / "again", kind) == after(tmp_path / "whole", kind)
    assert after(tmp_path / "whole", "kl_action")
