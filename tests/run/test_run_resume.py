"""Runs that are killed, stopped and started again. Oracle: the run that nothing happened to, to the bit."""

from __future__ import annotations

import os
import shutil
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


def signalled(step: int | str, signals: str, options: list[str], out: Path) -> subprocess.CompletedProcess[str]:
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
    for folder in [name for name in ("final", "best") if (unbroken / name).exists()]:
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


@pytest.mark.slow
def test_a_run_killed_after_rollbacks_goes_on_with_the_changed_values(
    evaluated: dict[str, Any], tmp_path: Path
) -> None:
    """It goes back to the start, then to checkpoint-3, and is killed before it saves again."""
    chosen = {"learning_rate": 2e-3, "lr_scheduler_type": "constant", "max_steps": 5, "save_steps": 1, "eval_steps": 1}
    chosen |= {"target_kl": 0.06, "kl_actions": ["halve_lr", "raise_beta", "rollback"], "save_total_limit": 2}
    options = tiny.flags({**evaluated, **chosen, "resume_from_checkpoint": "auto"})
    out, whole = tmp_path / "out", tmp_path / "whole"
    unbroken = tiny.jax_dpo("train", *options, "--output_dir", whole)
    rollbacks = [(r["old"], r["new"]) for r in tiny.records(whole, "kl_action") if r["action"] == "rollback"]
    assert rollbacks[:2] == [(3, 0), (5, 3)]
    killed = signalled("4:2", "SIGKILL", options, out)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert tiny.checkpoints(out)[-1] == "checkpoint-3"
    ended = tiny.jax_dpo("train", *options, "--output_dir", out)
    assert ended.code == unbroken.code, ended.err
    assert "going on from checkpoint-3, after step 3" in ended.out
    assert tiny.checkpoints(out) == tiny.checkpoints(whole)
    assert_equal_to_the_bit(out, whole)


@pytest.mark.slow
def test_dropout_is_the_same_after_a_resumption(usual: dict[str, Any], tmp_path: Path) -> None:
    """The random numbers of a step are a function of the seed and the step."""
    options = {**usual, "use_peft": True, "lora_dropout": 0.5, "learning_rate": 5e-2, "disable_dropout": False}
    options |= {"use_dora": True, "lora_modules_to_save": ["norm"], "lora_target_modules": ["q_proj", "down_proj"]}
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", whole).code == 0
    again = {**options, "resume_from_checkpoint": whole / "checkpoint-2", "output_dir": out}
    assert tiny.jax_dpo("train", *tiny.flags(again)).code == 0
    assert tiny.untimed(tiny.records(out, "train")) == tiny.untimed(tiny.records(whole, "train"))[2:]
    found, expected = (tiny.snapshot(p / "final")["adapter_model.safetensors"] for p in (out, whole))
    assert found == expected
    written = tiny.tensors(out / "final", "adapter_model.safetensors")
    ends = {name.removeprefix("base_model.model.model.") for name in written}
    assert {"norm.weight", "layers.0.input_layernorm.weight", "layers.1.mlp.down_proj.lora_magnitude_vector"} <= ends


def test_a_finished_run_that_failed_a_gate_says_so_again(evaluated: dict[str, Any], tmp_path: Path) -> None:
    options = tiny.flags({**evaluated, "max_steps": 2, "target_kl": 1e-4, "resume_from_checkpoint": "auto"})
    assert tiny.jax_dpo("train", *options, "--output_dir", tmp_path / "out").code == 3
    again = tiny.jax_dpo("train", *options, "--output_dir", tmp_path / "out")
    assert again.code == 3 and "finished: nothing to do" in again.last_line


@pytest.mark.slow
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


def test_a_damaged_checkpoint_is_passed_over_and_said(options: list[str], unbroken: Path, tmp_path: Path) -> None:
    """And where all are damaged nothing is deleted: the ways out are named."""
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    (out / "verdict.json").unlink()
    first, *_, newest = sorted(tiny.checkpoints(out))

    def harm(checkpoint: str) -> None:
        (out / checkpoint / "trainer_state.json").write_text("{")

    harm(newest)
    ended = tiny.jax_dpo("train", *options, "--output_dir", out)
    assert ended.code == 0, ended.err
    (resumed,) = tiny.records(out, "resume")
    assert resumed["from"] != newest and f"{newest} is passed over" in resumed["warnings"][0]
    assert "[checkpoint-passed-over]" in ended.out + ended.err
    assert_equal_to_the_bit(out, unbroken)

    (out / "verdict.json").unlink()
    for checkpoint in tiny.checkpoints(out):
        harm(checkpoint)
    before = tiny.snapshot(out)
    refused = tiny.jax_dpo("train", *options, "--output_dir", out)
    assert refused.code == 2 and "--overwrite_output_dir" in refused.err and f"{first} is passed over" in refused.err
    assert tiny.snapshot(out) == before
