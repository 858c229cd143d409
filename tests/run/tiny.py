"""A model of a few thousand parameters with a tokenizer, pairs that it can learn from, and the command line as a function."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = GOLDEN / "tokenizers" / "chatml"
PAIRS = json.loads((GOLDEN / "training" / "pairs.json").read_text(encoding="utf-8"))

# Words that are one token each. Chosen answers are made of the first kind, rejected ones of the second.
GOOD = ("water", "light", "air", "sun", "earth")
BAD = ("time", "question", "words", "teacher", "year")
TOPICS = ("child", "home", "man", "kind", "inside", "easy", "plain", "time", "know", "make", "ask", "has")
PROMPT, ANSWER = 7, 4  # tokens of a plain prompt, and of an answer with its end

# Two layers, grouped key-value heads, 512 ids as the tokenizer has them.
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def make_model(directory: Path, family: str = "llama", seed: int = 0, **config: Any) -> Path:
    """A Hugging Face directory with random float32 weights of a scale at which a large learning rate does not blow up."""
    hf = {
        "model_type": family,
        "architectures": [f"{family.title()}ForCausalLM"],
        "vocab_size": 512,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": family == "qwen3",
        "eos_token_id": 2,
        "dtype": "float32",
        **SHAPE,
        **config,
    }
    random = np.random.default_rng(seed)
    tensors = {name: _draw(random, name, shape) for name, shape in _shapes(hf).items()}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, directory / file.name)
    return directory


def _shapes(hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    D, F, H = hf["hidden_size"], hf["intermediate_size"], hf["head_dim"]
    q, kv = hf["num_attention_heads"] * H, hf["num_key_value_heads"] * H
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (hf["vocab_size"], D), "model.norm.weight": (D,)}
    if not hf["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (hf["vocab_size"], D)
    for i in range(hf["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (D,),
            layer + "post_attention_layernorm.weight": (D,),
            layer + "self_attn.q_proj.weight": (q, D),
            layer + "self_attn.k_proj.weight": (kv, D),
            layer + "self_attn.v_proj.weight": (kv, D),
            layer + "self_attn.o_proj.weight": (D, q),
        }
        mlps = {"mlp.": ("gate_proj", "up_proj", "down_proj")}
        if hf["model_type"] == "mixtral":
            moe, names = layer + "block_sparse_moe.", ("w1", "w3", "w2")
            shapes[moe + "gate.weight"] = (hf["num_local_experts"], D)
            mlps = {f"block_sparse_moe.experts.{e}.": names for e in range(hf["num_local_experts"])}
        for mlp, (gate, up, down) in mlps.items():
            shapes |= {layer + mlp + f"{name}.weight": (F, D) for name in (gate, up)}
            shapes[layer + mlp + f"{down}.weight"] = (D, F)
        if hf["model_type"] == "qwen3":
            shapes |= {layer + "self_attn.q_norm.weight": (H,), layer + "self_attn.k_norm.weight": (H,)}
    return shapes


def _draw(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return (1 + 0.1 * random.standard_normal(shape)).astype(np.float32)
    return (0.15 * random.standard_normal(shape)).astype(np.float32)


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Plain pairs, every tree of PROMPT + 2 * ANSWER tokens, so that every run has one batch shape."""
    random = np.random.default_rng(seed)
    pick = lambda words, n: [str(w) for w in random.choice(words, n, replace=False)]  # noqa: E731
    return [
        {
            "prompt": "The long {} and {}:".format(*pick(TOPICS, 2)),
            "chosen": " " + " ".join(pick(GOOD, ANSWER - 1)),
            "rejected": " " + " ".join(pick(BAD, ANSWER - 1)),
        }
        for _ in range(count)
    ]


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same as conversations."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
        }
        for row in text_rows(count, seed)
    ]


def scored_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same with scores, of which every fourth gap is below 0.15."""
    return [
        {**row, "score_chosen": 0.9, "score_rejected": 0.85 if i % 4 == 3 else 0.2}
        for i, row in enumerate(text_rows(count, seed))
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Ended(NamedTuple):
    """What a call of the command line came to."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.rstrip().splitlines()[-1]


def jax_dpo(*argv: Any) -> Ended:
    """`jax-dpo argv` in this process."""
    from jax_dpo.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(a) for a in argv])
    return Ended(code, out.getvalue(), err.getvalue())


def flags(options: Mapping[str, Any]) -> list[str]:
    """{"max_steps": 3} as the command line writes it."""
    found: list[str] = []
    for name, value in options.items():
        items = value if isinstance(value, list | tuple) else [value]
        found += [f"--{name}", *(json.dumps(x) if isinstance(x, dict | bool) or x is None else str(x) for x in items)]
    return found


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run's log, of one kind or all."""
    found = [json.loads(line) for line in (run / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    return [r for r in found if kind is None or r["kind"] == kind]


# What differs between two equal runs: when, and how fast.
TIMING = ("time", "tokens_per_second", "pairs_per_second", "step_time")
TIMING += (
    "seconds",
    "train_steps_per_second",
    "train_samples_per_second",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "eval_kl_on_policy/runtime",
)


def untimed(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records without what clocks say."""
    return [{k: v for k, v in record.items() if k not in TIMING} for record in found]


def tensors(directory: Path, name: str = "model.safetensors") -> dict[str, np.ndarray]:
    return load_file(directory / name)


def checkpoints(run: Path) -> list[str]:
    """Names of the checkpoints of a run, by step."""
    return sorted((p.name for p in run.glob("checkpoint-*")), key=lambda name: int(name.rpartition("-")[2]))


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its content; {} where there is none."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
