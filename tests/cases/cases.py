"""What the cases share beside their fixtures: checkpoints with a twist, and sums of log-probabilities."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from jax_dpo import load_model

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "golden"
SEQUENCE = (3, 5, 7, 11, 13, 17)


def edit(path: Path, **changes: Any) -> None:
    """Sets values of a JSON file; None takes a key away."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}, indent=2) + "\n")


def llama(out: Path, config: str = "config.json") -> Path:
    """The recorded llama."""
    out.mkdir(parents=True)
    source = GOLDEN / "models" / "llama"
    for name in ("model.safetensors", "generation_config.json"):
        shutil.copy(source / name, out)
    shutil.copy(source / config, out / "config.json")
    return out


def shards(out: Path, names: list[str]) -> dict[str, list[str]]:
    """Cuts the model into these files, {file: its tensors}, with an index."""
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    parts = {name: sorted(tensors)[i :: len(names)] for i, name in enumerate(names)}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, out / name, metadata={"format": "pt"})
    where = {key: name for name, keys in parts.items() for key in keys}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return parts


def adapter(out: Path, base: str | None, **config: Any) -> Path:
    """An adapter that was trained: rank 2 on q_proj of the recorded qwen3 (hidden 40, 4 heads of 16), B not zero."""
    out.mkdir(parents=True, exist_ok=True)
    random, tensors = np.random.default_rng(11), {}
    for i in range(2):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        tensors[name + ".lora_A.weight"] = random.normal(0, 0.1, (2, 40)).astype(np.float32)
        tensors[name + ".lora_B.weight"] = random.normal(0, 0.5, (64, 2)).astype(np.float32)
    if config.get("modules_to_save"):
        tensors["base_model.model.lm_head.weight"] = random.normal(0, 0.4, (512, 40)).astype(np.float32)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    whole = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    whole |= {"inference_mode": True, "target_modules": ["q_proj"], "modules_to_save": None}
    (out / "adapter_config.json").write_text(json.dumps({**whole, "base_model_name_or_path": base, **config}, indent=2))
    return out


def log_probability(model: Path, adapter: Path | None = None) -> float:
    """Of tokens 5, 7, 11, 13, 17 after token 3, in float32."""
    logits = np.asarray(load_model(model, adapter=adapter, dtype="float32")(np.asarray([SEQUENCE])))[0].astype(
        np.float64
    )
    logp = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return float(sum(logp[i, token] for i, token in enumerate(SEQUENCE[1:])))
