"""train_sampling_strategy curriculum, through the command line. Oracles: the gaps sorted by hand, a run of one piece, the plain orders.

Which pair a step takes is read off its log-probabilities at learning rate 0, which are the pair's own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

N = 24
GAPS = (np.random.default_rng(3).permutation(N) / 10 - 0.3).tolist()  # all different, some below 0
EASY_FIRST = np.argsort(GAPS)[::-1].tolist()
ORDERED = {"train_sampling_strategy": "curriculum", "drop_rows": ["invalid"]}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs, whose scores differ by GAPS."""
    rows = [
        {**row, "score_chosen": 5 + gap, "score_rejected": 5.0} for row, gap in zip(tiny.text_rows(N, seed=1), GAPS)
    ]
    return tiny.write_rows(tmp_path_factory.mktemp("scored") / "train.jsonl", rows)


@pytest.fixture(scope="module")
def still(model: Path, scored: Path) -> dict[str, Any]:
    """Options of a run that shows its order: a pair a step, and nothing is learned."""
    return {
        "model_name_or_path": model,
        "dataset_name": scored,
        "per_device_train_batch_size": 1,
        "learning_rate": 0,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
    }


def train(out: Path, options: dict[str, Any], **more: Any) -> Path:
    ended = tiny.jax_dpo("train", *tiny.flags({**options, "output_dir": out, **more}))
    assert ended.code in (0, 3), ended.err
    return out


def fails(out: Path, options: dict[str, Any], **more: Any) -> str:
    ended = tiny.jax_dpo("train", *tiny.flags({**options, "output_dir": out, **more}))
    assert ended.code == 2 and not (out / "run.jsonl").exists()
    return ended.err


def marks(out: Path) -> list[tuple[float, float]]:
    return [(r["logps/chosen"], r["logps/rejected"]) for r in tiny.records(out, "train")]


