"""Runs that are killed, stopped and started again. Oracle: the run that nothing happened to, to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

SCRIPT = Path(__file__).with_name("signalled.py")


@pytest.fixture(scope="module")
def options(evaluated: dict[str, Any]) -> list[str]:
    """Eight steps over three epochs; log lines, evaluations and saves all at other steps, so that a window is open at each save."""
    chosen = {"max_steps": 8, "logging_steps": 2, "save_steps": 3, "eval_steps": 4, "weight_decay": 0.0}
    return tiny.flags({**evaluated, **chosen, "resume_from_checkpoint": "auto"})


@pytest.fixture(scope="module")
def unbroken(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    ended = tiny.jax_dpo("train", *options, "--output_dir", out)
    assert ended.code == 0, ended.err
    return out


def signalled(step: int, signals: str, options: list[str], out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, str(step), signals, "train", *options, "--output_dir", out],
        capture_output=True,
        text=True,
        timeout=200,
        env=dict(os.environ),
        check=False,
    )


def assert_equal_to_the_bit(out: Path, unbroken: Path) -> None:
    kinds = ("train", "eval", "kl_action", "verdict")
    found, expected = (tiny.untimed([r for r in tiny.records(p) if r["kind"] in kinds]) for p in (out, unbroken))
    assert found == expected
    for folder in ("final", "best"):
        assert tiny.snapshot(out / folder)["model.safetensors"] == tiny.snapshot(unbroken / folder)["model.safetensors"]


def test_a_killed_run_goes_on_to_the_bit(options: list[str], unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = signalled(4, "SIGKILL", options, out)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert tiny.checkpoints(out) == ["checkpoint-3"]
    assert [r["step"] for r in tiny.records(out, "train")] == [2, 4]
    assert not (out / "final").exists() and not (out / "verdict.json").exists()
    ended = tiny.jax_dpo("train", *options, "--output_dir", out)
    assert ended.code == 0, ended.err
    assert "going on from checkpoint-3, after step 3" in ended.out
    assert [r["step"] for r in tiny.records(out, "resume")] == [3]
    assert tiny.checkpoints(out) == tiny.checkpoints(unbroken) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    assert_equal_to_the_bit(out, unbroken)


def test_sigterm_saves_and_the_same_command_finishes(options: list[str], unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = signalled(4, "SIGTERM", options, out)
    assert stopped.returncode == 75, stopped.stderr
    assert stopped.stderr == ""
    last = stopped.stdout.rstrip().splitlines()[-1]
    assert (
        last
        == "stopped by a signal at step 5 of 8; saved as checkpoint-5; run the same command again to go on; exit 75"
    )
    assert tiny.checkpoints(out) == ["checkpoint-3", "checkpoint-5"]
    assert tiny.records(out)[-1]["kind"] == "end" and tiny.records(out)[-1]["reason"] == "signal"
    assert "stopped by a signal" in (out / "report.html").read_text(encoding="utf-8")
    ended = tiny.jax_dpo("train", *options, "--output_dir", out)
    assert ended.code == 0, ended.err
    assert_equal_to_the_bit(out, unbroken)


def test_a_second_sigterm_ends_at_once(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = signalled(4, "SIGTERM,SIGTERM", options, out)
    assert stopped.returncode == 75, stopped.stderr
    assert tiny.checkpoints(out) == ["checkpoint-3"]
    assert tiny.records(out)[-1]["kind"] == "train"


def test_a_finished_run_is_left_alone(options: list[str], unbroken: Path) -> None:
    before = tiny.snapshot(unbroken)
    ended = tiny.jax_dpo("train", *options, "--output_dir", unbroken)
    assert ended.code == 0
    assert (
        ended.last_line == f"{unbroken} holds this run, finished: nothing to do. --overwrite_output_dir starts it over."
    )
    assert tiny.snapshot(unbroken) == before


def test_a_finished_run_in_python_has_its_trained_policy(
    evaluated: dict[str, Any], unbroken: Path, model: Path, tmp_path: Path
) -> None:
    from jax_dpo import DPOConfig, DPOTrainer

    start = tiny.records(unbroken, "start")[0]
    trainer = DPOTrainer(
        model=str(model),
        args=DPOConfig(**{**start["options"], "output_dir": str(unbroken)}),
        train_dataset=str(evaluated["dataset_name"]),
        eval_dataset=str(evaluated["eval_dataset"]),
    )
    assert trainer.train().global_step == 8
    last = tiny.records(unbroken, "eval")[-1]
    assert trainer.evaluate()["eval_loss"] == last["eval_loss"]
    trainer.save_model(tmp_path / "again")
    saved, final = (tiny.snapshot(p)["model.safetensors"] for p in (tmp_path / "again", unbroken / "final"))
    assert saved == final
    assert trainer.state.log_history[-1]["step"] == 8


def test_a_checkpoint_that_is_named_is_gone_on_from(options: list[str], unbroken: Path, tmp_path: Path) -> None:
    """From another directory: what that one holds is left as it is."""
    before = tiny.snapshot(unbroken)
    source = unbroken / "checkpoint-6"
    ended = tiny.jax_dpo("train", *options, "--resume_from_checkpoint", source, "--output_dir", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert tiny.snapshot(unbroken) == before
    assert tiny.checkpoints(tmp_path / "out") == ["checkpoint-8"]
    assert [r["step"] for r in tiny.records(tmp_path / "out", "train")] == [8]
    found, expected = (tiny.untimed(tiny.records(p, "train"))[-1] for p in (tmp_path / "out", unbroken))
    assert found == expected
    saved, final = (tiny.snapshot(p / "final")["model.safetensors"] for p in (tmp_path / "out", unbroken))
    assert saved == final
