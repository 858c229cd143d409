"""What `output_dir` already holds, which checkpoints stay, and which is the best. Oracle: the rules of the options, by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from served_rules import served_model

from jax_dpo.errors import UserError
from jax_dpo.trainer.claim import claimed


def test_a_second_run_is_refused_with_both_ways_out(usual: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = tiny.flags({**usual, "max_steps": 2})
    assert tiny.jax_dpo("train", *options, "--output_dir", out).code == 0
    (out / "notes.txt").write_text("mine")
    before = tiny.snapshot(out)
    refused = tiny.jax_dpo("train", *options, "--output_dir", out)
    assert refused.code == 2
    assert f"{out} holds a run already" in refused.err and "Traceback" not in refused.err
    assert "--resume_from_checkpoint true" in refused.err and "--overwrite_output_dir" in refused.err
    assert tiny.snapshot(out) == before

    # Over again: what the run wrote is gone, what the user put there is not.
    again = tiny.jax_dpo(
        "train",
        *options,
        "--learning_rate",
        1e-4,
        "--save_strategy",
        "no",
        "--overwrite_output_dir",
        "--output_dir",
        out,
    )
    assert again.code == 0, again.err
    assert tiny.checkpoints(out) == []
    assert [r["learning_rate"] for r in tiny.records(out, "train")] == [1e-4, 5e-5]
    assert (out / "notes.txt").read_text() == "mine"
    assert tiny.snapshot(out / "final")["model.safetensors"] != before["final/model.safetensors"]


@pytest.mark.parametrize("more", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "auto"]])
def test_a_directory_where_a_run_is_at_work_is_left_alone(
    more: list[str], usual: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run.jsonl").write_text('{"kind": "start", "step": 0}\n')
    before = tiny.snapshot(tmp_path)
    options = [*tiny.flags({**usual, "max_steps": 1}), "--output_dir", tmp_path, *more]
    with claimed(tmp_path):
        refused = tiny.jax_dpo("train", *options)
    assert refused.code == 2 and "output-dir-in-use" in refused.err and "Traceback" not in refused.err
    assert f"Another run is at work in {tmp_path}" in refused.err
    assert tiny.snapshot(tmp_path) == before
    if "--overwrite_output_dir" in more:
        assert tiny.jax_dpo("train", *options).code == 0  # the claim ends with the run


def test_a_claim_ends_with_its_process_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    held = "import sys, time; from pathlib import Path; from jax_dpo.trainer.claim import claimed\n"
    held += "with claimed(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", held, str(out)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="at work"), claimed(out):
            pass
        other.kill()
    with claimed(out):
        (out / "run.jsonl").write_text("")
    assert [f.name for f in out.iterdir()] == ["run.jsonl"]
    with claimed(tmp_path / "new" / "out"):
        pass
    assert not (tmp_path / "new").exists()


def test_auto_refuses_other_options_by_name(usual: dict[str, Any], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {**usual, "max_steps": 2, "resume_from_checkpoint": "auto", "output_dir": out}
    assert tiny.jax_dpo("train", *tiny.flags(options)).code == 0
    before = tiny.snapshot(out)
    for changed, words in (
        ({"learning_rate": 1e-4}, "learning_rate 0.0005 there, 0.0001 now"),
        ({"dataset_name": data / "chat.jsonl"}, "another data"),
        ({"use_peft": True}, "another reference; another adapter"),
    ):
        refused = tiny.jax_dpo("train", *tiny.flags({**options, **changed}))
        assert refused.code == 2
        assert words in refused.err and "--overwrite_output_dir" in refused.err
        assert tiny.snapshot(out) == before
    # Where the run lies and how it reports is no other run.
    same = tiny.jax_dpo("train", *tiny.flags({**options, "report_to": "tensorboard"}))
    assert same.code == 0 and "finished: nothing to do" in same.out


def test_true_where_nothing_is_there(usual: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    refused = tiny.jax_dpo("train", *tiny.flags(usual), "--resume_from_checkpoint", "true", "--output_dir", out)
    assert refused.code == 2
    assert "there is nothing to go on from" in refused.err and "auto" in refused.err
    assert not (tmp_path / "deep").exists()


def test_a_checkpoint_that_is_not_there(usual: dict[str, Any], tmp_path: Path) -> None:
    out, gone = tmp_path / "out", tmp_path / "other" / "checkpoint-9"
    refused = tiny.jax_dpo("train", *tiny.flags(usual), "--resume_from_checkpoint", gone, "--output_dir", out)
    assert refused.code == 2
    assert str(gone) in refused.err and "Traceback" not in refused.err
    assert not out.exists()


@pytest.fixture(scope="module")
def early(evaluated: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tiny.Ended]:
    """Six evaluated steps of which the KL leaves its bound after the second, with room for one checkpoint."""
    out = tmp_path_factory.mktemp("early") / "out"
    options = {**evaluated, "max_steps": 6, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    options |= {
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "target_kl": 0.1,
        "load_best_model_at_end": True,
    }
    return out, tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", out)


def test_the_best_checkpoint_outlives_the_limit(early: tuple[Path, tiny.Ended]) -> None:
    out, ended = early
    assert ended.code == 3, ended.err
    evals = tiny.records(out, "eval")
    within = {r["step"]: r["eval_rewards/margins"] for r in evals if r["step"] and r["eval_kl_divergence"] <= 0.1}
    best = max(within, key=lambda step: within[step])
    assert 1 <= best < 5 and evals[-1]["eval_kl_divergence"] > 0.1
    assert tiny.checkpoints(out) == [f"checkpoint-{best}", "checkpoint-6"]
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["best"] == {"step": best, "path": f"checkpoint-{best}", "score": within[best]}
    assert verdict["final"] == {"step": 6}
    saved = {r["step"]: (r["score"], r["best"]) for r in tiny.records(out, "checkpoint")}
    assert saved[best] == (within[best], True)
    assert saved[6] == (None, False)
    kl = evals[-1]["eval_kl_divergence"]
    assert ended.last_line == f"trained; gate KL failed: {kl:.3g} > 0.1; exit 3"


def test_only_the_best_checkpoint_is_kept_where_that_is_told(evaluated: dict[str, Any], tmp_path: Path) -> None:
    """Each evaluation that is better than all before it is saved, and a run that goes on begins there. Oracle: the scores of the log."""
    out = tmp_path / "out"
    told = {**evaluated, "eval_steps": 1, "max_steps": 4, "save_strategy": "best", "save_total_limit": 1}
    told |= {"metric_for_best_model": "rewards/margins", "learning_rate": 2e-4}
    ended = tiny.jax_dpo("train", *tiny.flags(told), "--output_dir", out)
    assert ended.code == 0, ended.err
    margins = {r["step"]: r["eval_rewards/margins"] for r in tiny.records(out, "eval") if r["step"]}
    better = [s for s in margins if margins[s] == max(m for t, m in margins.items() if t <= s)]
    assert [r["step"] for r in tiny.records(out, "checkpoint")] == better and len(better) > 1
    assert tiny.checkpoints(out) == [f"checkpoint-{better[-1]}"]
    refused = tiny.jax_dpo("train", *tiny.flags({**told, "eval_strategy": "no"}), "--output_dir", tmp_path / "other")
    assert refused.code == 2 and "found best, which needs evaluations" in refused.err


def test_best_and_final_are_the_models_of_their_steps(
    early: tuple[Path, tiny.Ended], model: Path, data: Path, tmp_path: Path
) -> None:
    from jax_dpo import DPOConfig, DPOTrainer

    out, _ = early
    verdict = json.loads((out / "verdict.json").read_text())
    logged = {r["step"]: r["eval_loss"] for r in tiny.records(out, "eval")}
    for folder, step in (("best", verdict["best"]["step"]), ("final", 6)):
        trainer = DPOTrainer(
            model=str(out / folder),
            ref_model=str(model),
            args=DPOConfig(str(tmp_path), gradient_checkpointing=False),
            eval_dataset=str(data / "eval.jsonl"),
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[step], rel=1e-6)
        served = served_model(out / folder)  # as vLLM reads it
        assert all(np.array_equal(served.tensors[name], x) for name, x in tiny.tensors(out / folder).items())


def test_metric_for_best_model_ranks(evaluated: dict[str, Any], tmp_path: Path) -> None:
    """A rate so high that the loss on held-out pairs is best before the end, and the KL is over its bound from the first step on:
    by the margin within the bound there is no best, by the loss there is."""
    from jax_dpo import DPOConfig, DPOTrainer

    out = tmp_path / "out"
    left_out = ("model_name_or_path", "dataset_name", "eval_dataset")
    options = {k: v for k, v in evaluated.items() if k not in left_out}
    options |= {"max_steps": 4, "eval_steps": 1, "save_steps": 1, "learning_rate": 2e-2, "target_kl": 1e-3}
    trainer = DPOTrainer(
        model=evaluated["model_name_or_path"],
        args=DPOConfig(
            out, **options, metric_for_best_model="eval_loss", load_best_model_at_end=True, lr_scheduler_type="constant"
        ),
        train_dataset=str(evaluated["dataset_name"]),
        eval_dataset=str(evaluated["eval_dataset"]),
    )
    trainer.train()
    losses = {r["step"]: r["eval_loss"] for r in tiny.records(out, "eval") if r["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == losses[best]
    # load_best_model_at_end: what the trainer holds now is the best, whatever came last.
    assert trainer.evaluate()["eval_loss"] == losses[best]
    trainer.save_model(tmp_path / "saved")
    saved, kept = tiny.tensors(tmp_path / "saved"), tiny.tensors(out / "best")
    assert all(np.array_equal(saved[name], kept[name]) for name in kept)
    assert trainer.exit_code == 3


def test_no_checkpoint_within_the_bound_is_no_best(evaluated: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {**evaluated, "learning_rate": 2e-2, "target_kl": 1e-3, "save_total_limit": 1}
    ended = tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", out)
    assert ended.code == 3
    assert json.loads((out / "verdict.json").read_text())["best"] is None
    assert not (out / "best").exists()
    assert tiny.checkpoints(out) == ["checkpoint-4"]
