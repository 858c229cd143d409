"""Whole runs of TRL 1.16 replayed through DPOTrainer. Oracle: tests/golden/training, every number that TRL logged in float32 on a
CPU, and how far another torch run and a float64 run are from it; the tolerances are ten times that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

TRAINING = tiny.GOLDEN / "training"
CASES = ("sigmoid", "ipo", "robust", "sft_mix", "kl_token", "kl_sequence", "linear", "truncated", "qwen3")
CASES += ("sync_ref", "precompute", "gemma2")
ADAPTERS = {"lora": tiny.GOLDEN / "adapters" / "adapter_initial"}
ADAPTERS["lora_continued"] = TRAINING / "lora_continued" / "adapter_initial"
BY_BATCHES = ("sigmoid", "truncated")  # evaluated with TRL's means of batch means

# Relative, except rewards (absolute); see `margins`.
FLOOR = {"loss": 5e-5, "eval_loss": 5e-5, "grad_norm": 1e-4, "rewards": 5e-5, "logps": 1e-5, "kl": 2e-4, "norms": 1e-5}
MEASURED = {"loss": "loss", "eval_loss": "eval_loss", "grad_norm": "grad_norm", "rewards": "max_abs_rewards_margins"}
MEASURED |= {"logps": "logps_chosen", "kl": "kl_divergence"}


def recorded(case: str) -> dict[str, Any]:
    return json.loads((TRAINING / case / "run.json").read_text(encoding="utf-8"))


def margins(run: dict[str, Any]) -> dict[str, float]:
    """What is allowed: ten times the distance of two other runs of the same thing, and no less than FLOOR."""
    others = [run[name]["worst_relative_difference"] for name in ("another_torch_run", "float64")]
    measured = {name: [10 * (other[MEASURED[name]] or 0.0) for other in others if name in MEASURED] for name in FLOOR}
    return {name: max([FLOOR[name], *measured[name]]) for name in FLOOR}


def trainer_of(run: dict[str, Any], out: Path, adapter: Path | None, start_is_reference: bool, by_batches: bool) -> Any:
    from jax_dpo import DPOConfig, DPOTrainer, load_model

    options = {k: v for k, v in (run["options"] | run.get("kl_penalty", {})).items() if k != "optim"}
    # Rows that TRL dropped would stand among the others; the order that TRL's sampler gave is fed as it is.
    rows = [tiny.PAIRS["train"][i] for i in run["order"]]
    start = TRAINING.parent / run["model"]
    return DPOTrainer(
        model=load_model(start, adapter=adapter) if adapter else str(start),
        ref_model=str(start) if start_is_reference else None,
        args=DPOConfig(
            str(out),
            gradient_checkpointing=False,
            save_strategy="no",
            train_sampling_strategy="sequential",
            drop_rows=[],
            eval_weighting="batches" if by_batches else "pairs",
            **options,
        ),
        train_dataset=rows,
        eval_dataset=tiny.PAIRS["eval"],
        processing_class=str(tiny.TOKENIZER),
    )


def weighted_by_tokens(entry: dict[str, Any], name: str) -> float:
    """A token metric of TRL's, which is a mean of the micro-batches' means, as a mean over all tokens of the step."""
    sides = {"logits/chosen": (1, 0), "logits/rejected": (0, 1), "entropy": (1, 1), "mean_token_accuracy": (1, 0)}[name]
    tokens = [sides[0] * m["tokens_chosen"] + sides[1] * m["tokens_rejected"] for m in entry["kl_micro_batches"]]
    return float(np.average(entry["micro_batches"][name], weights=tokens))


def compare(got: dict[str, Any], entry: dict[str, Any], allowed: dict[str, float], by_batches: bool) -> None:
    """One line of the log against TRL's; `by_batches`: the evaluation was weighed as TRL weighs it."""
    prefix = "eval_" if entry["kind"] == "eval" else ""
    where = f"{entry['kind']} {entry['step']} "

    def near(name: str, value: float, **tolerance: float) -> None:
        assert got[name] == pytest.approx(value, **tolerance), where + name

    near(prefix + "loss", entry[prefix + "loss"], rel=allowed[prefix + "loss"], abs=0)
    near(prefix + "num_tokens", entry[prefix + "num_tokens"], abs=0)
    if "kl_estimate" in got:  # the reference is not there while training
        assert not prefix and "kl_divergence" not in got
    else:
        near(prefix + "kl_divergence", entry["kl_divergence"], rel=allowed["kl"], abs=allowed["kl"] * 1e-3)
    for name in ("chosen", "rejected", "margins"):
        near(f"{prefix}rewards/{name}", entry[f"{prefix}rewards/{name}"], abs=allowed["rewards"], rel=1e-5)
    if abs(entry[f"{prefix}rewards/margins"]) > allowed["rewards"]:
        near(f"{prefix}rewards/accuracies", entry[f"{prefix}rewards/accuracies"], abs=1e-6)
    for side in ("chosen", "rejected"):
        near(f"{prefix}logps/{side}", entry[f"{prefix}logps/{side}"], rel=allowed["logps"])
    for name in ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"):
        want = entry[prefix + name] if prefix and by_batches else weighted_by_tokens(entry, name)
        near(prefix + name, want, rel=2e-5, abs=2e-5)
    if not prefix:
        near("learning_rate", entry["learning_rate"], rel=1e-12, abs=0)
        near("grad_norm", entry["grad_norm"], rel=allowed["grad_norm"])


