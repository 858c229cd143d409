"""Steps and evaluations that are not finite, through the command line.

The disease is real: the model's embedding of one word is infinite, so every pair with that word, and no other, has no finite numbers.
Oracles: which rows have the word; a run without them; weights to the bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

WORD = "dry"  # in no other row
SICK = (10, 12)  # rows of the file, from 1: both are of step 2


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found = tiny.text_rows(24, seed=7)
    for row in SICK:
        found[row - 1]["chosen"] = f" {WORD} " + found[row - 1]["chosen"].strip()
    return found


@pytest.fixture(scope="module")
def sick_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sick") / "model"
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {i for row in tiny.text_rows(24, seed=7) for side in row.values() for i in tokenizer(side)["input_ids"]}
    own = [i for i in tokenizer(f" {WORD} ")["input_ids"] if i not in ids]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][own[0]] = np.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def options(
    usual: dict[str, Any], sick_model: Path, rows: list[dict[str, Any]], tmp_path_factory: Any
) -> dict[str, Any]:
    file = tiny.write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", rows)
    return {
        **usual,
        "model_name_or_path": sick_model,
        "dataset_name": file,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "save_steps": 1,
    }


def test_a_run_stops_and_names_the_rows(options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", out)
    assert ended.code == 2
    for word in ("step 2", "not finite", "the pairs that made it", "pairs.jsonl, rows 10, 12", "nonfinite_steps"):
        assert word in ended.err
    assert tiny.checkpoints(out) == ["checkpoint-1"]


@pytest.mark.parametrize(
    "more", [{}, pytest.param({"micro_batch_tokens": 32}, marks=pytest.mark.slow)], ids=["one", "many"]
)
def test_a_skipped_step_leaves_nothing(
    more: dict[str, Any], options: dict[str, Any], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Steps 1 and 3 are those of a run that never saw the pairs of step 2."""
    out, without = tmp_path / "out", tmp_path / "without"
    ended = tiny.jax_dpo("train", *tiny.flags({**options, **more, "nonfinite_steps": "skip"}), "--output_dir", out)
    assert ended.code == 0, ended.err
    (record,) = tiny.records(out, "nonfinite")
    assert record["step"] == 2 and record["what"] == "loss" and record["action"] == "skipped"
    assert record["rows"].endswith("pairs.jsonl, rows 10, 12")
    assert [r["step"] for r in tiny.records(out, "train")] == [1, 3]
    assert "step 2 skipped" in ended.out and "1 of 3 steps were skipped" in ended.out
    assert "step 2 skipped" in (out / "report.html").read_text(encoding="utf-8")
    rest = tiny.write_rows(tmp_path / "rest.jsonl", rows[:8] + rows[16:])
    plain = {**options, **more, "dataset_name": rest, "max_steps": 2}
    assert tiny.jax_dpo("train", *tiny.flags(plain), "--output_dir", without).code == 0
    for name, weight in tiny.tensors(without / "final").items():
        np.testing.assert_array_equal(tiny.tensors(out / "final")[name], weight, err_msg=name)
    for got, want in zip(tiny.records(out, "train"), tiny.records(without, "train"), strict=True):
        assert got["loss"] == want["loss"] and got["grad_norm"] == want["grad_norm"]


