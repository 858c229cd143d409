"""The real optimizers (torch, transformers, bitsandbytes) against ours over ten steps, and transformers' schedules.

`python tests/parity/test_optimizers.py` writes their numbers to tests/golden/optim, which the tests of every day compare with. It
needs torch and transformers, and bitsandbytes (0.50.2) for Lion: transformers' `lion_32bit` is bitsandbytes' class.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import optimizer_cases as cases
import schedule_cases

pytestmark = pytest.mark.parity


def theirs(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights after the steps, made by the class and the options that transformers' Trainer would take."""
    torch = pytest.importorskip("torch")
    from transformers import Trainer, TrainingArguments

    options = {k: v for k, v in case.items() if k != "weight_decay"}
    args = TrainingArguments(output_dir="unused", learning_rate=cases.RATES[1], use_cpu=True, **options)
    if case["optim"].startswith("lion"):
        pytest.importorskip("bitsandbytes")
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(args)
    tensors: dict[str, list[Any]] = {}
    for path, x in cases.start().items():
        layers = list(x) if path.startswith("model.layers.") else [x]
        tensors[path] = [torch.nn.Parameter(torch.tensor(layer)) for layer in layers]
    decay = case.get("weight_decay", 0.0)
    groups = [
        {"params": [p for path, ps in tensors.items() for p in ps if path not in cases.KEPT], "weight_decay": decay},
        {"params": [p for path, ps in tensors.items() for p in ps if path in cases.KEPT], "weight_decay": 0.0},
    ]
    optimizer = kind(groups, **keywords)
    for step, rate in enumerate(cases.RATES):
        for path, grad in cases.gradients(step).items():
            layers = list(grad) if path.startswith("model.layers.") else [grad]
            for p, g in zip(tensors[path], layers, strict=True):
                p.grad = torch.tensor(g)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return {
        path: np.stack([p.detach().numpy() for p in ps]) if path.startswith("model.layers.") else ps[0].detach().numpy()
        for path, ps in tensors.items()
    }


@pytest.mark.parametrize("name", cases.CASES)
def test_ten_steps_end_at_the_same_weights(name: str) -> None:
    from test_optimizer import ours

    want, found = theirs(cases.CASES[name]), ours(cases.CASES[name])
    for path, x in want.items():
        np.testing.assert_allclose(found[path], x, rtol=0, atol=2e-6, err_msg=path)


def factors(name: str, total: int, warmup: int, kwargs: dict[str, Any], rate: float) -> list[float]:
    """Factors of the rate in steps 0 to total + 2, by transformers."""
    torch = pytest.importorskip("torch")
    from transformers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=dict(kwargs))
    return [float(schedule.lr_lambdas[0](k)) for k in range(total + 3)]


@pytest.mark.parametrize("row", schedule_cases.CASES, ids=lambda row: row[0])
def test_schedules_give_the_same_factors(row: tuple[str, int, int, dict[str, Any]]) -> None:
    from test_optimizer import our_factors

    np.testing.assert_allclose(our_factors(*row), factors(*row, schedule_cases.RATE), rtol=0, atol=1e-15)


if __name__ == "__main__":
    weights = {name: {p: x.tolist() for p, x in theirs(case).items()} for name, case in cases.CASES.items()}
    cases.GOLDEN.write_text(json.dumps(weights, separators=(",", ":")) + "\n", encoding="utf-8")
    table = [[*row, factors(*row, schedule_cases.RATE)] for row in schedule_cases.CASES]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in table)
    schedule_cases.GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
