"""Schedules that the tests compare with transformers': (name, steps of the run, steps of warm-up, lr_scheduler_kwargs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden" / "optim" / "schedules.json"
RATE = 1e-3

# A long run, a short one, no warm-up, a warm-up that outlasts the run, one step.
_RUNS = ((50, 5), (10, 3), (6, 0), (4, 6), (1, 0))
_EACH: dict[str, tuple[dict[str, Any], ...]] = {
    "linear": ({},),
    "cosine": ({}, {"num_cycles": 1.5}),
    "cosine_with_restarts": ({}, {"num_cycles": 3}),
    "cosine_with_min_lr": ({"min_lr_rate": 0.1}, {"min_lr": 2e-4, "num_cycles": 0.75}),
    "cosine_warmup_with_min_lr": ({"min_lr_rate": 0.1}, {"min_lr": 2e-4}, {"min_lr_rate": 0.2, "warmup_lr_rate": 0.01}),
    "polynomial": ({}, {"power": 2.0, "lr_end": 1e-4}),
    "constant": ({},),
    "constant_with_warmup": ({},),
    "inverse_sqrt": ({}, {"timescale": 5}),
    "warmup_stable_decay": (
        {"num_decay_steps": 2},
        {"num_decay_steps": 3, "min_lr_ratio": 0.2, "warmup_type": "cosine", "decay_type": "linear"},
        {
            "num_decay_steps": 3,
            "num_stable_steps": 1,
            "min_lr_ratio": 0.1,
            "warmup_type": "1-sqrt",
            "decay_type": "1-sqrt",
        },
        {"num_decay_steps": 2, "num_cycles": 1.0},
    ),
}
CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    (name, total, warmup, kwargs) for name, each in _EACH.items() for total, warmup in _RUNS for kwargs in each
]
