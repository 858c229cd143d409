"""Which linear layers a LoRA configuration names in a given model: PEFT's rules, on the paths of the stacked tree."""

from __future__ import annotations

import math
import re
from typing import Any

from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig, layers_of, linear_shapes, parameter_shapes
from jax_dpo.models.lora import LEAVES, LoraConfig, LoraSpec, LoraTarget

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
LAYERS, EMBEDDING = "model.layers.", "model.embed_tokens.weight"


def lora_spec(config: LoraConfig, model: ModelConfig) -> LoraSpec:
    """The adapter that `config` means on `model`.

    Raises UserError: what `LoraConfig.check` raises, lora-target-unknown, lora-target-unsupported, lora-target-tied, lora-target-none.
    """
    config.check()
    names = _names(config, model)
    targets = []
    for path in linear_shapes(model):
        modules = modules_of(path, model)
        ranks = tuple(_rank(config, module) if _meant(config, names, module) else 0 for module in modules)
        if any(ranks):
            scales = tuple(_scale(config, module, rank) if rank else 0.0 for module, rank in zip(modules, ranks))
            targets.append(LoraTarget(path, ranks, _filled(ranks, scales)))
    if not targets:
        raise UserError(
            "lora-target-none",
            "No linear layer is left to adapt: exclude_modules, modules_to_save or layers_to_transform take away all that "
            f"target_modules names ({config.target_modules!r}).",
        )
    dropout = float(config.lora_dropout)
    return LoraSpec(tuple(targets), dropout, bool(config.use_dora), saved_leaves(config, model))


def resolve_targets(targets: list[str] | str | None, model: ModelConfig) -> tuple[str, ...]:
    """Tree paths of the linear layers that `target_modules` names, in the order of the tree.

    A name matches a module whose path is it or ends with it; a string is "all-linear" (all but the head) or a regular
    expression for the whole path. Raises UserError: lora-target-unknown, -unsupported, -needed, lora-option-invalid.
    """
    return tuple(target.path for target in lora_spec(LoraConfig(target_modules=targets), model).targets)


def modules_of(path: str, model: ModelConfig) -> list[str]:
    """Module paths as PEFT sees them, with the number of the layer: one for each layer that the path stacks."""
    if not path.startswith(LAYERS):
        return [path]
    rest = path[len(LAYERS) :]
    return [f"{LAYERS}{i}.{rest}" for i in layers_of(model, path)]


def _filled(ranks: tuple[int, ...], scales: tuple[float, ...]) -> tuple[float, ...]:
    """A layer without an adapter may have any scale: that of the others, where they agree."""
    used = {scale for rank, scale in zip(ranks, scales) if rank}
    return tuple(used) * len(ranks) if len(used) == 1 else scales


def _rank(config: LoraConfig, module: str) -> int:
    return int(_by_pattern(config.rank_pattern, module, config.r))


