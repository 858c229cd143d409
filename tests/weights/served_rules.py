"""What vLLM's loader makes of a directory, by the rules of docs/serving.md, which says where each comes from.

The rules are written a second time here, out of vLLM's source and nothing of jax_dpo: numpy, safetensors and transformers'
AutoConfig alone, which vLLM reads config.json with. `Refused.rule` is the name of a rule in docs/serving.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

RULES = (
    *(
        "architecture",
        "weight-files",
        "index",
        "names",
        "complete",
        "shapes",
        "tied-head",
        "dtype",
        "rope",
        "activation",
    ),
    *("stop-ids", "chat-template", "adapter-file", "adapter-config", "adapter-saved", "adapter-dora", "adapter-rank"),
    *("adapter-keys", "adapter-modules", "adapter-scale"),
)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""what --max-lora-rank can be"""
_DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_TIED = ("GemmaForCausalLM", "Gemma2ForCausalLM")
_MIXTURES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
_WITH_HEAD = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM")
"""whose class names embedding_modules"""
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Refused(Exception):
    """vLLM stops here, or would serve another model than the one that was trained without a word of it."""

    def __init__(self, rule: str, why: str) -> None:
        assert rule in RULES, rule
        super().__init__(f"{rule}: {why}")
        self.rule = rule


class Rope(NamedTuple):
    theta: float
    kind: str
    rest: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Served:
    """What vLLM holds: weights under the names of checkpoints (a tied head under its own name too), and what it was told beside them."""

    architecture: str
    tensors: dict[str, np.ndarray]
    dtype: str
    rope: Rope
    stops: frozenset[int]
    template: str | None


class LowRank(NamedTuple):
    """An adapter on one linear layer: W x + scale B A x."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def served_model(directory: Path) -> Served:
    """A directory of full weights as `vllm serve` takes it. Raises Refused."""
    from transformers import AutoConfig

    raw = json.loads((directory / "config.json").read_text())
    config = AutoConfig.from_pretrained(str(directory))
    names = raw.get("architectures") or []
    if len(names) != 1 or names[0] not in (*_DENSE, *_TIED, *_MIXTURES):
        raise Refused("architecture", f"architectures is {names}")
    _check_activation(names[0], raw)
    found, dtypes = _read_weights(directory)
    return Served(
        architecture=names[0],
        tensors=_load(found, names[0], config),
        dtype=_dtype(raw, dtypes),
        rope=_rope(raw, config),
        stops=_stops(directory, raw),
        template=_template(directory),
    )


# -- weights


def _read_weights(directory: Path) -> tuple[dict[str, np.ndarray], set[str]]:
    """All tensors of the files that are read, and their types: every *.safetensors but what an index does not name."""
    files = sorted(directory.glob("*.safetensors"))
    if any(path.name.startswith("consolidated") for path in files):
        raise Refused("weight-files", "consolidated*.safetensors are taken for Mistral's own format")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in named if not (directory / name).exists())
        if missing:
            raise Refused("index", f"{missing[0]} is named and not there")
        files = [path for path in files if path.name in named]
    if not files:
        raise Refused("weight-files", "no weights")
    tensors: dict[str, np.ndarray] = {}
    dtypes = set()
    for path in files:
        with safe_open(path, framework="np") as file:
            for name in sorted(file.keys()):
                dtypes.add(_DTYPES[file.get_slice(name).get_dtype()])
                tensors[name] = file.get_tensor(name)
    return tensors, dtypes


def _load(found: Mapping[str, np.ndarray], architecture: str, config: Any) -> dict[str, np.ndarray]:
    """Each tensor goes to the parameter of its name; a tied head is skipped and is the embedding."""
    tied = config.tie_word_embeddings
    if architecture in _TIED and not tied:
        raise Refused("tied-head", f"{architecture} has no head of its own")
    shapes = _shapes(architecture, config)
    held: dict[str, np.ndarray] = {}
    for name, value in found.items():
        if name == "lm_head.weight" and tied:
            continue
        if "rotary_emb.inv_freq" in name or (name.endswith(".bias") and name not in shapes):
            continue
        if name not in shapes:
            raise Refused("names", f"there is no parameter {name}")
        if value.shape != shapes[name]:
            raise Refused("shapes", f"{name} is {value.shape}, {shapes[name]} by config.json")
        held[name] = value
    missing = sorted(set(shapes) - set(held))
    if missing:
        raise Refused("complete", f"{missing[0]} is not in the checkpoint")
    if tied:
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
    return held


def _shapes(architecture: str, config: Any) -> dict[str, tuple[int, ...]]:
    """What the model's class has parameters for, by the names of checkpoints (q, k, v and gate, up are packed on loading)."""
    D, V = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if architecture == "Gemma2ForCausalLM":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (D,) for norm in norms}
        shapes |= {layer + name: shape for name, shape in _attention(architecture, config).items()}
        shapes |= {layer + name: shape for name, shape in _feed_forward(architecture, config, i).items()}
    return shapes


