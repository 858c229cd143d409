"""Models in GGUF files as a Hugging Face model: config, tensors under Hugging Face's names, tokenizer.

llama.cpp's converter renames tensors and, for the architecture `llama` (Mistral's models among them), reorders the rows of q
and k so that the two numbers that rotary embedding turns together lie side by side. Both are undone here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.models.config import Rope
from jax_dpo.models.families import model_config
from jax_dpo.weights.gguf_file import GgufFile, GgufTensor, read_gguf
from jax_dpo.weights.gguf_tokenizer import tokenizer_files
from jax_dpo.weights.model_files import ModelFiles, build_leaves

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Metadata keys under the architecture's name that are read, or that say nothing about the forward pass.
_KNOWN_KEYS = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "tensor_data_layout",
        "vocab_size",
    }
)
# llama.cpp bakes Llama 3's stretched frequencies into a tensor; these are the constants of every such release.
_LLAMA3 = Rope(theta=0.0, kind="llama3", original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0)


def open_gguf(path: Path) -> ModelFiles:
    """Opens a GGUF file; weights come as float32.

    Raises UserError: gguf-broken, gguf-metadata (missing or without a known meaning), family-unknown,
    tensor-type-unknown, tensors-differ, shape-differs.
    """
    file = read_gguf(path)
    hf = _hf_config(file)
    config = model_config(hf, str(path))
    tensors = {_hugging_face_name(name): tensor for name, tensor in file.tensors.items() if name != "rope_freqs.weight"}
    if hf["model_type"] == "llama":
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        for name, tensor in tensors.items():
            module = name.split(".")[-2] if name.count(".") > 1 else ""
            if module in heads:
                tensors[name] = _unpermuted(tensor, heads[module])
    return ModelFiles(
        path=path,
        hf_config=hf,
        config=config,
        leaves=build_leaves(path, config, tensors, dict.fromkeys(tensors, str(path))),
        dtype="float32",
        generation_config=_generation_config(file.metadata),
        read_tokenizer=lambda: tokenizer_files(file.metadata, path),
    )


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays and is refused later."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        if part in _IN_LAYER:
            return f"model.layers.{layer}.{_IN_LAYER[part]}.{kind}"
    return name


def _unpermuted(tensor: GgufTensor, heads: int) -> GgufTensor:
    """Rows back in Hugging Face's order: of each head first all first halves of the turned pairs, then all second halves."""
    rows = tensor.shape[0]
    if rows % (2 * heads):
        return tensor  # a shape that cannot be right, which `build_leaves` refuses
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    return replace(tensor, rows=order)


def _hf_config(file: GgufFile) -> dict[str, Any]:
    """A Hugging Face config out of the metadata and the names of the tensors."""
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            "family-unknown", f"{file.path}: general.architecture is {arch!r}; those that can be trained are {known}."
        )
    get = _Keys(file, arch)
    get.refuse_unknown()
    heads, hidden = get.integer("attention.head_count"), get.integer("embedding_length")
    head_dim = get.integer("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if get.integer(name, head_dim) != head_dim:
            raise get.bad(name, f"{head_dim}, the size of a head")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError("tensors-differ", f"{file.path} has no token_embd.weight.")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": get.integer("feed_forward_length"),
        "num_hidden_layers": get.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": get.integer("context_length"),
        "rms_norm_eps": get.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "rope_parameters": _rope_parameters(file, get, head_dim),
        "dtype": "float32",
        **_token_ids(file.metadata),
    }
    if arch in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if arch == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    else:
        config["use_sliding_window"] = False
    return config


def _rope_parameters(file: GgufFile, get: _Keys, head_dim: int) -> dict[str, Any]:
    theta = get.number("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    kind = get.metadata.get(f"{get.arch}.rope.scaling.type", "none")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": get.number("rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = get.integer("rope.scaling.original_context_length")
    stored = file.tensors.get("rope_freqs.weight")
    if stored is None:
        return rope
    # Each entry divides one frequency; the largest is Llama 3's factor, if the others follow from it.
    divisors = stored.read()
    guess = replace(_LLAMA3, theta=theta, factor=float(divisors.max()))
    plain = Rope(theta=theta).inverse_frequencies(head_dim)
    expected = plain / guess.inverse_frequencies(head_dim)
    if kind != "none" or divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(
            "gguf-metadata",
            f"{file.path}: rope_freqs.weight is not Llama 3's way of stretching rotary embedding "
            f"(factor {guess.factor:g}, original length {guess.original_length}), and no other is known in this form.",
        )
    return rope | {
        "rope_type": "llama3",
        "factor": guess.factor,
        "low_freq_factor": guess.low_freq_factor,
        "high_freq_factor": guess.high_freq_factor,
        "original_max_position_embeddings": guess.original_length,
    }


def _token_ids(metadata: dict[str, Any]) -> dict[str, int | None]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}


def _generation_config(metadata: dict[str, Any]) -> bytes | None:
    """Which tokens end an answer: the end of the text, and the end of a turn where the file names one."""
    ids = {key: value for key, value in _token_ids(metadata).items() if value is not None}
    if "eos_token_id" not in ids:
        return None
    ends = [ids["eos_token_id"]]
    for name in ("eot", "eom"):
        more = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if more is not None and more not in ends:
            ends.append(more)
    content = {"_from_model_config": True, **ids, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    return (json.dumps(content, indent=2) + "\n").encode()


class _Keys:
    """The metadata keys under the name of the architecture."""

    def __init__(self, file: GgufFile, arch: str) -> None:
        self.metadata = file.metadata
        self.path = file.path
        self.arch = arch

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.bad(name, "one whole number above 0 for all layers")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A float32 as the shortest decimal that gives it back: 1e-05, not 9.999999747378752e-06."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise self.bad(name, "a number above 0")
        return float(str(np.float32(value)))

    def _get(self, name: str, default: Any) -> Any:
        value = self.metadata.get(f"{self.arch}.{name}", default)
        if value is None:
            raise UserError(
                "gguf-metadata", f"{self.path} has no {self.arch}.{name}, without which the model cannot be built."
            )
        return value

    def bad(self, name: str, expected: str) -> UserError:
        key = f"{self.arch}.{name}"
        return UserError("gguf-metadata", f"{self.path}: {key} is {self.metadata.get(key)!r}; expected {expected}.")

    def refuse_unknown(self) -> None:
        """Raise UserError for a key of the architecture that has no known meaning and says something."""
        prefix = self.arch + "."
        for key, value in self.metadata.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in _KNOWN_KEYS and value not in (0, "", "none", []):
                raise UserError(
                    "gguf-metadata",
                    f"{self.path}: no meaning is known here for {key} = {value!r}; the model could come out wrong, "
                    "so it is not loaded.",
                )
