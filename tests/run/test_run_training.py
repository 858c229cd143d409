"""A whole run through the command line and through DPOTrainer. Oracles: ln 2 and 0 where nothing has moved, TRL's metric names,
arithmetic on the pairs' lengths, and the files against each other."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

# TRL 1.16's metrics of a log line, and what this trainer adds.
TRL = {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "entropy", "mean_token_accuracy"}
TRL |= {f"{a}/{b}" for a in ("rewards", "logps", "logits") for b in ("chosen", "rejected")}
TRL |= {"rewards/accuracies", "rewards/margins"}
ADDED = {"kl_divergence", "kl_divergence/chosen", "kl_divergence/rejected", "beta", "kl_coef", "step_time"}
ADDED |= {"tokens_per_second", "pairs_per_second", "row_fill"}
ADDED |= {f"kl_sequence{part}" for part in ("", "/chosen", "/rejected")}
ADDED |= {f"{kl}/{part}" for kl in ("kl_divergence", "kl_sequence") for part in ("p50", "p90", "max")}
EVAL = {
    f"eval_{name}" for name in (TRL | ADDED) - {"epoch", "learning_rate", "grad_norm", "beta", "kl_coef", "step_time"}
}
EVAL -= {"eval_tokens_per_second", "eval_pairs_per_second", "eval_row_fill"}
EVAL |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch", "beta"}
EVAL |= {f"eval_length/{name}" for name in ("chosen", "rejected", "chosen_longer")}

SEQUENCE = tiny.PROMPT + tiny.ANSWER


@pytest.fixture(scope="module")
def run(evaluated: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tiny.Ended]:
    out = tmp_path_factory.mktemp("run") / "out"
    return out, tiny.jax_dpo("train", *tiny.flags(evaluated), "--report_to", "tensorboard", "--output_dir", out)


def test_the_run_passes_and_leaves_everything(run: tuple[Path, tiny.Ended]) -> None:
    out, ended = run
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert ended.last_line == "trained; all gates passed; best checkpoint-4; exit 0"
    assert {p.name for p in out.iterdir()} == {
        *("best", "final", "checkpoint-2", "checkpoint-4", "tensorboard"),
        *("run.jsonl", "verdict.json", "report.html"),
    }
    model_files = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    model_files |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {p.name for p in (out / "final").iterdir()} == model_files
    assert tiny.snapshot(out / "best")["model.safetensors"] == tiny.snapshot(out / "final")["model.safetensors"]


def test_records_come_in_the_order_of_the_run(run: tuple[Path, tiny.Ended]) -> None:
    out, _ = run
    kinds = [(r["kind"], r["step"]) for r in tiny.records(out)]
    assert kinds == [
        *(("start", 0), ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("checkpoint", 2)),
        *(("train", 3), ("train", 4), ("eval", 4), ("checkpoint", 4), ("verdict", 4), ("end", 4)),
    ]


def test_metrics_have_trl_s_names(run: tuple[Path, tiny.Ended]) -> None:
    out, _ = run
    for kind, names in (("train", TRL | ADDED), ("eval", EVAL)):
        for record in tiny.records(out, kind):
            assert set(record) - {"kind", "step", "time", "kl_profile"} == names
            assert all(math.isfinite(record[name]) for name in names)


def test_before_anything_moved_policy_and_reference_are_equal(run: tuple[Path, tiny.Ended]) -> None:
    out, _ = run
    for found, prefix in ((tiny.records(out, "eval")[0], "eval_"), (tiny.records(out, "train")[0], "")):
        assert abs(found[prefix + "loss"] - math.log(2)) <= 2e-7
        for name in ("rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "kl_divergence"):
            assert found[prefix + name] == 0.0


def test_the_policy_learns_what_it_is_shown(run: tuple[Path, tiny.Ended]) -> None:
    out, _ = run
    first, *_, last = tiny.records(out, "eval")
    assert last["eval_loss"] < first["eval_loss"] - 0.05
    assert last["eval_rewards/margins"] > 0.1
    assert last["eval_rewards/accuracies"] == 1.0
    assert 0 < last["eval_kl_divergence"] < 0.1


def test_counts_are_those_of_the_pairs(run: tuple[Path, tiny.Ended]) -> None:
    out, _ = run
    for i, record in enumerate(tiny.records(out, "train"), 1):
        assert record["num_tokens"] == i * 8 * 2 * SEQUENCE
        assert record["epoch"] == pytest.approx(i * 8 / 24, abs=1e-12)
        assert record["learning_rate"] == pytest.approx(5e-4 * (1 - (i - 1) / 4), rel=1e-12)
        # Two trees of 15 tokens lie in each row of 32.
        assert record["row_fill"] == 2 * (tiny.PROMPT + 2 * tiny.ANSWER) / 32
        assert record["grad_norm"] > 0
    assert [r["eval_num_tokens"] for r in tiny.records(out, "eval")] == [i * 8 * 2 * SEQUENCE for i in (0, 2, 4)]
    start = tiny.records(out, "start")[0]
    assert start["data"]["train"]["kept"] == 24
    assert start["data"]["eval"]["eval"]["kept"] == 8
    assert start["plan"] | {"seconds": 0, "warnings": []} == {
        "steps": 4,
        "epochs": pytest.approx(4 / 3),
        "pairs_per_step": 8,
        "warmup_steps": 0,
        "row_tokens": 32,
        "rows": 2,
        "row_fill": 0.9375,
        "seconds": 0,
        "warnings": [],
    }


def test_verdict_and_report_say_how_it_went(run: tuple[Path, tiny.Ended]) -> None:
    out, ended = run
    verdict = json.loads((out / "verdict.json").read_text())
    last = tiny.records(out, "eval")[-1]
    assert verdict["passed"] and verdict["exit_code"] == 0
    assert {g["name"]: g["status"] for g in verdict["gates"]} == dict.fromkeys(
        ("completed", "kl", "margin", "improving"), "passed"
    )
    assert verdict["best"] == {"step": 4, "path": "checkpoint-4", "score": last["eval_rewards/margins"]}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert verdict["headline"] in page and "<svg" in page and "https://" not in page
    assert verdict["headline"] == ended.last_line


def test_checkpoints_hold_trl_s_trainer_state(run: tuple[Path, tiny.Ended]) -> None:
    out, _ = run
    scores = {r["step"]: r["eval_rewards/margins"] for r in tiny.records(out, "eval")}
    for step in (2, 4):
        state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["global_step"] == step and state["max_steps"] == 4
        assert state["best_metric"] == scores[step]
        assert state["best_model_checkpoint"] == str(out / f"checkpoint-{step}")
        seen = [(e["step"], e.get("loss"), e.get("eval_loss")) for e in state["log_history"]]
        written = [r for r in tiny.records(out) if r["kind"] in ("train", "eval") and r["step"] <= step]
        assert seen == [(r["step"], r.get("loss"), r.get("eval_loss")) for r in written]


def test_tensorboard_has_train_and_eval_side_by_side(run: tuple[Path, tiny.Ended]) -> None:
    from tensorboardX.proto.event_pb2 import Event

    out, _ = run
    (path,) = (out / "tensorboard").glob("events.out.tfevents.*")
    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event()
        event.ParseFromString(data[at + 12 : at + 12 + length])
        at += 16 + length
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    for record in tiny.records(out, "train"):
        assert found["loss/train", record["step"]] == np.float32(record["loss"])
    for record in tiny.records(out, "eval"):
        assert found["loss/eval", record["step"]] == np.float32(record["eval_loss"])
        assert found["kl_divergence/eval", record["step"]] == np.float32(record["eval_kl_divergence"])


def test_the_written_model_is_the_one_that_was_evaluated(
    run: tuple[Path, tiny.Ended], model: Path, data: Path, tmp_path: Path
) -> None:
    from jax_dpo import DPOConfig, DPOTrainer

    out, _ = run
    trainer = DPOTrainer(
        model=str(out / "final"),
        ref_model=str(model),
        args=DPOConfig(str(tmp_path / "none"), gradient_checkpointing=False),
        eval_dataset=str(data / "eval.jsonl"),
    )
    found = trainer.evaluate()
    logged = tiny.records(out, "eval")[-1]
    for name in ("eval_loss", "eval_rewards/margins", "eval_kl_divergence", "eval_logps/chosen"):
        assert found[name] == pytest.approx(logged[name], rel=1e-5)
    assert not (tmp_path / "none").exists()


def test_the_same_run_in_python_gives_the_same_numbers(
    run: tuple[Path, tiny.Ended], evaluated: dict[str, Any], tmp_path: Path
) -> None:
    from jax_dpo import DPOConfig, DPOTrainer

    options = {k: v for k, v in evaluated.items() if k not in ("model_name_or_path", "dataset_name", "eval_dataset")}
    trainer = DPOTrainer(
        model=evaluated["model_name_or_path"],
        args=DPOConfig(str(tmp_path / "out"), **options),
        train_dataset=str(evaluated["dataset_name"]),
        eval_dataset=str(evaluated["eval_dataset"]),
    )
    output = trainer.train()
    out, _ = run
    both = ("train", "eval")
    ours, theirs = (tiny.untimed([r for r in tiny.records(p) if r["kind"] in both]) for p in (tmp_path / "out", out))
    assert ours == theirs
    assert tiny.snapshot(tmp_path / "out" / "final") == tiny.snapshot(out / "final")
    history = trainer.state.log_history
    assert [e["loss"] for e in history if "loss" in e] == [r["loss"] for r in theirs if r["kind"] == "train"]
    assert output.global_step == 4 == trainer.state.global_step
    assert output.training_loss == pytest.approx(np.mean([r["loss"] for r in theirs if r["kind"] == "train"]))
    assert output.metrics["train_runtime"] > 0 and output.metrics["train_loss"] == output.training_loss
    assert trainer.state.best_metric == theirs[-1]["eval_rewards/margins"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-4")
    assert set(trainer.train_dataset[0]) == {"prompt_ids", "chosen_ids", "rejected_ids"}


def test_conversations_train(usual: dict[str, Any], data: Path, tmp_path: Path) -> None:
    options = {**usual, "dataset_name": data / "chat.jsonl", "max_steps": 3, "save_strategy": "no"}
    ended = tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", tmp_path / "out")
    assert ended.code == 0, ended.err
    losses = [r["loss"] for r in tiny.records(tmp_path / "out", "train")]
    assert abs(losses[0] - math.log(2)) <= 2e-7
    assert losses[-1] < losses[1] < losses[0]
    # A run that keeps no checkpoint still leaves what it was made for.
    assert tiny.checkpoints(tmp_path / "out") == []
    before, after = tiny.tensors(usual["model_name_or_path"]), tiny.tensors(tmp_path / "out" / "final")
    assert before.keys() == after.keys()
    assert all(np.abs(before[name] - after[name]).max() > 0 for name in before if name != "model.embed_tokens.weight")


def test_rows_with_a_small_gap_are_dropped_and_named(usual: dict[str, Any], data: Path, tmp_path: Path) -> None:
    options = {**usual, "dataset_name": data / "scored.jsonl", "max_steps": 1, "save_strategy": "no"}
    ended = tiny.jax_dpo(
        "train", *tiny.flags(options), "--drop_rows", "invalid", "small_gap", "--output_dir", tmp_path / "out"
    )
    assert ended.code == 0, ended.err
    start = tiny.records(tmp_path / "out", "start")[0]
    assert start["data"]["train"] | {"name": ""} == {
        "name": "",
        "rows": 24,
        "kept": 18,
        "dropped": {"small_gap": 6},
        "cut": 0,
    }
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(d["row"], d["reason"]) for d in dropped] == [(row, "small_gap") for row in (4, 8, 12, 16, 20, 24)]


@pytest.mark.parametrize(("given", "rows"), [(None, 32), ("auto", 32), (96, 96), ("none", 32)])
def test_pad_to_multiple_of_lengthens_rows(
    given: Any, rows: int, usual: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    from jax_dpo import DPOConfig, DPOTrainer

    args = DPOConfig(str(tmp_path), per_device_train_batch_size=8, pad_to_multiple_of=given)
    trainer = DPOTrainer(model=usual["model_name_or_path"], args=args, train_dataset=str(data / "train.jsonl"))
    assert trainer.engine.feed.shape.row_tokens % rows == 0
    assert (trainer.engine.feed.shape.row_tokens == 32) == (rows == 32)