def _attention(architecture: str, config: Any) -> dict[str, tuple[int, ...]]:
    H = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * H, config.num_key_value_heads * H
    shapes: dict[str, tuple[int, ...]] = {}
    both = getattr(config, "attention_bias", False) and architecture != "GemmaForCausalLM"
    inner = both or architecture == "Qwen2ForCausalLM"
    for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        shapes[f"self_attn.{name}.weight"] = (rows, config.hidden_size)
        if inner:
            shapes[f"self_attn.{name}.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (config.hidden_size, q)
    if both and architecture not in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"):
        shapes["self_attn.o_proj.bias"] = (config.hidden_size,)
    if architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"):
        shapes |= {f"self_attn.{name}.weight": (H,) for name in ("q_norm", "k_norm")}
    return shapes


def _feed_forward(architecture: str, config: Any, layer: int) -> dict[str, tuple[int, ...]]:
    D, F = config.hidden_size, config.intermediate_size
    plain = {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
    if architecture not in _MIXTURES:
        return plain
    if architecture == "MixtralForCausalLM":
        module, count, size = "block_sparse_moe", config.num_local_experts, F
        names = ("w1", "w3", "w2")
    else:
        if layer in (config.mlp_only_layers or []) or (layer + 1) % config.decoder_sparse_step:
            return plain
        module, count, size = "mlp", config.num_experts, config.moe_intermediate_size
        names = ("gate_proj", "up_proj", "down_proj")
    shapes: dict[str, tuple[int, ...]] = {f"{module}.gate.weight": (count, D)}
    for e in range(count):
        for name in names:
            shapes[f"{module}.experts.{e}.{name}.weight"] = (D, size) if name == names[2] else (size, D)
    return shapes


# -- what config.json and the files beside it say


def _check_activation(architecture: str, raw: Mapping[str, Any]) -> None:
    if architecture == "Gemma2ForCausalLM":
        said = {raw.get("hidden_activation", "gelu_pytorch_tanh"), raw.get("hidden_act", "gelu_pytorch_tanh")}
        if said != {"gelu_pytorch_tanh"}:
            raise Refused("activation", f"{architecture} with {sorted(map(str, said))}")
    elif architecture not in _TIED and raw.get("hidden_act", "silu") != "silu":
        raise Refused("activation", f"{architecture} with {raw['hidden_act']}")


def _dtype(raw: Mapping[str, Any], stored: set[str]) -> str:
    """What weights are cast to when they are loaded, which is float32 as bfloat16; config.json says it, not the files."""
    said = {raw[name] for name in ("dtype", "torch_dtype") if raw.get(name) is not None}
    if len(said) != 1 or said != stored:
        raise Refused("dtype", f"config.json says {sorted(said)}, the weights are {sorted(stored)}")
    only = said.pop()
    return "bfloat16" if only == "float32" else str(only)


def _rope(raw: Mapping[str, Any], config: Any) -> Rope:
    """By vLLM on transformers 5 (rope_parameters), and by its releases before 0.24 (rope_theta, rope_scaling): they must agree."""
    now = _rope_of(None, config.rope_parameters)
    before = _rope_of(float(raw.get("rope_theta", 10000)), raw.get("rope_scaling") or {})
    if now != before:
        raise Refused("rope", f"transformers 5 reads {now}, 4 reads {before}")
    return now


def _rope_of(theta: float | None, said: Mapping[str, Any]) -> Rope:
    rest = dict(said)
    base = rest.pop("rope_theta", theta)
    kinds = [rest.pop(name) for name in ("rope_type", "type") if rest.get(name) is not None]
    if len(set(kinds)) > 1:
        raise Refused("rope", f"rope_type and type disagree: {kinds}")
    return Rope(float(base), str(kinds[0]) if kinds else "default", tuple(sorted(rest.items())))


def _stops(directory: Path, raw: Mapping[str, Any]) -> frozenset[int]:
    """The tokenizer's end of text, and what generation_config.json says (config.json where there is none)."""
    from transformers import AutoTokenizer

    file = directory / "generation_config.json"
    said = (json.loads(file.read_text()) if file.exists() else raw).get("eos_token_id")
    found = set() if said is None else set(said) if isinstance(said, list) else {said}
    if (directory / "tokenizer_config.json").exists():
        own = AutoTokenizer.from_pretrained(str(directory)).eos_token_id
        found |= set() if own is None else {own}
    if not found:
        raise Refused("stop-ids", "nothing ends an answer")
    return frozenset(found)


def _template(directory: Path) -> str | None:
    from transformers import AutoTokenizer

    if not (directory / "tokenizer_config.json").exists():
        return None
    found = AutoTokenizer.from_pretrained(str(directory)).chat_template
    return None if found is None else str(found)


# -- adapters


def served_adapter(directory: Path, base: Served, max_lora_rank: int = 16) -> dict[str, LowRank]:
    """An adapter of `--lora-modules` by the module that it changes. Raises Refused."""
    config = json.loads((directory / "adapter_config.json").read_text())
    _check_adapter_config(config, max_lora_rank)
    file = directory / "adapter_model.safetensors"
    if not file.exists():
        raise Refused("adapter-file", f"no {file.name}")
    with safe_open(file, framework="np") as opened:
        tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        module, which = _parse(name)
        if module.rpartition(".")[2] not in _modules(base):
            raise Refused("adapter-modules", f"{module}")
        pairs.setdefault(module, {})[which] = value
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    for module, pair in pairs.items():
        if set(pair) != {"lora_A", "lora_B"} or f"{module}.weight" not in base.tensors:
            raise Refused("adapter-keys", f"{module} has {sorted(pair)}")
        meant = _meant_scale(config, module, len(pair["lora_A"]))
        if not math.isclose(meant, scale):
            raise Refused("adapter-scale", f"{module} was trained at {meant}, and is served at {scale}")
    return {module: LowRank(pair["lora_A"], pair["lora_B"], scale) for module, pair in pairs.items()}


def _meant_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's scale of one module, whose alpha_pattern vLLM does not read; its rank is that of the file."""
    patterns = config.get("alpha_pattern") or {}
    own = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(own, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _check_adapter_config(config: Mapping[str, Any], max_lora_rank: int) -> None:
    assert max_lora_rank in RANKS
    missing = {"r", "lora_alpha", "target_modules"} - set(config)
    if missing or config.get("bias", "none") != "none":
        raise Refused("adapter-config", f"without {sorted(missing)}, bias {config.get('bias')}")
    if config.get("modules_to_save"):
        raise Refused("adapter-saved", f"modules_to_save is {config['modules_to_save']}")
    if config.get("use_dora"):
        raise Refused("adapter-dora", "use_dora")
    if config["r"] > max_lora_rank:
        raise Refused("adapter-rank", f"rank {config['r']}, at most {max_lora_rank}")


def _parse(name: str) -> tuple[str, str]:
    """base_model.model.<module>.lora_A.weight -> the module and lora_A."""
    parts = name.removeprefix("base_model.model.").split(".")
    if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
        raise Refused("adapter-keys", f"{name} is unsupported")
    return ".".join(parts[:-2]), parts[-2]


def _modules(base: Served) -> set[str]:
    """Last names of the modules that can carry an adapter: all linear ones, and the head and the embedding where the class says so."""
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    return linear | {"lm_head", "embed_tokens"} if base.architecture in _WITH_HEAD else linear


def with_adapter(tensors: Mapping[str, np.ndarray], adapter: Mapping[str, LowRank]) -> dict[str, np.ndarray]:
    """The weights that an adapter amounts to, in float64: W + scale B A."""
    found = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    for module, (a, b, scale) in adapter.items():
        found[f"{module}.weight"] = found[f"{module}.weight"] + scale * (b.astype(np.float64) @ a.astype(np.float64))
    return found


def changed(tensors: Iterable[tuple[str, np.ndarray]], seed: int = 5) -> dict[str, np.ndarray]:
    """Other weights of the same shapes, none of them the one that was there."""
    random = np.random.default_rng(seed)
    return {name: (x + 0.1 * random.standard_normal(x.shape)).astype(np.float32) for name, x in tensors}
