"""`jax-dpo tune` through the command line. Oracle: `jax-dpo train`, run at what was proposed and beside it."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny

from jax_dpo.train.rate_search import Trial
from jax_dpo.trainer.tune import Tuner

STEPS, TRIAL, TARGET = 60, 12, 0.1


class Tuned(NamedTuple):
    ended: tiny.Ended
    report: dict[str, Any]
    out: Path
    options: dict[str, Any]
    compiled: int
    """programs of the training step"""


@pytest.fixture(scope="module")
def options(usual: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """More pairs than the trials take, a third of them with the answers exchanged, so that the margin does not grow for ever."""
    folder, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)

    def mixed(count: int, seed: int) -> list[dict[str, Any]]:
        rows = tiny.text_rows(count, seed)
        for row in rows:
            if random.random() < 0.3:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        return rows

    return {
        **usual,
        "dataset_name": tiny.write_rows(folder / "train.jsonl", mixed(480, 5)),
        "eval_dataset": tiny.write_rows(folder / "held-out.jsonl", mixed(48, 6)),
        "max_steps": STEPS,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "learning_rate": 1e-6,
        "target_kl": TARGET,
    }


def tune(options: dict[str, Any], out: Path, *more: str) -> Tuned:
    seen: list[Tuner] = []
    original = Tuner.search
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuner, "search", lambda self: seen.append(self) or original(self))
        ended = tiny.jax_dpo("tune", *tiny.flags({**options, "output_dir": out}), "--trial_steps", TRIAL, *more)
    assert ended.code == 0, ended.err
    report = json.loads((out / "tune.json").read_text())
    return Tuned(ended, report, out, options, seen[0].run.engine.step._cache_size())  # type: ignore[attr-defined]


def trained_kl(options: dict[str, Any], out: Path, rate: float, beta: float) -> float:
    """Held-out KL at the end of a run."""
    at_end = {"eval_strategy": "steps", "eval_steps": options["max_steps"], "save_strategy": "no", "logging_steps": 30}
    given = {**options, **at_end, "output_dir": out, "learning_rate": rate, "beta": beta}
    ended = tiny.jax_dpo("train", *tiny.flags(given))
    assert ended.code in (0, 3), ended.err
    return float(tiny.records(out, "eval")[-1]["eval_kl_divergence"])


@pytest.fixture(scope="module", params=["full", pytest.param("lora", marks=pytest.mark.slow)])
def tuned(options: dict[str, Any], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    lora = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-5} if request.param == "lora" else {}
    return tune({**options, **lora}, tmp_path_factory.mktemp("tuned") / "out")


def test_a_run_at_the_proposed_rate_ends_within_the_bound_and_one_at_thrice_the_rate_does_not(
    tuned: Tuned, tmp_path: Path
) -> None:
    proposal = tuned.report["proposal"]
    kls = [
        trained_kl(tuned.options, tmp_path / f"{x}", x * proposal["learning_rate"], proposal["beta"]) for x in (1, 3)
    ]
    assert kls[0] <= TARGET
    assert kls[1] > TARGET  # so the proposed rate is within a factor of 3 of the one that reaches the bound
    assert kls[0] == pytest.approx(proposal["kl"], rel=0.4)


def test_what_is_left_is_the_report_alone(tuned: Tuned, model: Path) -> None:
    assert list(tiny.snapshot(tuned.out)) == ["tune.json"]
    assert not [p for p in model.parent.rglob("*") if "tune" in p.name]


def test_all_trials_run_one_program(tuned: Tuned) -> None:
    assert len(tuned.report["trials"]) > 5
    assert tuned.compiled == 1


def test_the_report_and_the_screen_say_the_same(tuned: Tuned) -> None:
    report, shown = tuned.report, tuned.ended.out
    assert report["planned_steps"] == STEPS
    assert report["trial_steps"] == TRIAL
    assert report["held_out_pairs"] == 48
    assert report["kl_at_start"] == 0
    assert [g["step"] for g in report["trials"][-1]["kl_growth"]] == [3, 6, 12]
    for trial in report["trials"]:
        assert f"{trial['logratio_margin']:+.2f}" in shown
    betas = [t["beta"] for t in report["trials"]]
    assert betas[-2:] == [0.05, 0.2]
    assert set(betas[:-2]) == {0.1}
    assert report["command"] in shown
    words = shlex.split(report["command"])
    assert words[:2] == ["jax-dpo", "train"]
    assert words.count("--learning_rate") == 1
    assert float(words[words.index("--learning_rate") + 1]) == report["proposal"]["learning_rate"]
    assert not any("trial" in word for word in words)


def test_the_printed_command_runs(options: dict[str, Any], tmp_path: Path) -> None:
    """With a configuration of its own, in which learning_rate and beta stand too."""
    config = tmp_path / "run.yaml"
    given = {**options, "output_dir": tmp_path / "out", "beta": 0.2, "max_steps": 8}
    config.write_text(json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in given.items()}))
    argv = ["--trial_rates", "1e-4", "5e-4", str(config), "--trial-betas=0.2", "--save_strategy", "no", "--beta", "0.1"]
    ended = tiny.jax_dpo("tune", *argv, "--trial_steps", "8", "--tune_report", tmp_path / "r" / "found.json")
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "r" / "found.json").read_text())
    assert not (tmp_path / "out").exists()
    rate = f"{report['proposal']['learning_rate']:.2g}"
    assert report["command"] == f"jax-dpo train {config} --save_strategy no --learning_rate {rate} --beta 0.1"
    again = tiny.jax_dpo(*shlex.split(report["command"])[1:])
    assert again.code in (0, 3), again.err


@pytest.fixture(scope="module")
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Trials of a run that is no longer than they are."""
    rates = ["--trial_rates", "2e-4", "6e-4", "--trial_betas", "0.1"]
    return tune({**options, "max_steps": 8, "kl_coef": 0.5}, tmp_path_factory.mktemp("whole") / "out", *rates)


