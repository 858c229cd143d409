"""Which linear layers a LoRA configuration names in a given model: PEFT's rules, on the paths of the stacked tree."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig, layers_of, linear_shapes
from jax_dpo.models.lora import LoraConfig, LoraSpec

# PEFT's own choice where target_modules is None.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "llama": ("q_proj", "v_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
}
ALL_LINEAR = "all-linear"


def lora_spec(config: LoraConfig, model: ModelConfig, trained: bool = False) -> LoraSpec:
    """The adapter that `config` means on `model`; `trained` says that it exists already.

    Raises UserError: what `LoraConfig.check` raises, lora-target-unknown, lora-target-unsupported.
    """
    config.check(trained)
    return LoraSpec(
        r=config.r,
        alpha=float(config.lora_alpha),
        dropout=float(config.lora_dropout),
        targets=resolve_targets(config.target_modules, model),
        use_rslora=bool(config.use_rslora),
    )


def resolve_targets(targets: list[str] | str | None, model: ModelConfig) -> tuple[str, ...]:
    """Tree paths of the linear layers that `target_modules` names, in the order of the tree.

    A name matches a module whose path is it or ends with it; a string is "all-linear" (all but the head) or a regular
    expression for the whole path. Raises UserError: lora-target-unknown, lora-target-unsupported.
    """
    linears = list(linear_shapes(model))
    if targets is None:
        if model.model_type not in DEFAULT_TARGETS:
            raise UserError(
                "lora-target-unknown",
                f"PEFT has no target_modules of its own for the family {model.model_type}. Name them, such as q_proj and v_proj.",
            )
        targets = list(DEFAULT_TARGETS[model.model_type])
    if targets == ALL_LINEAR:
        found = {path for path in linears if path != "lm_head"}
    elif isinstance(targets, str):
        found = _by_pattern(targets, linears, model)
    elif isinstance(targets, (list, tuple)) and targets and all(isinstance(name, str) for name in targets):
        found = {path for name in targets for path in _by_name(name, linears, model)}
    else:
        raise UserError(
            "lora-target-unknown",
            f"target_modules is {targets!r}; expected names, {ALL_LINEAR!r} or a regular expression.",
        )
    for path in found:
        layers = layers_of(model, path)
        if len(layers) < model.num_layers:
            raise _some_layers(targets, path, [i in layers for i in range(model.num_layers)])
    return tuple(path for path in linears if path in found)


def _no_experts(name: str) -> UserError:
    return UserError(
        "lora-target-unsupported",
        f"target_modules names {name}, which is a router or the experts: their matrices are stacked and no linear layers, and an "
        "adapter on them is not supported. Name projections of attention, such as q_proj.",
    )


def _by_name(name: str, linears: list[str], model: ModelConfig) -> set[str]:
    found = _select(name, lambda module: module == name or module.endswith("." + name), linears, model)
    if found:
        return found
    last = name.rpartition(".")[2]
    if last == "lm_head":
        raise UserError(
            "lora-target-unsupported",
            "target_modules names lm_head, but the model ties it to its embedding: an adapter on it would change both.",
        )
    if last in ("embed_tokens", "norm", "q_norm", "k_norm") or last.endswith("layernorm"):
        raise UserError("lora-target-unsupported", f"target_modules names {name}, which is no linear layer.")
    if model.experts is not None and last in (
        "gate",
        "experts",
        "gate_up_proj",
        "down_proj",
        *model.experts.projections,
    ):
        raise _no_experts(name)
    raise _unknown(name, linears)


def _by_pattern(pattern: str, linears: list[str], model: ModelConfig) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            "lora-target-unknown", f"target_modules {pattern!r} is no regular expression: {error}."
        ) from None
    found = _select(pattern, lambda module: compiled.fullmatch(module) is not None, linears, model)
    if not found:
        raise _unknown(pattern, linears)
    return found


def _select(given: str, means: Callable[[str], bool], linears: list[str], model: ModelConfig) -> set[str]:
    """The paths that are meant in every layer; a path that is meant in some layers only is refused."""
    found = set()
    for path in linears:
        hits = [means(module) for module in _modules(path, model.num_layers)]
        if all(hits):
            found.add(path)
        elif any(hits):
            raise _some_layers(given, path, hits)
    return found


def _modules(path: str, num_layers: int) -> list[str]:
    """Module paths as PEFT sees them, with the number of the layer."""
    head, layers, rest = path.partition("model.layers.")
    return [f"{head}{layers}{i}.{rest}" for i in range(num_layers)] if layers else [path]


def _some_layers(name: Any, path: str, hits: list[bool]) -> UserError:
    layers = ", ".join(str(i) for i, hit in enumerate(hits) if hit)
    last = path.rpartition(".")[2]
    return UserError(
        "lora-target-unsupported",
        f"target_modules {name!r} means {last} in layers {layers} only; an adapter on some of the layers is not supported.",
    )


def _unknown(name: str, linears: list[str]) -> UserError:
    known = ", ".join(path.rpartition(".")[2] for path in linears)
    return UserError(
        "lora-target-unknown", f"target_modules {name!r} names no linear layer of the model; it has {known}."
    )
