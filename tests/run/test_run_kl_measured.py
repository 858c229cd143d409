"""What a run says of the KL of single answers. Oracle: the formula in float64 numpy, from plain logits of policy and reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

LENGTHS = (1, 3, 2, 6, 4, 5, 12, 2)  # words of an answer; with its end one token more


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs whose answers are of many lengths."""
    random = np.random.default_rng(seed)
    words = lambda n: " " + " ".join(str(w) for w in random.choice(tiny.GOOD + tiny.BAD, n))  # noqa: E731
    prompts = tiny.text_rows(count, seed)
    n = lambda i: LENGTHS[i % len(LENGTHS)]  # noqa: E731
    return [{**row, "chosen": words(n(i)), "rejected": words(n(5 * i + 3))} for i, row in enumerate(prompts)]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def token_kls(policy: Any, reference: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[np.ndarray]:
    """KL(policy || reference) where each token of an answer is predicted, over the whole vocabulary."""
    ids = np.zeros((len(prompts), 32), np.int32)
    for row, prompt, answer in zip(ids, prompts, answers):
        row[: len(prompt) + len(answer)] = prompt + answer
    pi, ref = (log_softmax(np.asarray(m(ids), np.float64)) for m in (policy, reference))
    kl = (np.exp(pi) * (pi - ref)).sum(-1)
    return [x[len(p) - 1 : len(p) + len(a) - 1] for x, p, a in zip(kl, prompts, answers)]


def assert_like(record: dict[str, Any], prefix: str, answers: list[list[np.ndarray]]) -> None:
    """The record's KLs are those of `answers`: token KLs of chosen and of rejected ones."""
    every = [a for side in answers for a in side]
    sums, means = (np.array([f(a) for a in every]) for f in (np.sum, np.mean))
    want = {"kl_divergence": np.concatenate(every).mean(), "kl_sequence": sums.mean()}
    for name, side in zip(("chosen", "rejected"), answers):
        want[f"kl_divergence/{name}"] = np.concatenate(side).mean()
        want[f"kl_sequence/{name}"] = np.mean([a.sum() for a in side])
    for q, share in (("p50", 0.5), ("p90", 0.9), ("max", 1.0)):
        want |= {f"kl_divergence/{q}": np.quantile(means, share), f"kl_sequence/{q}": np.quantile(sums, share)}
    for name, value in want.items():
        assert record[prefix + name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    profile = record["kl_profile"]
    assert profile["positions"] == [[1, 1], [2, 4], [5, 8], [9, 16]]
    for name, side in zip(("chosen", "rejected"), answers):
        for i, (first, last) in enumerate(profile["positions"]):
            here = np.concatenate([a[first - 1 : last] for a in side])
            assert profile[name]["tokens_at"][i] == len(here) > 0
            assert profile[name]["kl_at"][i] == pytest.approx(here.mean(), rel=2e-4, abs=1e-6)
        assert profile[name]["responses"] == len(side)
        assert profile[name]["kl_sequence"]["p90"] == pytest.approx(np.quantile([a.sum() for a in side], 0.9), rel=2e-4)


def answers_of(pairs: list[dict[str, Any]], policy: Any, reference: Any) -> list[list[np.ndarray]]:
    prompts = [row["prompt_ids"] for row in pairs]
    return [
        token_kls(policy, reference, prompts, [row[f"{side}_ids"] for row in pairs]) for side in ("chosen", "rejected")
    ]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.mark.slow
def test_a_log_line_is_about_all_answers_of_its_steps(
    model: Path, other: Path, usual: dict[str, Any], tmp_path: Path
) -> None:
    """A policy that stays (the rate is 0) against another model. Three steps of eight pairs, in several micro-batches each, are the whole
    data."""
    from jax_dpo import DPOConfig, DPOTrainer, load_model

    chosen = {**usual, "max_steps": 3, "logging_steps": 3, "learning_rate": 0.0, "save_strategy": "no"}
    chosen["micro_batch_tokens"] = 64
    chosen.pop("model_name_or_path"), chosen.pop("dataset_name")
    held_out = {"eval_strategy": "steps", "eval_steps": 3, "eval_weighting": "batches"}
    trainer = DPOTrainer(
        str(model),
        str(other),
        args=DPOConfig(str(tmp_path / "out"), **chosen, **held_out),
        train_dataset=rows(24, 1),
        eval_dataset={"near": rows(9, 2)},
    )
    trainer.train()
    assert min(trainer.engine.batch_at(trainer.plan.after(k)).micro_batches for k in range(3)) > 1
    policy, reference = load_model(model), load_model(other)
    (train,), (evaluation,) = (tiny.records(tmp_path / "out", kind) for kind in ("train", "eval"))
    assert_like(train, "", answers_of(list(trainer.train_dataset), policy, reference))
    held = list(trainer.eval_sets["near"].pairs.rows())
    assert_like(evaluation, "eval_near_", answers_of(held, policy, reference))
    found = trainer.evaluate()
    assert found["eval_near_kl_sequence/p90"] == pytest.approx(evaluation["eval_near_kl_sequence/p90"], rel=1e-6)
    assert all(isinstance(value, int | float) for value in found.values())
    for entry in trainer.state.log_history:
        assert all(isinstance(value, int | float) for value in entry.values())


def test_without_the_reference_in_training_only_evaluations_have_it(
    evaluated: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    options = {**evaluated, "precompute_ref_log_probs": True, "max_steps": 2}
    assert tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", tmp_path / "out").code == 0
    for record in tiny.records(tmp_path / "out", "train"):
        assert "kl_estimate" in record and not [k for k in record if k.startswith(("kl_d", "kl_s", "kl_p"))]
    last = tiny.records(tmp_path / "out", "eval")[-1]
    assert last["eval_kl_sequence/max"] >= last["eval_kl_sequence/p90"] >= last["eval_kl_sequence/p50"] > 0
    assert json.dumps(last["kl_profile"], allow_nan=False)
    assert last["eval_kl_sequence"] == pytest.approx(tiny.ANSWER * last["eval_kl_divergence"], rel=1e-6)
