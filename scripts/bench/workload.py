"""The workload of the comparison with TRL: a Qwen3-shaped random model, a word-level tokenizer, pairs of random words.

8 layers, hidden 512, 8 heads, 4 key-value heads, head size 64, MLP 1536, vocabulary 32,000, tied: 42 M parameters.
256 pairs with log-normal lengths (sigma 0.6), on average 152 tokens (prompt) and 95 tokens (each answer). One seed, one
workload.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, MLP, VOCABULARY = 8, 512, 8, 4, 64, 1536, 32_000
PAIRS, SIGMA, PROMPT_TOKENS, ANSWER_TOKENS, MAX_LENGTH = 256, 0.6, 152, 95, 512
SEED = 0
PAD, END, FIRST_WORD = 0, 1, 2
INITIAL_STD = 0.02


@dataclass(frozen=True)
class Workload:
    """`model` is a Hugging Face directory, `pairs` a JSONL file; `lengths` [N,3] are tokens of prompt and answers."""

    model: Path
    pairs: Path
    lengths: np.ndarray


def make(folder: Path) -> Workload:
    """Writes the workload into `folder`, or finds it there finished."""
    lengths = pair_lengths()
    if not (folder / "model" / "config.json").is_file():
        scratch = folder.with_name(folder.name + ".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "model").mkdir(parents=True)
        _write_weights(scratch / "model")
        _write_tokenizer(scratch / "model")
        _write_pairs(scratch / "pairs.jsonl", lengths)
        _write_json(scratch / "model" / "config.json", config())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    return Workload(folder / "model", folder / "pairs.jsonl", lengths)


def config() -> dict[str, object]:
    """The model's config.json."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "initializer_range": INITIAL_STD,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
    }


def linear_parameters() -> tuple[int, int]:
    """Parameters that a token is multiplied with: in the layers, and in the unembedding."""
    attention = 2 * HIDDEN * HEADS * HEAD + 2 * HIDDEN * KV_HEADS * HEAD
    return LAYERS * (attention + 3 * HIDDEN * MLP), HIDDEN * VOCABULARY


def pair_gflop(lengths: np.ndarray) -> float:
    """GFLOP that a mean pair needs: the policy forward and backward (three forwards), the reference forward.

    Counted with the prompt once and the unembedding at answer tokens only; the attention's own products are left out.
    """
    layers, head = linear_parameters()
    tokens = float(lengths.sum(axis=1).mean())
    scored = float(lengths[:, 1:].sum(axis=1).mean())
    return 4 * 2 * (layers * tokens + head * scored) / 1e9


def pair_lengths() -> np.ndarray:
    """[N,3] int: tokens of prompt, chosen and rejected (with the end token), log-normal around the means."""
    random = np.random.default_rng(SEED)
    means = np.array([PROMPT_TOKENS, ANSWER_TOKENS, ANSWER_TOKENS])
    drawn = random.lognormal(np.log(means) - SIGMA**2 / 2, SIGMA, size=(PAIRS, 3))
    return np.clip(np.rint(drawn).astype(int), 4, MAX_LENGTH - 1)


def _write_weights(model: Path) -> None:
    from safetensors.numpy import save_file

    random = np.random.default_rng(SEED + 1)

    def drawn(*shape: int) -> np.ndarray:
        return random.normal(0.0, INITIAL_STD, size=shape).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": drawn(VOCABULARY, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
            "mlp.gate_proj": (MLP, HIDDEN),
            "mlp.up_proj": (MLP, HIDDEN),
            "mlp.down_proj": (HIDDEN, MLP),
        }
        tensors |= {f"{prefix}{name}.weight": drawn(*shape) for name, shape in shapes.items()}
        norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
        norms |= {"self_attn.q_norm": HEAD, "self_attn.k_norm": HEAD}
        tensors |= {f"{prefix}{name}.weight": np.ones(size, np.float32) for name, size in norms.items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _word(token: int) -> str:
    return f"w{token}"


def _write_tokenizer(model: Path) -> None:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    special = {PAD: "<pad>", END: "<end>"}
    words = {special.get(token, _word(token)): token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special.values()])
    tokenizer.save(str(model / "tokenizer.json"))
    _write_json(
        model / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": special[PAD],
            "eos_token": special[END],
            "model_max_length": 2048,
        },
    )


def _write_pairs(path: Path, lengths: np.ndarray) -> None:
    random = np.random.default_rng(SEED + 2)
    rows = []
    for prompt, chosen, rejected in lengths:
        # The trainers append the end token, which counts as part of an answer; " " keeps prompt and answer apart.
        texts = [
            " ".join(_word(token) for token in random.integers(FIRST_WORD, VOCABULARY, size=count))
            for count in (prompt, chosen - 1, rejected - 1)
        ]
        rows.append({"prompt": texts[0], "chosen": " " + texts[1], "rejected": " " + texts[2]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
