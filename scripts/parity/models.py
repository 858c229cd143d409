"""Tiny random models of every family, adapters and GGUF files, as Hugging Face, PEFT and llama.cpp write them.

Weights are drawn so wide that nothing is idle: norms and biases differ from 1 and 0, logits spread, every parameter has a gradient.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 420
TURN_END = 2  # the id of the tokenizers' end

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


# name -> (model_type, what differs from _SIZES): one for each way in which families differ.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _rope(10000.0)),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, **_rope(500.0)}),
    "llama_scaled": (
        "llama",
        _rope(
            1000.0,
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama_wide": (
        "llama",
        {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64, **_rope(10000.0)},
    ),
    "mistral": ("mistral", {"sliding_window": 11, **_rope(10000.0)}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, **_rope(1e6)}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, **_rope(1e6)}),
    "gemma": ("gemma", {"tie_word_embeddings": True, **_rope(10000.0)}),
    "gemma2": (
        "gemma2",
        {
            "tie_word_embeddings": True,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 15.0,
            **_rope(10000.0),
        },
    ),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05, **_rope(10000.0)},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            **_rope(1e6),
        },
    ),
}


# Adapters that have been trained somewhere before: (model, options of peft.LoraConfig).
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "all_linear": ("qwen3", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    "rslora": ("llama", {"r": 6, "lora_alpha": 2, "use_rslora": True, "target_modules": r".*\.(up_proj|v_proj)"}),
    "default_targets": ("mistral", {"r": 8}),
    "dora": (
        "llama",
        {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    ),
    "patterns": (
        "qwen3",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
    "one_layer": ("llama", {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "whole_modules": ("llama", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
}


def config_of(name: str) -> Any:
    """The transformers config of a model of `SHAPES`."""
    from transformers import AutoConfig

    family, differs = SHAPES[name]
    options = _SIZES | {"vocab_size": VOCABULARY, "eos_token_id": TURN_END, "pad_token_id": 0, "bos_token_id": None}
    return AutoConfig.for_model(family, **{**options, "tie_word_embeddings": False, **differs})


def generator(seed: int, name: str) -> np.random.Generator:
    """A stream of its own for each name, so that a new model changes no other."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _spread(family: str, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(middle, standard deviation) of a parameter. Gemma's norms multiply by 1 + w."""
    if "embed" in name:
        return 0.0, 0.5
    if "norm" in name:
        return 0.0 if family.startswith("gemma") else 1.0, 0.25
    if len(shape) == 1:
        return 0.0, 0.15
    return 0.0, 0.3 if "q_proj" in name or "k_proj" in name else 0.2


def write_model(folder: Path, name: str, seed: int, tokenizer: Path, moved_from: Path | None = None) -> None:
    """A model of `SHAPES` with its tokenizer beside it.

    `moved_from`: the weights are those of that directory and 3 % noise, so that log-ratios between the two are a few nats.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if moved_from is None:
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(moved_from, dtype=torch.float32)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = generator(seed, path).standard_normal(tuple(weight.shape)).astype(np.float32)
            middle, spread = _spread(model.config.model_type, path, tuple(weight.shape))
            if moved_from is None:
                weight.copy_(torch.from_numpy(middle + spread * noise))
            else:
                weight.add_(torch.from_numpy(0.03 * spread * noise))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def write_adapter(folder: Path, base: Path, seed: int, options: Mapping[str, Any]) -> None:
    """A PEFT adapter of `base` that has been somewhere: neither factor is zero. `options` are those of peft.LoraConfig."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.requires_grad:
                noise = generator(seed, path).standard_normal(tuple(weight.shape)).astype(np.float32)
                if "lora_" in path and "magnitude" not in path:
                    weight.copy_(torch.from_numpy(0.1 * noise))
                else:
                    weight.mul_(torch.from_numpy(1.0 + 0.05 * noise))
    model.save_pretrained(folder)