def replay(case: str, out: Path) -> dict[str, Any]:
    """Trains as the recorded run did, compares every line, and returns the recorded run."""
    run = recorded(case)
    allowed = margins(run)
    trainer = trainer_of(run, out, ADAPTERS.get(case), case == "lora", case in BY_BATCHES)
    trainer.train()
    log = trainer.state.log_history
    found = {("train" if "loss" in e else "eval", e["step"]): e for e in log if "loss" in e or "eval_loss" in e}
    assert len(run["log"]) == len(found) == 15
    for entry in run["log"]:
        compare(found[entry["kind"], entry["step"]], entry, allowed, case in BY_BATCHES)
    # What evaluate() says afterwards is what the last evaluation said.
    again = trainer.evaluate()
    assert again["eval_loss"] == found["eval", 12]["eval_loss"]
    return run


# Each compiles a step of its own; the losses are held to TRL on single batches as well (tests/train).
SLOW = ("gemma2", "sft_mix", "robust", "kl_sequence", "ipo", "linear", "truncated", "qwen3", "sync_ref", "precompute")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])
def test_full_training_follows_trl(case: str, tmp_path: Path) -> None:
    run = replay(case, tmp_path / "out")
    assert ("kl_estimate" in tiny.records(tmp_path / "out", "train")[0]) == (case == "precompute")
    weights = tiny.tensors(tmp_path / "out" / "final")
    assert set(weights) == set(run["final_norms"]) - ({"lm_head.weight"} if case == "qwen3" else set())
    for name, tensor in weights.items():
        norm = np.linalg.norm(tensor.astype(np.float64))
        assert norm == pytest.approx(run["final_norms"][name], rel=FLOOR["norms"]), name


@pytest.mark.parametrize("case", ["lora", pytest.param("lora_continued", marks=pytest.mark.slow)])
def test_adapters_follow_trl(case: str, tmp_path: Path) -> None:
    """`lora` is held against the base, `lora_continued` against the adapter as it came in."""
    run = replay(case, tmp_path / "out")
    adapter = tiny.tensors(tmp_path / "out" / "final", "adapter_model.safetensors")
    norms = {name: norm for name, norm in run["final_norms"].items() if "lora_" in name}
    assert {n.replace(".default.", ".") for n in norms} == set(adapter)
    for name, norm in norms.items():
        ours = np.linalg.norm(adapter[name.replace(".default.", ".")].astype(np.float64))
        assert ours == pytest.approx(norm, rel=FLOOR["norms"]), name
    if case == "lora":  # PEFT's own file of the same end: the numbers, one by one
        theirs = load_file(tiny.GOLDEN / "adapters" / "adapter_final" / "adapter_model.safetensors")
        assert max(np.abs(theirs[n] - adapter[n]).max() for n in theirs) < 1e-5
