"""DPOConfig and ScriptArguments in Python. Oracle of the defaults: TRL 1.16 (read from its sources, copied below as facts)."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any

import pytest

from jax_dpo.config import DPOConfig, ScriptArguments, rules
from jax_dpo.config.advice import ADVICE, PYTHON_ADVICE, VALUE_ADVICE
from jax_dpo.config.kl_rules import KL_ACTIONS, KL_JUDGED_ON
from jax_dpo.config.rules import DATA_FORMATS, DROP_REASONS, LOSS_TYPES, PAIR_COLUMNS, SCHEDULERS
from jax_dpo.data import check, formats, pairs, turns
from jax_dpo.data.batch import FIELD_OF
from jax_dpo.errors import UserError
from jax_dpo.loss.aot import AOT_TYPES
from jax_dpo.loss.family import FAMILIES
from jax_dpo.train import control
from jax_dpo.train.schedule import SCHEDULES

TRL_DEFAULTS: dict[str, Any] = {
    # TRL's own
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "bf16": None,
    "disable_dropout": True,
    "pad_to_multiple_of": "auto",
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "label_smoothing": 0.0,
    "beta": 0.1,
    "use_weighting": False,
    "discopop_tau": 0.05,
    # transformers' training arguments
    "output_dir": "trainer_output",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "optim_args": None,
    "dataloader_drop_last": False,
    "logging_strategy": "steps",
    "eval_delay": 0,
    "project": "huggingface",
    "disable_tqdm": None,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "fp16": False,
    "logging_first_step": False,
    "report_to": "none",
    "run_name": None,
    "eval_strategy": "no",
    "eval_steps": None,
    "eval_on_start": False,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "seed": 42,
    "data_seed": None,
    "train_sampling_strategy": "random",
    "resume_from_checkpoint": None,
    "precompute_ref_log_probs": False,
    "precompute_ref_batch_size": None,
    "router_aux_loss_coef": None,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
}
OWN_DEFAULTS: dict[str, Any] = {
    "curriculum_by": "score",
    "curriculum_reward_model": None,
    "curriculum_buckets": 10,
    "curriculum_later_epochs": "random",
    "target_kl": 0.1,
    "sigmoid_label_smoothing": None,
    "pair_columns": [],
    "beta_dpo_alpha": 0.0,
    "beta_dpo_momentum": 0.9,
    "kl_coef": 0.0,
    "kl_reduction": "token",
    "data_format": "auto",
    "tool_arguments": "as_given",
    "system_turn": "as_given",
    "system_column": False,
    "completion_turns": "all",
    "chat_template_path": None,
    "eos_token": None,
    "added_special_tokens": [],
    "added_tokens": [],
    "template_in_tokenizer_config": False,
    "overlong": "cut",
    "ref_log_probs_columns": False,
    "kl_actions": [],
    "kl_judged_on": ["eval"],
    "kl_window": 10,
    "kl_patience": 1,
    "kl_cooldown": 0,
    "kl_most_actions": None,
    "kl_trust_region": False,
    "kl_probe_pairs": 16,
    "adaptive_beta": False,
    "adaptive_beta_rate": 0.1,
    "kl_controller": "none",
    "pi_beta_gains": [1.0, 0.3],
    "dual_kl_rate": 1.0,
    "drop_rows": ["invalid"],
    "min_score_gap": 0.15,
    "max_prompt_length": None,
    "share_prompt": True,
    "packing": True,
    "eval_weighting": "pairs",
    "nonfinite_steps": "stop",
    "kernels": "auto",
    "micro_batch_tokens": None,
    "mesh_data": 1,
    "mesh_fsdp": -1,
    "mesh_tensor": 1,
    "compile_cache_dir": None,
    "dataset_cache_dir": None,
    "overwrite_output_dir": False,
    "coordinator_address": None,
    "num_processes": None,
    "process_id": None,
    "generate_samples": 0,
    "eval_on_policy_prompts": 0,
    "eval_on_policy_tokens": 128,
}
SCRIPT_DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "",
    "model_revision": "main",
    "ref_model_name_or_path": None,
    "tokenizer_name_or_path": None,
    "dataset_name": "",
    "dataset_config": None,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "eval_dataset": None,
    "test_split_size": None,
    "datasets": [],
    "dataset_streaming": False,
    "retry": 0,
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "lora_modules_to_save": None,
    "lora_task_type": "CAUSAL_LM",
    "use_rslora": False,
    "use_dora": False,
}


def refused(**options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        DPOConfig(**options)
    return caught.value


class Interval(enum.StrEnum):
    STEPS = "steps"


def test_the_defaults_are_trls_and_every_option_is_in_one_of_the_tables() -> None:
    assert DPOConfig().to_dict() == TRL_DEFAULTS | OWN_DEFAULTS
    assert ScriptArguments().to_dict() == SCRIPT_DEFAULTS


def test_every_option_is_documented() -> None:
    for cls in (DPOConfig, ScriptArguments):
        for item in dataclasses.fields(cls):
            assert item.metadata["help"].endswith((".", "'")), item.name
            assert item.metadata["group"], item.name


def test_the_configuration_is_a_frozen_dataclass_that_takes_output_dir_first() -> None:
    config = DPOConfig("here", beta=0.2)
    assert (config.output_dir, config.beta) == ("here", 0.2)
    assert dataclasses.replace(config, beta=0.3).beta == 0.3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 0.4  # type: ignore[misc]
    with pytest.raises(TypeError):
        DPOConfig("here", "there")  # type: ignore[misc]
    with pytest.raises(TypeError):
        DPOConfig("here", output_dir="there")  # type: ignore[misc]
    with pytest.raises(UserError):
        dataclasses.replace(config, beta=-1.0)


@pytest.mark.parametrize(
    ("option", "given", "value"),
    [
        ("learning_rate", "1e-6", 1e-6),
        ("learning_rate", 1, 1.0),
        ("max_steps", "1e3", 1000),
        ("max_steps", 20.0, 20),
        ("warmup_steps", "0.1", 0.1),
        ("warmup_steps", "100", 100),
        ("warmup_steps", 100.0, 100),
        ("warmup_steps", 0.0, 0.0),
        ("bf16", "true", True),
        ("bf16", "No", False),
        ("bf16", None, None),
        ("max_length", None, None),
        ("max_length", "none", None),
        ("max_length", "null", None),
        ("eval_steps", 0.25, 0.25),
        ("eval_strategy", False, "no"),
        ("eval_strategy", Interval.STEPS, "steps"),
        ("save_strategy", "epoch", "epoch"),
        ("report_to", False, "none"),
        ("report_to", None, "none"),
        ("report_to", [], "none"),
        ("report_to", ["none"], "none"),
        ("report_to", ["tensorboard"], ["tensorboard"]),
        ("report_to", "tensorboard", "tensorboard"),
        ("loss_type", "ipo", ["ipo"]),
        ("loss_type", ("sigmoid", "sft"), ["sigmoid", "sft"]),
        ("loss_type", '["sigmoid", "sft"]', ["sigmoid", "sft"]),
        ("kl_actions", None, []),
        ("kl_actions", "rollback", ["rollback"]),
        ("kl_judged_on", "train", ["train"]),
        ("kl_patience", "2", 2),
        ("kl_cooldown", '{"halve_lr": 20}', {"halve_lr": 20}),
        ("kl_most_actions", "none", None),
        ("lr_scheduler_kwargs", None, None),
        ("run_name", 2024, "2024"),
        ("output_dir", Path("a") / "b", "a/b"),
        ("resume_from_checkpoint", True, True),
        ("resume_from_checkpoint", "true", True),
        ("resume_from_checkpoint", False, None),
        ("resume_from_checkpoint", "auto", "auto"),
        ("resume_from_checkpoint", "run/checkpoint-5", "run/checkpoint-5"),
        ("max_grad_norm", 1e9, 1e9),
        ("max_steps", 0, 0),
    ],
)
def test_a_value_is_read_whether_python_yaml_or_a_text_gives_it(option: str, given: Any, value: Any) -> None:
    found = getattr(DPOConfig(**{option: given}), option)
    assert found == value
    assert type(found) is type(value)


def test_a_mapping_may_be_json() -> None:
    config = DPOConfig(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr_rate": 0.1}')
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


@pytest.mark.parametrize(
    "given", ["momentum=0.9,nesterov=True", '{"momentum": 0.9, "nesterov": true}', {"momentum": 0.9, "nesterov": True}]
)
def test_optim_args_are_transformers_text_or_a_mapping(given: Any) -> None:
    assert DPOConfig(optim="sgd", optim_args=given).optim_args == {"momentum": 0.9, "nesterov": True}


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_each_loss_is_taken(loss: str) -> None:
    assert DPOConfig(loss_type=loss, label_smoothing=0.001 if loss == "exo_pair" else 0.0).loss_type == [loss]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": -1e-6}, "learning_rate: found -1e-06, expected a number of at least 0"),
        ({"learning_rate": "fast"}, 'found "fast", expected a number'),
        ({"learning_rate": float("nan")}, "expected a number"),
        ({"learning_rate": True}, "found true, expected a number"),
        ({"beta": 0}, "beta: found 0.0, expected a number above 0"),
        ({"max_steps": -2}, "max_steps: found -2"),
        ({"max_steps": 1.5}, "expected a whole number"),
        ({"max_steps": False}, "found false, expected a whole number"),
        ({"bf16": 1}, "found 1, expected true or false or null"),
        ({"bf16": "maybe"}, "expected true or false"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"warmup_steps": 1.5}, "a share of all steps between 0 and 1"),
        ({"warmup_steps": -1}, "a share of all steps between 0 and 1"),
        ({"logging_steps": 0}, "a whole number of steps"),
        ({"adam_beta1": 1.0}, "[0, 1)"),
        ({"seed": -1}, "seed: found -1"),
        ({"max_length": 0}, "at least 1"),
        ({"truncation_mode": "keep_stat"}, "expected one of keep_start, keep_end; did you mean keep_start?"),
        ({"loss_type": "sigmiod"}, "did you mean sigmoid?"),
        ({"loss_type": ["sigmoid", "kto_pair"]}, "bco_pair"),
        ({"loss_type": []}, "at least one loss"),
        ({"loss_type": {"sigmoid": 1}}, "expected a list of names"),
        ({"lr_scheduler_kwargs": "{broken"}, "expected a mapping (JSON)"),
        ({"fp16": True}, "write bf16: true"),
        ({"optim": "adamw_8bit"}, "write adafactor (factored states, the least memory) or adamw_torch"),
        ({"optim": "lion"}, "write lion_32bit"),
        ({"optim": "paged_adamw_32bit"}, "the same numbers"),
        (
            {"optim": "galore_adamw"},
            "galore_adamw is not in this version; write adamw_torch, adafactor, lion_32bit or sgd",
        ),
        ({"optim": "sdg"}, "did you mean sgd?"),
        ({"optim_args": "momentum=0.9"}, "optim adamw_torch_fused takes none (transformers ignores them)"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "did you mean momentum?"),
        ({"optim": "sgd", "optim_args": "momentum=high"}, 'momentum: found "high", expected a number of at least 0'),
        ({"optim": "sgd", "optim_args": {"momentum": 0.9, "nesterov": 1}}, "nesterov: found 1, expected true or false"),
        ({"optim": "sgd", "optim_args": {"nesterov": True}}, "nesterov needs a momentum above 0"),
        ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "write weight_decay: 0.1"),
        ({"optim": "sgd", "optim_args": "momentum"}, "expected a mapping (JSON) or null"),
        ({"save_strategy": "best"}, "needs evaluations"),
        ({"kl_actions": ["halve_rl", "rolback"]}, "did you mean rollback?"),
        ({"kl_actions": ["halve_rl"]}, "did you mean halve_lr?"),
        ({"kl_actions": ["rollback", "rollback"]}, "rollback more than once"),
        ({"kl_judged_on": []}, "expected eval, train or both"),
        (
            {"kl_judged_on": ["train"], "precompute_ref_log_probs": True},
            "no reference to measure the KL of train steps",
        ),
        ({"kl_patience": 0}, "found 0, expected a whole number of at least 1"),
        ({"kl_cooldown": {"rolback": 3}}, 'found "rolback", which is no action'),
        ({"kl_most_actions": {"rollback": 0}}, "found 0 for rollback"),
        ({"kl_trust_region": True}, "its probe set is taken from held-out pairs"),
        (
            {"kl_trust_region": True, "eval_strategy": "steps", "precompute_ref_log_probs": True},
            "set one of them to false",
        ),
        ({"drop_rows": "everything"}, "invalid, empty, identical, torn, duplicate, small_gap"),
        ({"adaptive_beta_rate": 1.0}, "(0, 1)"),
        ({"target_kl": 0}, "above 0"),
        ({"output_dir": " "}, "expected a directory"),
        ({"output_dir": None}, "found null, expected text"),
        ({"report_to": "tensorbord"}, "did you mean tensorboard?"),
        ({"report_to": ["none", "wandb"]}, "none beside others"),
        # between options
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "found 1 weights for 2 losses"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "less than 0.5"),
        ({"loss_type": "exo_pair"}, "label_smoothing: found 0.0, expected more than 0"),
        (
            {"label_smoothing": 0.5, "sigmoid_label_smoothing": True},
            "expected less than 0.5 with sigmoid_label_smoothing",
        ),
        ({"loss_type": "cdpo"}, "sigmoid_label_smoothing: true"),
        ({"pair_columns": "score"}, "expected one of beta, margin, label, weight"),
        ({"pair_columns": ["margin"], "loss_type": ["sigmoid", "ipo"]}, "margin, which loss_type ipo does not take"),
        ({"pair_columns": ["margin"], "loss_type": "sft"}, "margin, which loss_type sft does not take"),
        ({"pair_columns": ["label"], "loss_type": "hinge"}, "label, which loss_type hinge does not take"),
        ({"pair_columns": ["beta"], "loss_type": ["sigmoid", "aot"]}, "beta, which loss_type aot does not take"),
        ({"pair_columns": ["weight"], "loss_type": "aot_unpaired"}, "weight, which loss_type aot_unpaired"),
        ({"pair_columns": ["weight", "weight"]}, "found weight more than once"),
        (
            {"pair_columns": ["label"], "label_smoothing": 0.1, "sigmoid_label_smoothing": True},
            "label beside sigmoid_label_smoothing",
        ),
        ({"beta_dpo_alpha": -0.1}, "at least 0"),
        ({"beta_dpo_momentum": 1.0}, "in [0, 1)"),
        (
            {"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "forward_kl"},
            "reverse_kl with loss_type nca_pair",
        ),
        ({"loss_type": ["sigmoid", "sft"], "use_weighting": True}, "false with loss_type sft"),
        ({"loss_type": "aot_unpaired", "use_weighting": True}, "false with loss_type aot_unpaired"),
        ({"loss_type": "aot_pair"}, "it is called aot_unpaired now"),
        ({"lr_scheduler_kwargs": {"num_cycles": 1}}, "linear takes no options"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 1}}, "did you mean num_cycles?"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}}, 'num_cycles: found "x"'),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "either min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "expected num_decay_steps"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "not below learning_rate"),
        ({"load_best_model_at_end": True}, "found no and steps"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 6},
            "multiple of eval_steps; found 6 and 4",
        ),
        ({"mesh_data": -1}, "only one of"),
        ({"process_id": 0}, "go together"),
        ({"coordinator_address": "host", "num_processes": 2, "process_id": 0}, "ADDRESS:PORT"),
        (
            {"coordinator_address": "host:1", "num_processes": 2, "process_id": 2},
            "process_id 2 is not below num_processes 2",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    error = refused(**options)
    assert error.name == "invalid-option"
    assert words in error.message
    assert error.message.startswith("option ")  # one fault, one line


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "robust", "label_smoothing": 0.49},
        {"loss_type": ["sigmoid", "sft"], "pair_columns": ["beta", "margin", "label", "weight"]},
        {"loss_type": ["ipo", "sft"], "pair_columns": ["beta", "weight"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]},
        {"loss_type": "ipo", "f_divergence_type": "js_divergence"},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 50, "save_steps": 100},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.2},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "logging_steps": 10, "save_steps": 20},
        {"mesh_fsdp": 2, "mesh_data": -1},
        {"coordinator_address": "host:8476", "num_processes": 2, "process_id": 1},
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 5, "decay_type": "1-sqrt"},
        },
        {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": None}},
        {"learning_rate": 1.0, "adam_epsilon": 10, "max_grad_norm": 1e9, "save_strategy": "no"},
        {"max_steps": 0},
    ],
)
def test_what_is_only_unusual_is_taken(options: dict[str, Any]) -> None:
    config = DPOConfig(**options)
    assert options.keys() <= config.changed().keys() | {"logging_steps"}


def test_the_names_known_here_are_those_that_exist_below() -> None:
    assert set(LOSS_TYPES) == {
        *FAMILIES,
        *AOT_TYPES,
        "sft",
    }  # the last ones are of a whole micro-batch: the step adds them
    assert set(SCHEDULERS) == set(SCHEDULES)
    assert DATA_FORMATS == formats.DATA_FORMATS
    assert rules.SYSTEM_TURNS == formats.SYSTEM_TURNS
    assert rules.COMPLETION_TURNS == turns.COMPLETION_TURNS
    assert rules.OVERLONG == check.OVERLONG
    assert set(KL_ACTIONS) == set(control.KL_ACTIONS)
    assert set(KL_JUDGED_ON) == set(control.JUDGED_ON)
    assert set(DROP_REASONS) == set(check.DROP_REASONS)
    assert PAIR_COLUMNS == pairs.PAIR_COLUMNS == tuple(FIELD_OF)


def test_all_faults_are_told_at_once() -> None:
    error = refused(beta=-1, lerning_rate=1, warmup_ratio=0.1, loss_type="sigmoit", max_steps="x", mesh_data=-1)
    lines = error.message.splitlines()
    assert lines[0] == "6 options cannot be used:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "lerning_rate",
        "warmup_ratio",
        "max_steps",
        "loss_type",
        "beta",
        "mesh_fsdp",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lerning_rate", "did you mean learning_rate?"),
        ("evaluation_strategy", "write eval_strategy"),
        ("rpo_alpha", "loss_type: [sigmoid, sft]"),
        ("model_name_or_path", "DPOTrainer(model=...)"),
        ("use_peft", "peft_config=LoraConfig("),
        ("qqq", "--help lists all options"),
    ],
)
def test_an_unknown_name_is_answered(name: str, words: str) -> None:
    error = refused(**{name: 1})
    assert error.name == "unknown-option"
    assert words in error.message


def test_no_advice_is_given_on_what_exists() -> None:
    options = {item.name for item in dataclasses.fields(DPOConfig)}
    script = {item.name for item in dataclasses.fields(ScriptArguments)}
    assert not ADVICE.keys() & (options | script)
    assert not PYTHON_ADVICE.keys() & options
    assert script <= PYTHON_ADVICE.keys()
    for option, value in VALUE_ADVICE:
        choices = {item.name: item.metadata["choices"] for item in dataclasses.fields(DPOConfig)}[option]
        assert value not in choices, (option, value)


def test_advice_names_options_that_exist() -> None:
    options = {item.name for cls in (DPOConfig, ScriptArguments) for item in dataclasses.fields(cls)}
    for name, text in ADVICE.items():
        for word in text.replace(":", " ").replace(",", " ").replace(";", " ").split("write ")[1:]:
            assert word.split()[0] in options | {"the", "--config"}, (name, text)


def test_dictionaries_go_in_and_out() -> None:
    config = DPOConfig(beta=0.2, loss_type="ipo")
    assert config.changed() == {"beta": 0.2, "loss_type": ["ipo"]}
    assert DPOConfig.from_dict(config.to_dict()) == config
    config.to_dict()["loss_type"].append("sft")
    assert config.loss_type == ["ipo"]
    DPOConfig().kl_actions.append("rollback")
    assert DPOConfig().kl_actions == []
    config.validate()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 5.1e-6}, "outside 1e-7 to 5e-6, the range known to work for full training"),
        ({"learning_rate": 9e-8}, "usual is 5e-7 to 1e-6"),
        ({"learning_rate": 0}, "nothing will be learned"),
        ({"beta": 0.31}, "outside 0.05 to 0.3"),
        ({"beta": 0.04, "loss_type": ["ipo", "hinge"]}, "outside 0.05 to 0.3"),
        ({"per_device_train_batch_size": 1}, "1 pair a step is few"),
        ({"per_device_train_batch_size": 3}, "3 pairs a step is few: 4 to 8 for experiments"),
        ({"adam_epsilon": 10}, "is large"),
        ({"max_grad_norm": 0}, "does not clip"),
        ({"save_strategy": "no"}, "starts over"),
        ({"label_smoothing": 0.1}, "is not read by loss_type sigmoid, as in TRL 1.16"),
        ({"label_smoothing": 0.1, "loss_type": ["robust", "sigmoid_norm"]}, "is not read by loss_type sigmoid_norm"),
        ({"label_smoothing": 0.1, "loss_type": "apo_zero"}, "no effect with loss_type apo_zero"),
        ({"sigmoid_label_smoothing": True}, "true has no effect: label_smoothing is 0"),
        (
            {"sigmoid_label_smoothing": True, "loss_type": "robust", "label_smoothing": 0.1},
            "no effect: loss_type is robust",
        ),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, "the same as reverse_kl"),
        ({"beta_dpo_alpha": 6}, "0.6 is the paper's"),
        ({"beta_dpo_momentum": 0.5}, "beta_dpo_momentum has no effect"),
        ({"kl_actions": ["rollback"]}, "eval_strategy is no"),
        ({"max_prompt_length": 1024}, "no room for an answer"),
        ({"max_steps": 0}, "num_train_epochs decides"),
    ],
)
def test_unusual_values_warn(options: dict[str, Any], words: str) -> None:
    (warning,) = DPOConfig(**options).warnings()
    assert words in warning


@pytest.mark.parametrize("said", [False, True])
def test_who_says_which_smoothing_is_meant_is_not_warned(said: bool) -> None:
    assert DPOConfig(label_smoothing=0.1, sigmoid_label_smoothing=said).warnings() == []


@pytest.mark.parametrize(
    "options",
    [
        *({"learning_rate": rate} for rate in (1e-7, 5e-7, 1e-6, 5e-6)),
        *({"beta": beta} for beta in (0.05, 0.1, 0.3)),
        *({"per_device_train_batch_size": pairs} for pairs in (4, 8, 16, 32, 64, 256)),
        # a rate of SGD or Lion says nothing beside one of AdamW; the mean log-ratio of a token takes another beta than a sum
        {"learning_rate": 1e-2, "optim": "sgd"},
        {"beta": 5.0, "loss_type": "sigmoid_norm"},
        {"beta": 0.01, "loss_type": ["ipo", "sft"]},
    ],
    ids=str,
)
def test_what_is_known_to_work_does_not_warn(options: dict[str, Any]) -> None:
    """Oracle: the ranges as they are known to work, ends included."""
    assert DPOConfig(**options).warnings() == []


@pytest.mark.parametrize(("rate", "fine"), [(9e-7, False), (1e-6, True), (1e-5, True), (2e-4, True), (3e-4, False)])
def test_an_adapter_has_a_range_of_its_own(rate: float, fine: bool) -> None:
    found = DPOConfig(learning_rate=rate).warnings(adapter=True)
    assert (found == []) == fine
    assert fine or "1e-6 to 0.0002, the range known to work for an adapter (LoRA)" in found[0]


def test_warnings_know_the_adapter_and_the_devices() -> None:
    assert DPOConfig().warnings() == []
    assert DPOConfig(learning_rate=1e-5).warnings(adapter=True) == []
    assert DPOConfig(per_device_train_batch_size=1).warnings(data_parallel=8) == []
    assert "lora_r without use_peft" in ScriptArguments(lora_r=8).warnings()[0]
    assert ScriptArguments(lora_r=8, use_peft=True).warnings() == []


@pytest.mark.parametrize(
    ("given", "value"),
    [("q_proj", ["q_proj"]), ("all-linear", "all-linear"), (r".*\.q_proj", r".*\.q_proj"), (["q_proj", "v_proj"],) * 2],
)
def test_target_modules_are_names_or_a_pattern(given: Any, value: Any) -> None:
    assert ScriptArguments(lora_target_modules=given).lora_target_modules == value
