"""Runs that would leave the bound far behind, held by the trust region. Oracles: the log's own KLs, and the same run without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

WILD = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 12,
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 4,
    "target_kl": 0.1,
}
HELD = {"kl_trust_region": True, "kl_probe_pairs": 4}


@pytest.fixture(scope="module")
def held(evaluated: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tiny.Ended]:
    out = tmp_path_factory.mktemp("trust") / "out"
    return out, tiny.jax_dpo("train", *tiny.flags({**evaluated, **WILD, **HELD}), "--output_dir", out)


def test_no_step_and_no_checkpoint_is_over_the_bound(held: tuple[Path, tiny.Ended], evaluated: dict[str, Any]) -> None:
    out, ended = held
    assert ended.code in (0, 3), ended.err
    verdict = json.loads((out / "verdict.json").read_text())
    assert next(g for g in verdict["gates"] if g["name"] == "kl")["status"] == "passed"
    steps = tiny.records(out, "train")
    assert [r["step"] for r in steps] == list(range(1, 13))
    for r in steps:
        assert 0 < r["trust_region/kl"] <= r["trust_region/limit"] * (1 + 1e-6) <= 0.0901
        assert 0 <= r["trust_region/scale"] <= 1
    assert min(r["trust_region/scale"] for r in steps) < 0.5
    assert all(r["trust_region/scale"] > 0 for r in steps), "the run goes on at the bound"
    kls = [r["eval_kl_divergence"] for r in tiny.records(out, "eval")]
    assert len(kls) == 4 and max(kls) <= 0.1
    assert kls[-1] > 0.04, "near the bound"


def test_without_it_the_run_leaves_the_bound(
    held: tuple[Path, tiny.Ended], evaluated: dict[str, Any], tmp_path: Path
) -> None:
    ended = tiny.jax_dpo("train", *tiny.flags({**evaluated, **WILD}), "--output_dir", tmp_path / "out")
    assert ended.code == 3
    assert tiny.records(tmp_path / "out", "eval")[-1]["eval_kl_divergence"] > 1.0


def test_a_run_that_stays_within_takes_every_update_whole(evaluated: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the same run without a trust region, whose weights differ by no more than another order of operations makes."""
    calm = {**evaluated, "save_steps": 4}
    runs = {}
    for name, more in (("plain", {}), ("held", HELD)):
        tiny.jax_dpo("train", *tiny.flags({**calm, **more}), "--output_dir", tmp_path / name)
        runs[name] = tiny.records(tmp_path / name, "train")
    for plain, held in zip(runs["plain"], runs["held"], strict=True):
        assert held["trust_region/scale"] == 1
        assert held["loss"] == pytest.approx(plain["loss"], abs=1e-6)
        assert held["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_the_probe_sets_kl_is_that_of_these_pairs(
    held: tuple[Path, tiny.Ended], evaluated: dict[str, Any], tmp_path: Path
) -> None:
    """Oracle: with as many probe pairs as there are held-out pairs, an evaluation right after the step sees the same KL."""
    options = {**evaluated, **WILD, **HELD, "kl_probe_pairs": 8, "max_steps": 4, "eval_steps": 1}
    tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", tmp_path / "out")
    probe = [r["trust_region/kl"] for r in tiny.records(tmp_path / "out", "train")]
    every = [r["eval_kl_divergence"] for r in tiny.records(tmp_path / "out", "eval")[1:]]
    np.testing.assert_allclose(probe, every, rtol=1e-5)


def test_it_goes_on_to_the_bit(held: tuple[Path, tiny.Ended], evaluated: dict[str, Any], tmp_path: Path) -> None:
    out, _ = held
    options = {**evaluated, **WILD, **HELD, "resume_from_checkpoint": out / "checkpoint-8"}
    tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", tmp_path / "again")
    numbers = lambda folder: tiny.untimed(tiny.records(folder, "train"))[-4:]  # noqa: E731
    assert numbers(tmp_path / "again") == numbers(out)


@pytest.mark.parametrize(
    "more",
    [
        {"use_peft": True, "lora_dropout": 0.0},
        pytest.param({"sync_ref_model": True, "ref_model_sync_steps": 3}, marks=pytest.mark.slow),
    ],
)
def test_adapters_and_moving_references_are_held_too(
    evaluated: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    options = {**evaluated, **WILD, **HELD, **more, "max_steps": 6, "eval_steps": 2, "learning_rate": 5e-2}
    tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", tmp_path / "out")
    steps = tiny.records(tmp_path / "out", "train")
    assert all(r["trust_region/kl"] <= r["trust_region/limit"] * (1 + 1e-6) for r in steps)
    assert min(r["trust_region/scale"] for r in steps) < 0.5
    assert max(r["eval_kl_divergence"] for r in tiny.records(tmp_path / "out", "eval")) <= 0.1


def test_it_needs_held_out_pairs(usual: dict[str, Any], tmp_path: Path) -> None:
    ended = tiny.jax_dpo("train", *tiny.flags({**usual, **HELD}), "--output_dir", tmp_path / "out")
    assert ended.code == 2
    assert "kl_trust_region" in ended.err and "held-out pairs" in ended.err
    assert not (tmp_path / "out").exists()