def test_a_trial_is_the_run_itself_where_that_is_no_longer(whole: Tuned, tmp_path: Path) -> None:
    assert whole.report["trial_steps"] == 8
    trial = whole.report["trials"][1]
    assert trial["kl"] == pytest.approx(
        trained_kl(whole.options, tmp_path / "run", trial["learning_rate"], 0.1), rel=1e-5
    )
    assert "each of the 2 trials is the whole planned run" in whole.ended.out


def test_controls_are_off_in_trials_and_that_is_said(whole: Tuned, tmp_path: Path) -> None:
    acting = {"kl_actions": ["halve_lr"], "eval_strategy": "steps", "eval_steps": 2, "kl_trust_region": True}
    rates = ["--trial_rates", "2e-4", "6e-4", "--trial_betas", "0.1"]
    found = tune({**whole.options, **acting}, tmp_path / "out", *rates)
    assert [t["kl"] for t in found.report["trials"]] == [t["kl"] for t in whole.report["trials"]]
    assert "without kl_actions and kl_trust_region" in found.ended.out


def test_a_curriculum_comes_in_random_order_in_trials(whole: Tuned, tmp_path: Path) -> None:
    """Whose first steps would be pairs with a wide gap."""
    rates = ["--trial_rates", "2e-4", "6e-4", "--trial_betas", "0.1"]
    ordered = {"train_sampling_strategy": "curriculum", "curriculum_by": "reference"}
    found = tune({**whole.options, **ordered}, tmp_path / "out", *rates)
    assert [t["kl"] for t in found.report["trials"]] == [t["kl"] for t in whole.report["trials"]]
    assert "the trials took the pairs in random order" in found.ended.out