def test_a_run_that_goes_on_after_a_skipped_step(options: dict[str, Any], tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    skip = {**options, "nonfinite_steps": "skip", "resume_from_checkpoint": "auto"}
    assert tiny.jax_dpo("train", *tiny.flags(skip), "--output_dir", whole).code == 0
    shutil.copytree(whole, out)
    for name in ("final", "best", "checkpoint-3"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "verdict.json").unlink()
    assert tiny.jax_dpo("train", *tiny.flags({**skip, "resume_from_checkpoint": "true"}), "--output_dir", out).code == 0
    for name, weight in tiny.tensors(whole / "final").items():
        np.testing.assert_array_equal(tiny.tensors(out / "final")[name], weight, err_msg=name)


def test_a_window_that_a_skipped_step_ends_is_the_same_after_an_interruption(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Logged in twos: the record after step 2 is about step 1, which was before the interruption."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    skip = {**options, "nonfinite_steps": "skip", "logging_steps": 2}
    assert tiny.jax_dpo("train", *tiny.flags(skip), "--output_dir", whole).code == 0
    again = {**skip, "resume_from_checkpoint": whole / "checkpoint-1"}
    ended = tiny.jax_dpo("train", *tiny.flags(again), "--output_dir", out)
    assert ended.code == 0, ended.err
    (record,), expected = tiny.records(out, "train"), tiny.records(whole, "train")
    assert tiny.untimed([record]) == tiny.untimed(expected) and record["step"] == 2


@pytest.mark.slow
def test_ten_in_a_row_end_the_run(options: dict[str, Any], rows: list[dict[str, Any]], tmp_path: Path) -> None:
    sick = tiny.write_rows(tmp_path / "sick.jsonl", [rows[SICK[0] - 1]] * 8)
    many = {**options, "dataset_name": sick, "nonfinite_steps": "skip", "max_steps": 20, "save_strategy": "no"}
    ended = tiny.jax_dpo("train", *tiny.flags(many), "--output_dir", tmp_path / "out")
    assert ended.code == 2
    assert "10 steps in a row" in ended.err and "step 10" in ended.err
    assert len(tiny.records(tmp_path / "out", "nonfinite")) == 10


def test_an_evaluation_names_its_rows(
    options: dict[str, Any], rows: list[dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    """Held against a healthy reference, since equal models with such a word are refused before they train."""
    out, healthy = tmp_path / "out", tmp_path / "healthy.jsonl"
    tiny.write_rows(healthy, rows[:8])
    evaluated = {
        **options,
        "dataset_name": healthy,
        "eval_dataset": options["dataset_name"],
        "ref_model_name_or_path": model,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 1,
        "save_strategy": "no",
    }
    ended = tiny.jax_dpo("train", *tiny.flags(evaluated), "--output_dir", out)
    (record,) = tiny.records(out, "nonfinite")
    assert record["what"] == "evaluation" and record["rows"].endswith("pairs.jsonl, rows 10, 12")
    assert "held-out pairs whose numbers are not finite" in ended.out
    assert ended.code == 3, "a loss that is not finite does not pass for a good one"


@pytest.mark.slow
def test_evaluate_names_its_rows_too(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Of two sets, one of them called train, and of pairs that are longer than any row of the training."""
    from jax_dpo import DPOConfig, DPOTrainer

    sick, file = str(options["model_name_or_path"]), str(options["dataset_name"])
    given = {"model_name_or_path": sick, "ref_model_name_or_path": model, "eval_dataset": file}
    ended = tiny.jax_dpo("evaluate", *tiny.flags(given))
    assert ended.code == 0, ended.err
    assert "held-out pairs whose numbers are not finite" in ended.out and "pairs.jsonl, rows 10, 12" in ended.out
    assert "nan" in ended.out

    healthy = tiny.write_rows(tmp_path / "healthy.jsonl", tiny.text_rows(8, seed=7))
    long = [{**row, "chosen": row["chosen"] + " water air sun" * 12} for row in tiny.text_rows(3, seed=7)]
    long[1]["rejected"] += f" {WORD} water"
    sets = {"train": str(tiny.write_rows(tmp_path / "long.jsonl", long)), "other": str(healthy)}
    args = DPOConfig(str(tmp_path / "out"), bf16=False, max_steps=1, eval_strategy="steps", save_strategy="no")
    trainer = DPOTrainer(sick, str(model), args, train_dataset=str(healthy), eval_dataset=sets)
    trainer.train()
    (record,) = [r for r in trainer.records if r["kind"] == "nonfinite"]
    assert record["rows"].endswith("long.jsonl, row 2")
    with pytest.warns(UserWarning, match=r"long\.jsonl, row 2"):
        found = trainer.evaluate()
    assert np.isnan(found["eval_train_loss"]) and np.isfinite(found["eval_other_loss"])
