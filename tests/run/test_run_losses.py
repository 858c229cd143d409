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

    def __init__(
        self,
        folder: Path,
        model: Path,
        reference: Path,
        rows: list[dict[str, Any]],
        held_out: Any = None,
        **options: Any,
    ) -> None:
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
            eval_dataset=data if held_out is None else Dataset.from_list(held_out),
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


@pytest.mark.parametrize("loss_type", ["sigmoid", pytest.param("sigmoid_norm", marks=pytest.mark.slow)])
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


RANDOM = np.random.default_rng(11)
SAID = {
    "beta": RANDOM.uniform(0.5, 5.0, 8),
    "margin": RANDOM.normal(0.3, 0.5, 8),
    "label": RANDOM.uniform(0.4, 1.0, 8),
    "weight": RANDOM.uniform(0.0, 2.0, 8),
}
TOLD = [{**row, **{name: float(x[i]) for name, x in SAID.items()}} for i, row in enumerate(ROWS)]


def test_columns_of_pairs(tmp_path: Path, model: Path, reference: Path) -> None:
    found = Outcome(tmp_path / "run", model, reference, TOLD, pair_columns=list(SAID))
    ratio = ratios(model, reference, found.trainer.train_dataset)
    reward = SAID["beta"][:, None] * ratio
    z = reward @ [1, -1] - SAID["margin"]
    p = SAID["label"]
    check(found, (SAID["weight"] * (p * np.logaddexp(0, -z) + (1 - p) * np.logaddexp(0, z))).mean())
    for got, prefix in ((found.step, ""), (found.evaluation, "eval_")):
        assert got[prefix + "rewards/chosen"] == pytest.approx(reward[:, 0].mean(), abs=2e-5)
        assert got[prefix + "rewards/margins"] == pytest.approx((reward @ [1, -1]).mean(), abs=2e-5)
        assert got[prefix + "rewards/accuracies"] == pytest.approx((reward @ [1, -1] > 0).mean())
    assert found.step["beta"] == pytest.approx(SAID["beta"].mean(), rel=1e-6)
    assert not any("pair_columns" in text for text in found.start["plan"]["warnings"])


@pytest.mark.slow
def test_a_weight_counts_in_the_sft_term_too(tmp_path: Path, model: Path, reference: Path) -> None:
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "pair_columns": ["weight"]}
    found = Outcome(tmp_path / "run", model, reference, TOLD, **options)
    pairs = found.trainer.train_dataset
    margin = BETA * ratios(model, reference, pairs) @ [1, -1]
    from jax_dpo import load_model

    rows = np.array([[*p["prompt_ids"], *p["chosen_ids"]] for p in pairs])
    z = np.asarray(load_model(model)(rows), np.float64)[:, tiny.PROMPT - 1 : -1]
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logp, rows[:, tiny.PROMPT :, None], -1).sum((1, 2))
    # Micro-batches of 4 pairs, each with 4 * ANSWER chosen tokens: all means have equal sizes.
    check(found, (SAID["weight"] * (np.logaddexp(0, -margin) - 0.5 * chosen / tiny.ANSWER)).mean())


def test_columns_that_nobody_names_change_nothing_and_are_said(tmp_path: Path, model: Path, reference: Path) -> None:
    found = Outcome(tmp_path / "run", model, reference, TOLD)
    check(found, np.logaddexp(0, -BETA * ratios(model, reference, found.trainer.train_dataset) @ [1, -1]).mean())
    assert any("pair_columns: [beta, margin, label, weight] reads them" in w for w in found.start["plan"]["warnings"])


def test_held_out_pairs_need_no_columns(tmp_path: Path, model: Path, reference: Path) -> None:
    found = Outcome(tmp_path / "run", model, reference, TOLD, held_out=ROWS, pair_columns=["weight"])
    each = np.logaddexp(0, -BETA * ratios(model, reference, found.trainer.train_dataset) @ [1, -1])
    assert found.step["loss"] == pytest.approx((SAID["weight"] * each).mean(), rel=2e-5)
    assert found.evaluation["eval_loss"] == pytest.approx(each.mean(), rel=2e-5)
    assert any("has no column weight" in text for text in found.start["plan"]["warnings"])