def test_a_precomputed_reference_is_there_in_trials(options: dict[str, Any], tmp_path: Path) -> None:
    short = {**options, "max_steps": 8, "precompute_ref_log_probs": True}
    found = tune(short, tmp_path / "a", "--trial_rates", "2e-4", "6e-4", "--trial_betas", "0.1")
    assert "precompute_ref_log_probs false" in found.ended.out
    assert found.report["trials"][0]["kl"] > 0


def test_without_held_out_pairs_training_rows_are_held_out_and_that_is_said(
    options: dict[str, Any], tmp_path: Path
) -> None:
    epochs = {**options, "eval_dataset": None, "max_steps": -1, "num_train_epochs": 1}
    del epochs["eval_dataset"]
    found = tune(
        epochs, tmp_path / "out", "--trial_pairs", "40", "--trial_rates", "2e-4", "6e-4", "--trial_betas", "0.1"
    )
    assert found.report["held_out_pairs"] == 40
    assert found.report["planned_steps"] == 480 / 8  # of the run, which trains on all rows
    assert "40 training rows were held out of the trials; the run itself trains on them" in found.ended.out


@pytest.mark.parametrize("which", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_with_nothing_written(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    original = Tuner.trial

    def trial(self: Tuner, rate: float, beta: float) -> Trial:
        os.kill(os.getpid(), getattr(signal, which))
        return original(self, rate, beta)

    monkeypatch.setattr(Tuner, "trial", trial)
    ended = tiny.jax_dpo("tune", *tiny.flags({**options, "output_dir": tmp_path / "out"}), "--trial_steps", TRIAL)
    assert ended.code == 75
    assert f"stopped by {which}: the trials are given up; nothing was written or kept" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "more", "name", "words"),
    [
        ({"sync_ref_model": True}, [], "tune-moving-reference", "Tune with sync_ref_model false"),
        ({}, ["--trial_steps", "2"], "invalid-option", "trial_steps: found 2, expected a number of at least 4"),
        ({}, ["--trial_rates", "-1"], "invalid-option", "trial_rates: expected numbers above 0"),
        ({}, ["--trial_betas", "0"], "invalid-option", "trial_betas: expected numbers above 0"),
        ({}, ["--kl_share", "2"], "invalid-option", "kl_share: found 2"),
        ({}, ["--trial_step", "5"], "unknown-option", "did you mean --trial_steps?"),
        ({}, ["--learning_rat", "5"], "unknown-option", "did you mean learning_rate?"),
        ({}, ["--tune_report", "."], "tune-report-unusable", "is a directory"),
        ({}, ["--trial_rates", "1e-12", "2e-12"], "tune-no-guide", "KL by learning rate: 1e-12: "),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    options: dict[str, Any], tmp_path: Path, given: dict[str, Any], more: list[str], name: str, words: str
) -> None:
    ended = tiny.jax_dpo("tune", *tiny.flags({**options, **given, "output_dir": tmp_path / "out"}), *more)
    assert ended.code == 2
    assert f"[{name}]" in ended.err
    assert words in ended.err
    assert not (tmp_path / "out").exists()


def test_too_few_rows_to_hold_any_out(options: dict[str, Any], tmp_path: Path) -> None:
    few = {**options, "dataset_name": tiny.write_rows(tmp_path / "few.jsonl", tiny.text_rows(7))}
    del few["eval_dataset"]
    ended = tiny.jax_dpo("tune", *tiny.flags({**few, "output_dir": tmp_path / "out"}))
    assert ended.code == 2
    assert "are 7 rows" in ended.err
    assert "Name held-out pairs with --eval_dataset" in ended.err


def test_a_reference_that_is_far_away_leaves_no_room(options: dict[str, Any], tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "other", seed=3)
    given = {**options, "ref_model_name_or_path": other, "output_dir": tmp_path / "out"}
    ended = tiny.jax_dpo("tune", *tiny.flags(given))
    assert ended.code == 2
    assert "[tune-starts-over]" in ended.err
    assert "before anything is trained" in ended.err
