"""target_modules and LoraConfig. Oracle: PEFT 0.21.2 (the module names that it adapted for each of these, written down)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig
from jax_dpo.models.families import model_config
from jax_dpo.models.lora import LoraConfig, LoraSpec, LoraTarget
from jax_dpo.models.lora_targets import lora_spec, modules_of, resolve_targets

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def model(family: str = "llama") -> ModelConfig:
    return model_config(json.loads((GOLDEN / "models" / family / "config.json").read_text()))


def last(targets: Any, family: str = "llama") -> str:
    return " ".join(path.rpartition(".")[2] for path in resolve_targets(targets, model(family)))


def test_targets_as_peft_resolves_them() -> None:
    assert last(None) == last(None, "qwen3") == "q_proj v_proj"
    assert last("all-linear") == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert last(["o_proj", "q_proj"]) == "q_proj o_proj"
    assert last(["self_attn.k_proj", "down_proj", "lm_head"]) == "k_proj down_proj lm_head"
    assert last(r".*\.(q|v)_proj") == "q_proj v_proj"
    assert last(r"model\.layers\.\d+\.mlp\..*_proj") == "gate_proj up_proj down_proj"
    # Routers and experts are no nn.Linear in transformers 5, so "all-linear" leaves them out.
    assert last(None, "mixtral") == last(None, "gemma2") == "q_proj v_proj"
    assert resolve_targets(["q_proj"], model()) == ("model.layers.self_attn.q_proj",)


@pytest.mark.parametrize(
    ("targets", "family", "name", "words"),
    [
        (["query"], "llama", "lora-target-unknown", ["'query'", "q_proj"]),
        (["q_proj", "w1"], "llama", "lora-target-unknown", ["'w1'"]),
        (["proj"], "llama", "lora-target-unknown", ["'proj'"]),
        (r".*\.w\d", "llama", "lora-target-unknown", [r".*\\.w\\d"]),
        ("(", "llama", "lora-option-invalid", ["regular expression"]),
        ([], "llama", "lora-option-invalid", ["[]"]),
        (["lm_head"], "qwen3", "lora-target-tied", ["lm_head", "ties"]),
        (["embed_tokens"], "llama", "lora-target-unsupported", ["no linear layer"]),
        (["q_proj", "gate"], "mixtral", "lora-target-unsupported", ["gate", "router"]),
        (["w1"], "mixtral", "lora-target-unsupported", ["w1", "experts"]),
        (["down_proj"], "mixtral", "lora-target-unsupported", ["down_proj", "experts"]),
        (["experts"], "qwen3_moe", "lora-target-unsupported", ["experts"]),
        (None, "qwen3_moe", "lora-target-needed", ["qwen3_moe", "q_proj"]),
    ],
)
def test_targets_that_name_nothing_here(targets: Any, family: str, name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve_targets(targets, model(family))
    assert caught.value.name == name and all(word in str(caught.value) for word in words), caught.value


def recorded() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "adapters" / "kinds" / "targets.json").read_text())


@pytest.mark.parametrize(
    "case", recorded(), ids=lambda case: f"{case['family']}-{'-'.join(case['config']) or 'default'}"
)
def test_ranks_and_scales_of_every_module_are_pefts(case: dict[str, Any]) -> None:
    shape = model(case["family"])
    spec = lora_spec(LoraConfig(**case["config"]), shape)
    found = {}
    for target in spec.targets:
        for module, rank, scale in zip(modules_of(target.path, shape), target.ranks, target.scales):
            if rank:
                found[module] = [rank, pytest.approx(scale, rel=1e-15)]
    assert case["adapted"] == found
    saved = [
        f"{m}.{leaf.rpartition('.')[2]}" for leaf in spec.saved for m in modules_of(leaf.rpartition(".")[0], shape)
    ]
    assert sorted(saved) == case["saved"]


def test_a_module_that_is_saved_brings_all_that_lies_in_it() -> None:
    spec = lora_spec(LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]), model())
    assert [leaf.split(".")[-2] for leaf in spec.saved] == ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("options", "family", "name", "words"),
    [
        ({"modules_to_save": ["head"]}, "llama", None, []),
        ({"modules_to_save": ["wte"]}, "llama", "lora-target-unknown", ["'wte'", "lm_head"]),
        ({"modules_to_save": ["lm_head"]}, "qwen3", "lora-target-tied", ["lm_head", "ensure_weight_tying"]),
        ({"modules_to_save": ["layers.1.mlp.up_proj"]}, "llama", "lora-target-unsupported", ["layers 1"]),
        ({"modules_to_save": ["gate"]}, "mixtral", "lora-target-unsupported", ["'gate'", "experts"]),
        ({"target_modules": "all-linear"}, "mixtral", "lora-target-unsupported", ["all-linear", "experts"]),
        ({"target_modules": r".*\.w[13]"}, "mixtral", "lora-target-unsupported", ["w[13]", "experts"]),
        ({"target_modules": ["up_proj"]}, "qwen3_moe", "lora-target-unsupported", ["up_proj", "experts"]),
        ({"exclude_modules": "("}, "llama", "lora-option-invalid", ["exclude_modules", "regular expression"]),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "llama", "lora-target-none", ["exclude_modules"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, "llama", "lora-target-none", ["q_proj"]),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "llama", "lora-option-invalid", ["layers_to_"]),
        ({"layers_pattern": "layers"}, "llama", "lora-option-invalid", ["layers_pattern", "layers_to_transform"]),
        ({"rank_pattern": {"q_proj": 0}}, "llama", "lora-option-invalid", ["rank_pattern", "'q_proj': 0"]),
        ({"alpha_pattern": {"(": 2}}, "llama", "lora-option-invalid", ["alpha_pattern"]),
    ],
)
def test_what_a_pattern_cannot_mean(options: Any, family: str, name: str | None, words: list[str]) -> None:
    if name is None:
        assert lora_spec(LoraConfig(**options), model(family)).saved == ("lm_head.weight",)
        return
    with pytest.raises(UserError) as caught:
        lora_spec(LoraConfig(**options), model(family))
    assert caught.value.name == name and all(word in str(caught.value) for word in words), caught.value


def test_spec_and_scale() -> None:
    spec = lora_spec(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, use_rslora=True), model())
    paths = ("model.layers.self_attn.q_proj", "model.layers.self_attn.v_proj")
    assert spec == LoraSpec(tuple(LoraTarget(path, (16, 16), (8.0, 8.0)) for path in paths), 0.05)
    assert [t.scale for t in spec.targets] == [8.0, 8.0]
    assert lora_spec(LoraConfig(), model()).targets[0].scale == 1.0


def test_the_whole_config_file_of_peft_is_understood() -> None:
    raw = json.loads((GOLDEN / "adapters" / "adapter_final" / "adapter_config.json").read_text())
    config = LoraConfig.of(raw)
    assert (config.r, config.lora_alpha, config.inference_mode) == (4, 8, True)
    assert set(raw) <= set(vars(config))
    assert last(config.target_modules) == "q_proj k_proj v_proj o_proj"


class Enum:
    value = "LORA"


class ForeignConfig:
    """Stands for peft.LoraConfig: sets, enumerations, a runtime_config, fields of a later release."""

    def __init__(self, **more: Any) -> None:
        self.peft_type = Enum()
        self.r, self.lora_alpha, self.target_modules = 4, 16, {"v_proj", "k_proj"}
        self.runtime_config, self.modules_to_tie = object(), ["lm_head"]
        self.field_of_tomorrow = None
        self.__dict__.update(more)


def test_a_foreign_object_is_read_by_its_attributes() -> None:
    config = LoraConfig.of(ForeignConfig())
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 16, ["k_proj", "v_proj"])
    assert LoraConfig.of(config) is config
    with pytest.raises(UserError, match="field_of_tomorrow = 3"):
        LoraConfig.of(ForeignConfig(field_of_tomorrow=3))


@pytest.mark.parametrize(
    "option",
    [
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"target_parameters": ["mlp.experts"]},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "pissa"},
        {"qalora_group_size": 8},
        {"task_type": "SEQ_CLS"},
        {"peft_type": "LOHA"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_is_not_supported_is_refused_by_name(option: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        lora_spec(LoraConfig(**option), model())
    assert caught.value.name == "lora-option-unsupported" and next(iter(option)) in str(caught.value)


@pytest.mark.parametrize(
    "option", [{"r": 0}, {"r": 1.5}, {"lora_alpha": 0}, {"lora_dropout": 1.0}, {"lora_dropout": "0"}]
)
def test_wrong_values(option: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        LoraConfig(**option).check()
    assert caught.value.name == "lora-option-invalid" and next(iter(option)) in str(caught.value)