def _scale(config: LoraConfig, module: str, rank: int) -> float:
    alpha = float(_by_pattern(config.alpha_pattern, module, config.lora_alpha))
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _by_pattern(patterns: dict[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that is the end of the module's path, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _names(config: LoraConfig, model: ModelConfig) -> list[str] | re.Pattern[str]:
    """What `target_modules` means, checked: each name is the name of something."""
    targets = config.target_modules
    linears = list(linear_shapes(model))
    modules = [module for path in linears for module in modules_of(path, model)]
    if targets is None:
        if model.model_type not in DEFAULT_TARGETS:
            raise UserError(
                "lora-target-needed",
                f"PEFT has no target_modules of its own for the family {model.model_type}. Name them, such as q_proj and v_proj.",
            )
        return list(DEFAULT_TARGETS[model.model_type])
    if isinstance(targets, str) and model.experts is not None:
        return _names_beside_experts(targets, modules, model)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return [path for path in modules if path != "lm_head"]
    if isinstance(targets, str):
        compiled = _compiled("target_modules", targets)
        if not any(compiled.fullmatch(module) for module in modules):
            raise _unknown(targets, linears)
        return compiled
    if not isinstance(targets, (list, tuple)) or not targets or not all(isinstance(name, str) for name in targets):
        raise UserError(
            "lora-option-invalid",
            f"target_modules is {targets!r}; expected names, {ALL_LINEAR!r} or a regular expression.",
        )
    for name in targets:
        if _of_experts(name, model):
            raise _no_experts(name)
        if not any(_ends(module, name) for module in modules):
            raise _no_linear(name, linears)
    return list(targets)


def _names_beside_experts(targets: str, modules: list[str], model: ModelConfig) -> list[str]:
    """The names that a pattern means on a mixture of experts, where PEFT takes the last part of each module that matches."""
    if targets.lower() == ALL_LINEAR:
        raise _no_experts(targets)
    pattern = _compiled("target_modules", targets)
    assert model.experts is not None
    inside = [f"experts.{name}" for name in (*model.experts.projections, "gate_proj", "up_proj", "down_proj")]
    for layer in range(model.num_layers):
        for name in ("gate", "experts", *inside):
            if pattern.fullmatch(f"{LAYERS}{layer}.{model.experts.module}.{name}"):
                raise _no_experts(targets)
    names = sorted({module.rpartition(".")[2] for module in modules if pattern.fullmatch(module)})
    if not names:
        raise _unknown(targets, list(linear_shapes(model)))
    return names


def _of_experts(name: str, model: ModelConfig) -> bool:
    inside = ("gate", "experts", "gate_up_proj", "gate_proj", "up_proj", "down_proj")
    return model.experts is not None and name.rpartition(".")[2] in (*inside, *model.experts.projections)


def _no_experts(name: str) -> UserError:
    return UserError(
        "lora-target-unsupported",
        f"target_modules {name!r} takes in the router or the experts of a mixture: their matrices are stacked, and an adapter on them is "
        "not supported. Name projections of attention: [q_proj, k_proj, v_proj, o_proj].",
    )


def _meant(config: LoraConfig, names: list[str] | re.Pattern[str], module: str) -> bool:
    """Whether a linear layer is adapted. Layers are picked among names only, and not where a name is a whole path (as in PEFT)."""
    out = config.exclude_modules
    if isinstance(out, str) and out and _compiled("exclude_modules", out).fullmatch(module):
        return False
    if not isinstance(out, str) and any(_ends(module, name) for name in out or ()):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.modules_to_save or ()):
        return False
    if isinstance(names, re.Pattern):
        return names.fullmatch(module) is not None
    if module in names:
        return True
    return any(_ends(module, name) for name in names) and _in_layers(config, module)


def _in_layers(config: LoraConfig, module: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    # Without a pattern the first number in the path is the layer's.
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns or (r"[^.]*",)]
    index = next((int(match[1]) for match in found if match), None)
    return index in ([wanted] if isinstance(wanted, int) else list(wanted))


def saved_leaves(config: LoraConfig, model: ModelConfig) -> tuple[str, ...]:
    """Paths of the leaves of the modules that `modules_to_save` names: those whose path ends with the name (PEFT's rule), and all in them.

    Raises UserError: lora-target-unknown (no module), lora-target-tied, lora-target-unsupported (a router, or some layers' alone).
    """
    leaves = [path for path in parameter_shapes(model) if path.rpartition(".")[2] not in LEAVES]
    found = set()
    for name in config.modules_to_save or ():
        if model.tie_word_embeddings and name.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            if not config.ensure_weight_tying:
                raise UserError(
                    "lora-target-tied",
                    f"modules_to_save names {name}, but the model ties its head to its embedding, and a copy of one of them would untie "
                    "them. Add ensure_weight_tying=True, which trains the one matrix for both, or leave the name out.",
                )
            found.add(EMBEDDING)
            continue
        hits = {leaf for leaf in leaves if _saves(leaf, name, model)}
        if not hits:
            ends = ", ".join(sorted({leaf.split(".")[-2] for leaf in leaves}))
            raise UserError("lora-target-unknown", f"modules_to_save {name!r} names no module; the model has {ends}.")
        found |= hits
    return tuple(leaf for leaf in leaves if leaf in found)


def _within(module: str, name: str) -> bool:
    """Whether the module, or one that it lies in, has a path that ends with the name."""
    parts = module.split(".")
    return any(".".join(parts[:n]).endswith(name) for n in range(1, len(parts) + 1))


def _saves(leaf: str, name: str, model: ModelConfig) -> bool:
    stem = leaf.rpartition(".")[0]
    hits = [_within(module, name) for module in modules_of(stem, model)]
    whole = f"{model.experts.module}" if model.experts is not None else None
    if any(hits) and whole is not None and f".{whole}." in f"{stem}.":
        raise UserError(
            "lora-target-unsupported",
            f"modules_to_save {name!r} names {stem}, a part of a mixture of experts, which is not trained beside an adapter here.",
        )
    if any(hits) and not all(hits):
        layers = ", ".join(str(i) for i, hit in zip(layers_of(model, stem), hits) if hit)
        raise UserError(
            "lora-target-unsupported",
            f"modules_to_save {name!r} means {stem.rpartition('.')[2]} in layers {layers} only; a module is saved in all layers or none.",
        )
    return any(hits)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _compiled(option: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError("lora-option-invalid", f"{option} {pattern!r} is no regular expression: {error}.") from None


def _no_linear(name: str, linears: list[str]) -> UserError:
    last = name.rpartition(".")[2]
    if last == "lm_head":
        return UserError(
            "lora-target-tied",
            "target_modules names lm_head, but the model ties it to its embedding: an adapter on it would change both.",
        )
    if last in ("embed_tokens", "norm", "q_norm", "k_norm") or last.endswith("layernorm"):
        return UserError(
            "lora-target-unsupported",
            f"target_modules names {name}, which is no linear layer. modules_to_save trains it whole.",
        )
    return _unknown(name, linears)


def _unknown(name: str, linears: list[str]) -> UserError:
    known = ", ".join(path.rpartition(".")[2] for path in linears)
    return UserError(
        "lora-target-unknown", f"target_modules {name!r} names no linear layer of the model; it has {known}."
    )
