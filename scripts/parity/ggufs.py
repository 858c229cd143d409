"""GGUF files of a tiny llama, as llama.cpp's converter writes them: names, permuted q and k, quantised blocks, a tokenizer inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from scripts.parity.models import generator

# Types that the gguf package can quantise to; their columns are a multiple of 32.
PLAIN = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
# Types that it can only read, 256 columns to a block: filled with random blocks. (bytes of a block, where the float16 scales lie)
BLOCKS: dict[str, tuple[int, tuple[int, ...]]] = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
# What makes weights of about 0.15 out of random bytes; a weight of Q6_K is the scale times two signed bytes, not two small numbers.
SCALE = {"Q4_K": 4e-4, "Q5_K": 4e-4, "Q6_K": 1e-4}

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, model: Path, kind: str, seed: int) -> None:
    """The llama of a Hugging Face directory with all matrices of one type."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(path, "llama")
    _write_shape(writer, config)
    _write_tokenizer(writer, model)
    for name, tensor in sorted(load_file(model / "model.safetensors").items()):
        stored = _permuted(name, tensor, config)
        if tensor.ndim == 1:
            writer.add_tensor(_gguf_name(name), stored)
        elif kind in BLOCKS:
            writer.add_tensor(
                _gguf_name(name), _blocks(name, stored.shape, kind, seed), raw_dtype=GGMLQuantizationType[kind]
            )
        else:
            quantised = quantize(stored, GGMLQuantizationType[kind])
            writer.add_tensor(_gguf_name(name), quantised, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, *middle, end = name.split(".")
    return f"blk.{layer}.{_LAYER['.'.join(middle)]}.{end}"


def _permuted(name: str, tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """llama.cpp puts the halves of each head of q and k side by side, for its own rotation."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    rows, columns = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _blocks(name: str, shape: tuple[int, ...], kind: str, seed: int) -> np.ndarray:
    """Random blocks of a type, whose scales make weights of an ordinary size."""
    size, scales = BLOCKS[kind]
    rows, columns = shape
    random = generator(seed, f"{kind} {name}")
    blocks = random.integers(0, 256, size=(rows, columns // 256, size), dtype=np.uint8)
    for place in scales:
        values = (random.uniform(0.5, 1.5, size=blocks.shape[:2]) * SCALE[kind]).astype(np.float16)
        blocks[..., place : place + 2] = values[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def _write_shape(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _write_tokenizer(writer: Any, model: Path) -> None:
    from gguf import TokenType

    described = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = sorted(described["model"]["vocab"], key=described["model"]["vocab"].get)
    special = {token["content"]: token["id"] for token in described["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in vocabulary])
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    )
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    writer.add_eos_token_id(special[config["eos_token"]])
    writer.add_pad_token_id(special[config["pad_token"]])
    writer.add_add_bos_token(False)
    writer.add_chat_template((model / "chat_template.jinja").read_text(encoding="utf-8"))
