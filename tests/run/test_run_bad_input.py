"""What a user may get wrong: one clear message, exit 2, nothing half written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

Options = dict[str, Any]
Case = Callable[[Path, Options], Options]


def copied(folder: Path, options: Options) -> Path:
    """The model in a place where it can be spoiled."""
    return Path(shutil.copytree(options["model_name_or_path"], folder / "model"))


def spoiled_config(**change: Any) -> Case:
    def case(folder: Path, options: Options) -> Options:
        model = copied(folder, options)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **change}))
        return {"model_name_or_path": model}

    return case


def broken_config(folder: Path, options: Options) -> Options:
    model = copied(folder, options)
    (model / "config.json").write_text('{"model_type": "llama",')
    return {"model_name_or_path": model}


def truncated(folder: Path, options: Options) -> Options:
    model = copied(folder, options)
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    return {"model_name_or_path": model}


def without_template(folder: Path, options: Options) -> Options:
    model = copied(folder, options)
    (model / "chat_template.jinja").unlink()
    rows = tiny.write_rows(folder / "chat.jsonl", tiny.chat_rows(8))
    return {"model_name_or_path": model, "dataset_name": rows}


def rows(*lines: str, **more: Any) -> Case:
    def case(folder: Path, options: Options) -> Options:
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
        return {"dataset_name": folder / "rows.jsonl", **more}

    return case


def below_a_file(folder: Path, options: Options) -> Options:
    (folder / "file").write_text("")
    return {"output_dir": folder / "file" / "out"}


def is_a_file(folder: Path, options: Options) -> Options:
    (folder / "file").write_text("")
    return {"output_dir": folder / "file"}


def given(**change: Any) -> Case:
    return lambda folder, options: change


GOOD = '{"prompt": "The long:", "chosen": " water", "rejected": " time"}'
CASES: dict[str, tuple[Case, list[str]]] = {
    "model not there": (given(model_name_or_path="./no-model-here"), ["no-model-here"]),
    "broken config.json": (broken_config, ["config.json"]),
    "truncated weights": (truncated, ["model.safetensors"]),
    "unknown family": (spoiled_config(model_type="rwkv"), ["rwkv", "llama", "qwen3"]),
    "unknown attribute": (spoiled_config(mystery_scale=3), ["mystery_scale"]),
    "data not there": (given(dataset_name="./no-data.jsonl"), ["no-data.jsonl"]),
    "bad JSON": (rows(GOOD, '{"prompt": "x", '), ["rows.jsonl", "2"]),
    "wrong type": (rows(GOOD, '{"prompt": "x", "chosen": 5, "rejected": "a"}', drop_rows=[]), ["2", "chosen"]),
    "nothing left": (rows('{"prompt": null, "chosen": "a", "rejected": "b"}'), ["0 kept", "invalid"]),
    "no chat template": (without_template, ["chat template"]),
    "unknown option": (given(learning_rat=1e-4), ["learning_rat", "learning_rate"]),
    "option out of range": (given(beta=-1), ["beta", "-1"]),
    "output_dir below a file": (below_a_file, ["output_dir"]),
    "output_dir is a file": (is_a_file, ["output_dir", "it is a file"]),
    "held-out pairs not there": (given(eval_dataset="./none.jsonl", eval_strategy="steps"), ["none.jsonl"]),
    "adapter on no layer": (given(use_peft=True, lora_target_modules="nope_proj"), ["nope_proj", "q_proj"]),
    "no held-out pairs": (given(eval_strategy="steps"), ["eval_strategy", "eval_dataset"]),
    "mesh that does not fit": (given(mesh_tensor=3), ["mesh_tensor 3"]),
    "no room for what a loss sorts": (
        given(loss_type="aot", micro_batch_tokens=8),
        ["micro_batch_tokens 8", "4 pairs"],
    ),
    "a column that is not there": (given(pair_columns="weight"), ["weight", "train.jsonl"]),
    "a router's loss without a router": (given(router_aux_loss_coef=0.1), ["router_aux_loss_coef", "llama"]),
    "an adapter whose reference moves": (given(use_peft=True, sync_ref_model=True), ["sync_ref_model"]),
    "a penalty without a reference": (given(precompute_ref_log_probs=True, kl_coef=1.0), ["kl_coef"]),
    "states of 8 bits": (given(optim="adamw_8bit"), ["adamw_8bit", "adafactor"]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_message_and_nothing_written(name: str, usual: Options, tmp_path: Path) -> None:
    make, words = CASES[name]
    options = {**usual, "output_dir": tmp_path / "out"}
    options |= make(tmp_path, options)
    lists = {k: v for k, v in options.items() if v == []}
    before = tiny.snapshot(tmp_path)
    flags = tiny.flags({k: v for k, v in options.items() if k not in lists})
    for key in lists:
        config = tmp_path / "config.yaml"
        config.write_text(f"{key}: []\n")
        before = tiny.snapshot(tmp_path)
        flags = [str(config), *flags]
    ended = tiny.jax_dpo("train", *flags)
    assert ended.code == 2, ended.out + ended.err
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err
    assert tiny.snapshot(tmp_path) == before


def test_a_metric_that_is_misspelt(evaluated: Options, tmp_path: Path) -> None:
    options = {**evaluated, "metric_for_best_model": "rewards/accuracy", "output_dir": tmp_path / "out"}
    ended = tiny.jax_dpo("train", *tiny.flags(options))
    assert ended.code == 2
    assert "rewards/accuracies" in ended.err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_numbers_end_the_run(usual: Options, tmp_path: Path) -> None:
    """Seen at the first step, since no file's header tells: the log and the report say that the run ended, and why."""
    model = copied(tmp_path, usual)
    weights = tiny.tensors(model)
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    ended = tiny.jax_dpo("train", *tiny.flags({**usual, "model_name_or_path": model, "output_dir": out}))
    assert ended.code == 2
    assert "not finite" in ended.err and "Traceback" not in ended.err
    last = tiny.records(out)[-1]
    assert (last["kind"], last["reason"]) == ("end", "error")
    assert last["message"] in ended.err
    assert "ended by an error" in (out / "report.html").read_text(encoding="utf-8")
    assert tiny.checkpoints(out) == [] and not (out / "final").exists()
