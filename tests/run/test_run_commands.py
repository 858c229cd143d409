"""The other commands, on what a run left; LoRA through the command line; the scripts that users have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from datasets import Dataset
from safetensors.numpy import load_file
from served_rules import served_adapter, served_model, with_adapter
from transformers import AutoTokenizer

from jax_dpo import DPOConfig, DPOTrainer, LoraConfig, load_model, save_model


@pytest.fixture(scope="module")
def run(evaluated: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert tiny.jax_dpo("train", *tiny.flags(evaluated), "--output_dir", out).code == 0
    return out


def test_check_names_rows_and_shows_a_pair(model: Path, data: Path, tmp_path: Path) -> None:
    rows = [
        *tiny.text_rows(3),
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": None, "rejected": "b"},
    ]
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    ended = tiny.jax_dpo("check", file, "--model", model, "--drop_rows", "invalid", "identical")
    assert ended.code == 0, ended.err
    for word in ("rows read 5, kept 3", "row 4", "identical", "row 5", "invalid", "prompt", "chosen"):
        assert word in ended.out
    (warning,) = [line for line in ended.out.splitlines() if "left out as invalid" in line]
    assert warning.endswith("[rows-invalid]")  # as errors print theirs


def test_evaluate_gives_the_numbers_of_the_run(run: Path, model: Path, data: Path) -> None:
    options = {
        "model_name_or_path": run / "final",
        "ref_model_name_or_path": model,
        "eval_dataset": data / "eval.jsonl",
    }
    ended = tiny.jax_dpo("evaluate", *tiny.flags(options))
    assert ended.code == 0, ended.err
    last = tiny.records(run, "eval")[-1]
    for name in ("eval_loss", "eval_rewards/margins", "eval_kl_divergence"):
        shown = next(line for line in ended.out.splitlines() if f" {name} " in line)
        assert float(shown.split("│")[2]) == pytest.approx(last[name], rel=1e-4)


@pytest.mark.slow
def test_a_mixture_of_experts_trains(usual: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """The router's loss is in the log under TRL's name, and in the loss: at the start that of two equal models is ln 2."""
    mixture = tiny.make_model(tmp_path / "mixtral", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    options = {**usual, "model_name_or_path": mixture, "max_steps": 2, "router_aux_loss_coef": 0.5}
    options |= {"eval_dataset": data / "eval.jsonl", "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    ended = tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", tmp_path / "out")
    assert ended.code in (0, 3), ended.err
    first, held_out = tiny.records(tmp_path / "out", "train")[0], tiny.records(tmp_path / "out", "eval")[-1]
    assert 2 <= first["aux_loss"] <= 4 and 2 <= held_out["eval_aux_loss"] <= 4  # from k to E
    assert first["loss"] - 0.5 * first["aux_loss"] == pytest.approx(np.log(2), abs=1e-5)
    before, after = tiny.tensors(mixture), tiny.tensors(tmp_path / "out" / "final")
    assert set(before) == set(after)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert any(".experts.3.w2" in name for name in moved) and any(".gate." in name for name in moved)
    wrong = tiny.jax_dpo("train", *tiny.flags(usual), "--router_aux_loss_coef", "0.1", "--output_dir", tmp_path / "no")
    assert wrong.code == 2 and "router_aux_loss_coef" in wrong.err and not (tmp_path / "no").exists()


def test_generate_answers_each_prompt(model: Path) -> None:
    ended = tiny.jax_dpo("generate", "--model", model, "--prompt", "Why?", "How?", "--max_new_tokens", 4)
    assert ended.code == 0, ended.err
    assert "> Why?" in ended.out
    assert "> How?" in ended.out


def test_report_is_made_again_from_the_log_alone(run: Path) -> None:
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert tiny.jax_dpo("report", run).code == 0
    assert (run / "report.html").read_bytes() == before


def test_convert_rounds_and_keeps_the_tokenizer(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    assert tiny.jax_dpo("convert", model, out, "--dtype", "bfloat16").code == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (model / name).read_bytes()


def test_doctor_speaks_of_devices_and_attention() -> None:
    ended = tiny.jax_dpo("doctor")
    assert "attention" in ended.out
    assert "cpu" in ended.out


def test_lora_trains_an_adapter_over_a_base_without_a_copy(
    evaluated: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {
        **evaluated,
        "learning_rate": 5e-3,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_r": 4,
    }
    ended = tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", out)
    assert ended.code == 0, ended.out + ended.err
    assert "no second copy" in tiny.records(out, "start")[0]["reference"]
    config = json.loads((out / "final" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 32, ["q_proj", "v_proj"])
    names = set(load_file(out / "final" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight" in names
    assert len(names) == 8
    first = tiny.records(out, "eval")[0]
    assert (first["eval_rewards/margins"], first["eval_kl_divergence"]) == (0.0, 0.0)
    adapted = load_model(model, adapter=out / "final")
    save_model(adapted, tmp_path / "merged", merge=True)
    ids = np.arange(3, 40)[None]
    merged, base = load_model(tmp_path / "merged")(ids), load_model(model)(ids)
    np.testing.assert_allclose(adapted(ids), merged, atol=1e-4)
    assert np.abs(np.asarray(merged) - np.asarray(base)).max() > 1e-3

    # The directory of the adapter stands for base and adapter, as in transformers.
    held_out = ["--ref_model_name_or_path", model, "--eval_dataset", evaluated["eval_dataset"]]
    ended = tiny.jax_dpo("evaluate", "--model", out / "final", *held_out)
    assert ended.code == 0, ended.err
    shown = next(line for line in ended.out.splitlines() if " eval_loss " in line)
    assert float(shown.split("│")[2]) == pytest.approx(tiny.records(out, "eval")[-1]["eval_loss"], rel=1e-5)
    ended = tiny.jax_dpo("convert", out / "final", tmp_path / "converted")
    assert ended.code == 0, ended.err
    assert tiny.snapshot(tmp_path / "converted") == tiny.snapshot(tmp_path / "merged")
    # And as vLLM reads all three.
    base = served_model(model)
    want = with_adapter(base.tensors, served_adapter(out / "final", base))
    for name, tensor in served_model(tmp_path / "converted").tensors.items():
        np.testing.assert_allclose(tensor, want[name], atol=1e-6)


@pytest.mark.slow
def test_dropout_acts_only_where_it_is_asked_for(usual: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    for silent in (True, False):
        options = {
            **usual,
            "use_peft": True,
            "lora_dropout": 0.5,
            "learning_rate": 5e-2,
            "disable_dropout": silent,
            "save_strategy": "no",
        }
        out = tmp_path / str(silent)
        tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", out)
        losses.append([r["loss"] for r in tiny.records(out, "train")])
    assert losses[0] != losses[1]


class Watching:
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float]) -> None:
        self.seen.append(("log", logs["loss"]))
        assert state.log_history[-1]["loss"] == logs["loss"]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float]) -> None:
        self.seen.append(("evaluate", metrics))

    def on_save(self, args: Any, state: Any, control: Any) -> None:
        self.seen.append(("save", None))


def test_the_usual_script(model: Path, tmp_path: Path) -> None:
    """TRL's script and its walk over checkpoints, with the import changed; `tokenizer` is the older name of processing_class."""
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    config = DPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=5e-4,
        max_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        gradient_checkpointing=False,
    )
    watching = Watching()
    trainer = DPOTrainer(
        model=load_model(model),
        ref_model=str(model),
        args=config,
        train_dataset=Dataset.from_list(tiny.text_rows(24, seed=1)),
        eval_dataset={
            "near": Dataset.from_list(tiny.text_rows(8, seed=2)),
            "far": Dataset.from_list(tiny.text_rows(5, seed=3)),
        },
        tokenizer=tokenizer,
        callbacks=[watching],
    )
    trainer.train()
    results = trainer.evaluate(Dataset.from_list(tiny.text_rows(8, seed=2)))
    near = [e for e in trainer.state.log_history if "eval_near_loss" in e][-1]
    assert results["eval_loss"] == pytest.approx(near["eval_near_loss"], abs=1e-6)
    assert results["eval_rewards/margins"] == pytest.approx(near["eval_near_rewards/margins"], abs=1e-6)
    assert results["eval_kl_divergence"] == pytest.approx(near["eval_near_kl_divergence"], abs=1e-7)
    # Where TRL's own script saves: beside the checkpoints.
    trainer.save_model(config.output_dir)
    out = tmp_path / "out"
    assert (out / "model.safetensors").read_bytes() == (out / "final" / "model.safetensors").read_bytes()
    assert load_model(out).files.dtype == "float32"
    states = sorted((tmp_path / "out").glob("checkpoint-*/trainer_state.json"))
    assert [json.loads(p.read_text())["global_step"] for p in states] == [1, 2]
    assert [kind for kind, _ in watching.seen] == ["log", "evaluate", "evaluate", "save"] * 2
    assert [x for kind, x in watching.seen if kind == "log"] == [
        e["loss"] for e in trainer.state.log_history if "loss" in e
    ]


def test_a_peft_config_of_ours_trains_in_python(model: Path, tmp_path: Path) -> None:
    trainer = DPOTrainer(
        model=str(model),
        args=DPOConfig(
            str(tmp_path / "out"), per_device_train_batch_size=8, max_steps=1, save_strategy="no", learning_rate=1e-2
        ),
        train_dataset=tiny.text_rows(8),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * 7 * 2