@pytest.fixture(scope="module")
def row_of(still: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The rows that a run has trained on, in order."""
    plain = marks(
        train(tmp_path_factory.mktemp("plain") / "out", still, train_sampling_strategy="sequential", num_train_epochs=1)
    )
    assert len(set(plain)) == N

    def rows(out: Path) -> list[int]:
        nearest = [np.argmin([abs(c - a) + abs(r - b) for a, b in plain]) for c, r in marks(out)]
        return [int(i) for i in nearest]

    return rows


def test_easy_pairs_come_first(still: dict[str, Any], row_of: Any, tmp_path: Path) -> None:
    """A bucket for each pair: the order of the gaps. The second epoch is TRL's random order for the seed."""
    random = row_of(train(tmp_path / "random", still, num_train_epochs=2))
    out = train(tmp_path / "out", still, **ORDERED, curriculum_buckets=N, num_train_epochs=2)
    found = row_of(out)
    assert found[:N] == EASY_FIRST
    assert found[N:] == random[N:] and sorted(random[N:]) == list(range(N))


def test_buckets_are_shuffled_inside_and_every_epoch_is_one_where_told(
    still: dict[str, Any], row_of: Any, tmp_path: Path
) -> None:
    options = {**ORDERED, "curriculum_buckets": 4, "curriculum_later_epochs": "curriculum"}
    out = train(tmp_path / "out", still, **options, num_train_epochs=2)
    found = row_of(out)
    for start in (0, N):
        for b in range(4):
            of_bucket = EASY_FIRST[6 * b : 6 * b + 6]
            taken = found[start + 6 * b : start + 6 * b + 6]
            assert sorted(taken) == sorted(of_bucket) and taken != of_bucket
    assert found[:N] != found[N:]

    start = tiny.records(out, "start")[0]["curriculum"]
    assert (start["by"], start["buckets"], start["later_epochs"]) == ("score", 4, "curriculum")
    assert [r["pairs"] for r in start["ranges"]] == [6] * 4
    ordered = np.sort(GAPS)[::-1].reshape(4, 6)
    np.testing.assert_allclose([r["widest"] for r in start["ranges"]], ordered[:, 0], atol=1e-6)
    np.testing.assert_allclose([r["narrowest"] for r in start["ranges"]], ordered[:, -1], atol=1e-6)
    page = (out / "report.html").read_text()
    assert "easy to hard by the scores of the data, gaps from 2 to -0.3 in 4 buckets of 6 pairs" in page
    assert "Buckets in the order of the run" in page


def test_rows_that_are_dropped_are_in_no_bucket(still: dict[str, Any], row_of: Any, tmp_path: Path) -> None:
    """Gaps below 0.15 are left out: the order of the others is the same."""
    out = train(tmp_path / "out", still, **{**ORDERED, "drop_rows": ["invalid", "small_gap"]}, curriculum_buckets=N)
    kept = [i for i in EASY_FIRST if GAPS[i] > 0.15]
    assert row_of(out) == kept and len(kept) < N
    assert tiny.records(out, "start")[0]["curriculum"]["narrowest"] == pytest.approx(GAPS[kept[-1]], abs=1e-6)


@pytest.mark.parametrize("by", ["score", "reference"])
def test_a_run_that_stops_in_the_middle_of_it_goes_on_to_the_bit(
    usual: dict[str, Any], scored: Path, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gaps that were computed are the run's own: with the cache gone, and even where they would come out otherwise."""
    options = {**usual, **ORDERED, "dataset_name": scored, "curriculum_by": by, "curriculum_buckets": 3}
    options |= {"max_steps": 5, "save_steps": 1, "curriculum_later_epochs": "curriculum"}
    whole = train(tmp_path / "whole", options)
    assert (whole / "curriculum").exists() == (by == "reference")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for step in (2, 3, 4, 5):
        shutil.rmtree(cut / f"checkpoint-{step}")
    (cut / "verdict.json").unlink()
    monkeypatch.setenv("JAX_DPO_CACHE", str(tmp_path / "empty"))
    if by == "reference":
        from jax_dpo.trainer import dpo

        monkeypatch.setattr(dpo, "precompute", lambda *_, **__: pytest.fail("the gaps were computed again"))
    train(cut, options, resume_from_checkpoint="auto")
    assert tiny.untimed(tiny.records(cut, "train")) == tiny.untimed(tiny.records(whole, "train"))
    for name, value in tiny.tensors(whole / "final").items():
        np.testing.assert_array_equal(tiny.tensors(cut / "final")[name], value)


def test_a_run_that_has_lost_its_gaps_says_so(usual: dict[str, Any], scored: Path, tmp_path: Path) -> None:
    options = {
        **usual,
        **ORDERED,
        "dataset_name": scored,
        "curriculum_by": "reference",
        "max_steps": 2,
        "save_steps": 1,
    }
    out = train(tmp_path / "out", options)
    shutil.rmtree(out / "curriculum")
    shutil.rmtree(out / "checkpoint-2")
    (out / "verdict.json").unlink()
    ended = tiny.jax_dpo("train", *tiny.flags({**options, "output_dir": out, "resume_from_checkpoint": "auto"}))
    assert ended.code in (0, 3) and (out / "curriculum").is_dir()
    said = tiny.records(out, "resume")[0]["warnings"]
    assert len(said) == 1 and "does not hold the gaps of this curriculum" in said[0]
    assert "does not hold the gaps" in " ".join(ended.out.split())
    assert "does not hold the gaps" in (out / "report.html").read_text()


@pytest.mark.slow
def test_the_references_own_log_ratio(still: dict[str, Any], row_of: Any, tmp_path: Path) -> None:
    """By the sums that precompute_ref_log_probs gives, wide gaps first; evaluate() before the training changes nothing."""
    from jax_dpo import DPOConfig, DPOTrainer

    given = {k: v for k, v in still.items() if k not in ("model_name_or_path", "dataset_name")}
    args = DPOConfig(str(tmp_path / "none"), **given)
    rows = DPOTrainer(
        str(still["model_name_or_path"]), args=args, train_dataset=str(still["dataset_name"])
    ).train_dataset
    gaps = [row["ref_chosen_logps"] - row["ref_rejected_logps"] for row in rows]
    options = {**ORDERED, "curriculum_by": "reference", "curriculum_buckets": N}
    found = row_of(train(tmp_path / "out", still, **options))
    assert found == np.argsort(gaps)[::-1].tolist() != EASY_FIRST
    start = tiny.records(tmp_path / "out", "start")[0]["curriculum"]
    assert start["by"] == "reference" and start["widest"] == pytest.approx(max(gaps), abs=1e-5)

    trainer = DPOTrainer(
        str(still["model_name_or_path"]),
        args=DPOConfig(str(tmp_path / "evaluated"), **{**given, "precompute_ref_log_probs": False, **options}),
        train_dataset=str(still["dataset_name"]),
        eval_dataset=tiny.text_rows(4, seed=2),
    )
    trainer.evaluate()
    trainer.train()
    assert row_of(tmp_path / "evaluated") == found
    # A new start takes the kept gaps of the old one away.
    old = tiny.snapshot(tmp_path / "out" / "curriculum")
    train(tmp_path / "out", still, overwrite_output_dir=True, max_steps=1)
    assert old and not (tmp_path / "out" / "curriculum").exists()


def test_missing_scores_are_named(still: dict[str, Any], scored: Path, data: Path, tmp_path: Path) -> None:
    error = fails(tmp_path / "a", still, **ORDERED, dataset_name=data / "train.jsonl")
    assert "curriculum-scores-missing" in error and "none of the 24 pairs has them" in " ".join(error.split())
    assert "score_chosen and score_rejected; chosen_score and rejected_score" in " ".join(error.split())

    rows = [{**row, "score_chosen": 1.0, "score_rejected": 0.5} for row in tiny.text_rows(6)]
    rows[2]["score_chosen"] = None
    rows[4]["score_rejected"] = "much"
    some = tiny.write_rows(tmp_path / "some.jsonl", rows)
    error = " ".join(fails(tmp_path / "b", still, **ORDERED, dataset_name=some).split())
    assert "2 of the 6 pairs have none: " in error and "some.jsonl, rows 3, 5. Put scores" in error


def test_a_stream_has_no_order_to_choose(still: dict[str, Any], tmp_path: Path) -> None:
    error = " ".join(fails(tmp_path / "a", still, **ORDERED, dataset_streaming=True, max_steps=2).split())
    assert "curriculum-stream" in error and "all of them must be known before the first step" in error


def test_what_is_odd_is_said(still: dict[str, Any], tmp_path: Path) -> None:
    out = train(tmp_path / "short", still, **ORDERED, max_steps=5)
    warnings = tiny.records(out, "start")[0]["plan"]["warnings"]
    assert any("the 19 pairs of the narrowest gap" in w and "are never trained on" in w for w in warnings)
    out = train(tmp_path / "unread", still, curriculum_buckets=3, max_steps=1)
    warnings = tiny.records(out, "start")[0]["plan"]["warnings"]
    assert any("curriculum_buckets can do nothing" in w for w in warnings)


def test_check_shows_the_gaps(model: Path, scored: Path, data: Path) -> None:
    ended = tiny.jax_dpo("check", scored, "--model", model)
    assert "score gap, chosen - rejected: least -0.3  10% -0.07  25% 0.275  50% 0.85" in ended.out
    assert "most 2" in ended.out
    assert "score gap" not in tiny.jax_dpo("check", data / "train.jsonl", "--model", model).out
