"""What the tests of optimizers run: random parameters and gradients, and the cases; numpy alone, so that torch's side can use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden" / "optim" / "optimizers.json"

# Trees' names with a stacked axis of 3 layers; a LoRA matrix has more layers than rows, one matrix is square.
PARAMS: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (5, 4),
    "model.layers.self_attn.q_proj.weight": (3, 4, 4),
    "model.layers.self_attn.q_proj.bias": (3, 4),
    "model.layers.self_attn.q_proj.lora_a": (3, 2, 4),
    "model.layers.self_attn.q_norm.weight": (3, 4),
    "model.layers.input_layernorm.weight": (3, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (5, 4),
}
# Neither biases nor norms decay.
KEPT = ("model.layers.self_attn.q_proj.bias", "model.layers.self_attn.q_norm.weight")
KEPT += ("model.layers.input_layernorm.weight", "model.norm.weight")

RATES = (0.0, 0.01, 0.02, 0.015, 0.01, 0.003, 0.02, 0.01, 0.005, 0.001)

# name: DPOConfig's options beside the rate
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "adamw-wide": {"optim": "adamw_torch", "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-2},
    "adafactor": {"optim": "adafactor"},
    "adafactor-decay": {"optim": "adafactor", "weight_decay": 0.1},
    "lion": {"optim": "lion_32bit", "adam_beta2": 0.99},
    "lion-decay": {"optim": "lion_32bit", "adam_beta1": 0.95, "adam_beta2": 0.98, "weight_decay": 0.1},
    "sgd": {"optim": "sgd"},
    "sgd-decay": {"optim": "sgd", "weight_decay": 0.1},
    "sgd-momentum": {"optim": "sgd", "weight_decay": 0.1, "optim_args": "momentum=0.9"},
    "sgd-dampened": {"optim": "sgd", "weight_decay": 0.1, "optim_args": "momentum=0.9,dampening=0.3"},
    "sgd-nesterov": {"optim": "sgd", "optim_args": "momentum=0.8, nesterov=True"},
}


def start() -> dict[str, np.ndarray]:
    return _draw(0)


def gradients(step: int) -> dict[str, np.ndarray]:
    """Gradients of step `step` (from 0), of scales that differ by tensor and by step; layers differ by a factor of 50."""
    found = _draw(step + 1)
    for i, (path, shape) in enumerate(PARAMS.items()):
        scale = np.float32(10.0 ** (i % 3 - 1) * (1 + step % 4))
        layers = np.array([0.1, 1.0, 5.0], np.float32).reshape(3, *[1] * (len(shape) - 1))
        found[path] *= scale * (layers if path.startswith("model.layers.") else np.float32(1))
    return found


def _draw(seed: int) -> dict[str, np.ndarray]:
    return {
        path: np.random.default_rng([7, seed, i]).standard_normal(shape).astype(np.float32)
        for i, (path, shape) in enumerate(PARAMS.items())
    }
