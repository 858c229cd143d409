"""Losses through the public surface, against another model as reference. Oracle: the formula on log-ratios in float64, from the logits
of the two models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

BETA = 2.0  # these two models differ by a few tenths of a nat
ROWS = tiny.text_rows(8, seed=5)


class Outcome:
    """What a run of one step logged, and an evaluation of the same pairs before it."""

    def __init__(self, folder: Path, model: Path, reference: Path, rows: list[dict[str, Any]], **options: Any) -> None:
        from datasets import Dataset

        from jax_dpo import DPOConfig, DPOTrainer

        given = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 1e-6,
            "beta": BETA,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "gradient_checkpointing": False,
        }
        data = Dataset.from_list(rows)
        self.trainer = DPOTrainer(
            str(model),
            str(reference),
            DPOConfig(str(folder), **{**given, **options}),
            train_dataset=data,
            eval_dataset=data,
        )
        self.evaluation = self.trainer.evaluate()
        self.trainer.train()
        self.step = next(r for r in self.trainer.state.log_history if "grad_norm" in r)
        self.start = next(r for r in tiny.records(folder) if r["kind"] == "start")


def ratios(model: Path, reference: Path, pairs: Any) -> np.ndarray:
    """Log-ratios [N, 2] of chosen and rejected, float64."""
    from jax_dpo import load_model

    found = []
    for side in ("chosen_ids", "rejected_ids"):
        rows = np.array([[*p["prompt_ids"], *p[side]] for p in pairs])
        sums = []
        for directory in (model, reference):
            z = np.asarray(load_model(directory)(rows), np.float64)[:, tiny.PROMPT - 1 : -1]
            z -= z.max(-1, keepdims=True)
            logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
            sums.append(np.take_along_axis(logp, rows[:, tiny.PROMPT :, None], -1).sum((1, 2)))
        found.append(sums[0] - sums[1])
    return np.stack(found, 1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("reference") / "llama", seed=9)


def check(found: Outcome, loss: float) -> None:
    assert found.step["loss"] == pytest.approx(loss, rel=2e-5)
    assert found.evaluation["eval_loss"] == pytest.approx(loss, rel=2e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_conservative_dpo(tmp_path: Path, model: Path, reference: Path, loss_type: str) -> None:
    options = {"loss_type": loss_type, "label_smoothing": 0.2, "sigmoid_label_smoothing": True}
    found = Outcome(tmp_path / "run", model, reference, ROWS, **options)
    a, b = ratios(model, reference, found.trainer.train_dataset).T
    assert np.abs(a - b).max() > 0.3
    z = BETA * (a - b) / (tiny.ANSWER if loss_type == "sigmoid_norm" else 1)
    check(found, (0.8 * np.logaddexp(0, -z) + 0.2 * np.logaddexp(0, z)).mean())


def test_smoothing_that_is_not_read_is_said(tmp_path: Path, model: Path, reference: Path) -> None:
    found = Outcome(tmp_path / "run", model, reference, ROWS, label_smoothing=0.2)
    a, b = ratios(model, reference, found.trainer.train_dataset).T
    check(found, np.logaddexp(0, -BETA * (a - b)).mean())
    assert any("sigmoid_label_smoothing: true" in text for text in found.start["plan"]["warnings"])
