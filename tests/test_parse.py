"""Options from YAML files and the command line. Oracle of the recipes: the standard recipe's values, written down below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jax_dpo.config import DPOConfig, parse
from jax_dpo.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

STANDARD: dict[str, Any] = {
    "learning_rate": 1e-6,
    "num_train_epochs": 3,
    "max_steps": 1000,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "beta": 0.1,
    "max_length": 1024,
    "max_prompt_length": 512,
    "warmup_steps": 100,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_on_start": True,
    "eval_steps": 100,
    "save_steps": 100,
    "report_to": "tensorboard",
    "resume_from_checkpoint": "auto",
    "bf16": True,
    "fp16": False,
    "gradient_checkpointing": True,
    "output_dir": "outputs/dpo_training",
    "target_kl": 0.1,
    "kl_coef": 1.0,
    "kl_reduction": "sequence",  # what docs/kl-control.md found to serve
    "kl_actions": ["halve_lr", "raise_beta", "rollback"],
    "drop_rows": ["invalid", "empty", "identical", "duplicate", "small_gap"],
}
LORA_RECIPE: dict[str, Any] = {
    "output_dir": "outputs/dpo_lora",
    "learning_rate": 1e-5,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "disable_dropout": False,
}


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        ("--beta 0.2", {"beta": 0.2}),
        ("--beta=0.2", {"beta": 0.2}),
        ("--max-grad-norm 2", {"max_grad_norm": 2.0}),
        ("--max_steps 5 --max_steps 6", {"max_steps": 6}),
        ("--max_steps 5 --max_steps -1", {}),
        ("--bf16", {"bf16": True}),
        ("--bf16 false", {"bf16": False}),
        ("--bf16=false", {"bf16": False}),
        ("--no_gradient_checkpointing", {"gradient_checkpointing": False}),
        ("--no-gradient-checkpointing --bf16", {"gradient_checkpointing": False, "bf16": True}),
        ("--loss_type sigmoid sft --loss_weights 1.0 0.5", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        ("--loss_type ipo --beta 0.3", {"loss_type": ["ipo"], "beta": 0.3}),
        ("--drop_rows", {"drop_rows": []}),
        ("--kl_actions none", {}),
        ("--max_length none", {"max_length": None}),
        ("--learning_rate 5e-7", {"learning_rate": 5e-7}),
        ("--report_to tensorboard", {"report_to": "tensorboard"}),
        ("--resume_from_checkpoint", {"resume_from_checkpoint": True}),
        ("--resume_from_checkpoint --bf16", {"resume_from_checkpoint": True, "bf16": True}),
        ("--resume_from_checkpoint auto", {"resume_from_checkpoint": "auto"}),
    ],
)  # fmt: skip
def test_flags(argv: str, changed: dict[str, Any]) -> None:
    assert parse(argv.split())[1].changed() == changed


def test_mappings_on_the_command_line_are_json() -> None:
    _, config = parse(["--lr_scheduler_type=cosine", "--lr_scheduler_kwargs", '{"num_cycles": 1}'])
    assert config.lr_scheduler_kwargs == {"num_cycles": 1}


def test_script_arguments_on_the_command_line() -> None:
    script, _ = parse(["--model", "m", "--dataset", "d.jsonl", "--use_peft", "--eval_dataset", '{"a": "x", "b": "y"}'])
    assert (script.model_name_or_path, script.dataset_name, script.use_peft) == ("m", "d.jsonl", True)
    assert script.eval_dataset == {"a": "x", "b": "y"}
    assert parse(["--test_split_size", "0.05", "--eval_dataset", "f"])[0].eval_dataset == "f"
    with pytest.raises(UserError, match="a share between 0 and 1"):
        parse(["--test_split_size", "1.5"])


def test_files_come_first_and_the_command_line_wins(tmp_path: Path) -> None:
    first = write(
        tmp_path / "a.yaml", "beta: 0.2\nlearning_rate: 1e-7\nkl-coef: 0.5\neval_strategy: no\nmax_length: null\n"
    )
    second = write(tmp_path / "b.yml", "beta: 0.25\nloss_type: [sigmoid, sft]\neval_dataset:\n  near: n.jsonl\n")
    odd = write(tmp_path / "options.txt", "seed: 7\n")
    script, config = parse([first, "--beta", "0.3", second, "--bf16", "--config", odd])
    assert config.changed() == {
        "beta": 0.3, "learning_rate": 1e-7, "kl_coef": 0.5, "max_length": None, "loss_type": ["sigmoid", "sft"], "bf16": True, "seed": 7,
    }  # fmt: skip
    assert script.eval_dataset == {"near": "n.jsonl"}
    assert parse([f"--config={first}"])[1].beta == 0.2
    assert parse(["--use_peft", first])[0].use_peft  # a boolean does not swallow the file
    assert parse(["--loss_type", "ipo", first])[1].beta == 0.2  # nor does a list
    assert parse([write(tmp_path / "empty.yaml", "# nothing\n")])[1] == DPOConfig()


def test_every_fault_is_told_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "bta: 0.2\nlearning_rate: fast\nwarmup_ratio: 0.1\nlora_r: 0\n")
    with pytest.raises(UserError) as caught:
        parse([path, "--max_stepz", "5", "--beta", "-1", "--seed"], needs=("model_name_or_path",))
    lines = caught.value.message.splitlines()
    assert lines[0] == "8 options cannot be used:"
    for place in (f"bta ({path}): ", f"learning_rate ({path}): ", f"warmup_ratio ({path}): ", f"lora_r ({path}): "):
        assert any(line.startswith(f"  {place}") for line in lines), place
    assert "  --max_stepz: there is no such option; did you mean max_steps?" in lines
    assert "  beta (command line): found -1.0, expected a number above 0" in lines
    assert "  seed: needs a value" in lines
    assert any(line.startswith("  model_name_or_path: is needed") for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("beta: [1", "line 1"),
        ("- beta\n- seed\n", "found a list"),
        ("just words\n", "found the text 'just words'"),
        ("beta: 0.1\nseed: 1\nbeta: 0.2\n", "beta stands twice, in lines 1 and 3"),
        ("training:\n  beta: 0.1\n", "training"),
        ("datasets:\n  - split: train\n", "entry 1 has no path"),
        ("datasets:\n  - path: x\n    fractoin: 1\n", "did you mean fraction?"),
        ("datasets: x.jsonl\n", "expected a list of mappings"),
        ("env: [A]\n", "expected a mapping of names to texts"),
    ],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(UserError) as caught:
        parse([path])
    assert words in caught.value.message and path in caught.value.message


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "run.yaml", "")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.yaml").mkdir()
    for name, words in (("rum.yaml", "run.yaml"), ("binary.yaml", "UTF-8"), ("folder.yaml", "is a directory")):
        with pytest.raises(UserError, match=words):
            parse([str(tmp_path / name)])
    with pytest.raises(UserError, match=r"unexpected argument 'pairs.jsonl'"):
        parse(["pairs.jsonl"])


def test_data_may_come_first() -> None:
    assert parse(["pairs.jsonl", "--model", "m"], data_first=True)[0].dataset_name == "pairs.jsonl"
    with pytest.raises(UserError, match="unexpected argument 'b'"):
        parse(["a", "b"], data_first=True)


def test_the_recipes_are_those_of_the_mission() -> None:
    standard = yaml.safe_load((CONFIGS / "standard.yaml").read_text())
    lora = yaml.safe_load((CONFIGS / "standard_lora.yaml").read_text())
    assert standard == STANDARD
    assert lora == STANDARD | LORA_RECIPE
    assert parse([str(CONFIGS / "standard.yaml")])[1].warnings() == []
    assert parse([str(CONFIGS / "standard_lora.yaml")])[1].warnings(adapter=True) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_of_the_repository_can_be_read(path: Path) -> None:
    parse([str(path)])