def test_columns_on_the_command_line(tmp_path: Path, model: Path) -> None:
    bad = [{**row, "label": 1.5 if i == 2 else row["label"]} for i, row in enumerate(TOLD)]
    data = tiny.write_rows(tmp_path / "pairs.jsonl", bad)
    told = tiny.jax_dpo("check", data, "--model_name_or_path", model, "--pair_columns", "label", "weight")
    assert told.code == 0
    assert "row 3: invalid: label is a number (1.5), a number from 0 to 1 was expected" in told.out
    kept = np.delete(SAID["weight"], 2)
    assert f"column weight: {kept.min():.6g} to {kept.max():.6g}, mean {kept.mean():.6g}" in told.out
    plain = tiny.write_rows(tmp_path / "plain.jsonl", ROWS)
    lost = tiny.jax_dpo("check", plain, "--model_name_or_path", model, "--pair_columns", "label")
    assert lost.code == 2 and "has no column 'label', which pair_columns names" in lost.err


ALPHA, MOMENTUM, FOLLOWED = 0.8, 0.6, 0.5
FOLLOWING = {
    "beta": FOLLOWED,
    "beta_dpo_alpha": ALPHA,
    "beta_dpo_momentum": MOMENTUM,
    "max_steps": 4,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
}


def train_entries(folder: Path) -> list[dict[str, Any]]:
    return tiny.records(folder, "train")


def test_beta_follows_the_batch(tmp_path: Path, model: Path, reference: Path) -> None:
    """beta-DPO: each step's beta by its own mean margin and the moving average of those before, over two micro-batches."""
    Outcome(tmp_path / "run", model, reference, ROWS, **FOLLOWING, micro_batch_tokens=64)
    steps = train_entries(tmp_path / "run")
    average = 0.0
    betas = [step["beta"] for step in steps]
    for step, beta in zip(steps, betas):
        margin = step["rewards/margins"] * FOLLOWED / beta
        assert beta == pytest.approx(FOLLOWED * (1 + ALPHA * (margin - average)), rel=1e-5)
        average = MOMENTUM * average + (1 - MOMENTUM) * margin
    assert max(betas) - min(betas) > 0.02
    at_once = tmp_path / "at_once"
    found = Outcome(at_once, model, reference, ROWS, **FOLLOWING)
    np.testing.assert_allclose([s["beta"] for s in train_entries(at_once)], betas, rtol=2e-5)
    assert found.evaluation["eval_rewards/margins"] == pytest.approx(  # before training, at the configured beta
        FOLLOWED * (ratios(model, reference, found.trainer.train_dataset) @ [1, -1]).mean(), abs=2e-5
    )


@pytest.mark.slow
def test_the_average_that_beta_follows_is_in_the_checkpoint(tmp_path: Path, model: Path, reference: Path) -> None:
    data = tiny.write_rows(tmp_path / "pairs.jsonl", ROWS)
    usual = {
        "model_name_or_path": model,
        "ref_model_name_or_path": reference,
        "dataset_name": data,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "report_to": "none",
        **FOLLOWING,
    }
    for folder, more in (("whole", {}), ("halves", {"save_steps": 2})):
        assert tiny.jax_dpo("train", *tiny.flags({**usual, "output_dir": tmp_path / folder, **more})).code in (0, 3)
    again = {**usual, "output_dir": tmp_path / "again", "resume_from_checkpoint": tmp_path / "halves" / "checkpoint-2"}
    assert tiny.jax_dpo("train", *tiny.flags(again)).code in (0, 3)
    want = [(s["step"], s["beta"], s["loss"]) for s in train_entries(tmp_path / "whole")]
    found = [(s["step"], s["beta"], s["loss"]) for s in train_entries(tmp_path / "again")]
    assert found[-2:] == want[-2:]
    other = {**again, "output_dir": tmp_path / "other", "beta_dpo_alpha": 0.0}
    refused = tiny.jax_dpo("train", *tiny.flags(other))
    assert refused.code == 2 and "beta_threshold" in refused.err and "beta_dpo_alpha" in refused.err
