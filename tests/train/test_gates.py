"""Scores, rankings and verdicts: tables written by hand from the rules."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_dpo.errors import UserError
from jax_dpo.train.gates import Facts, Gate, Verdict, judge, write_verdict
from jax_dpo.train.ranking import Ranking, margin, score

INF, NAN = math.inf, math.nan
FACTS = Facts(done=20, planned=20, learning_rate=1e-6, beta=0.1)


def entry(
    step: int, loss: float = 0.6, gap: float | None = 0.1, kl: float | None = 0.05, **more: Any
) -> dict[str, Any]:
    made: dict[str, Any] = {"step": step, "eval_loss": loss, **more}
    if gap is not None:
        made["eval_rewards/margins"] = gap
    if kl is not None:
        made["eval_kl_divergence"] = kl
    return made


START = entry(0, loss=0.6931, gap=0.0, kl=0.0)
GOOD = [START, entry(10, 0.65, 0.05, 0.02), entry(20, 0.6, 0.1, 0.05)]


def verdict(entries: list[dict[str, Any]], **more: Any) -> Verdict:
    return judge(entries, **{"completed": True, "target_kl": 0.1, "facts": FACTS, **more})


def gate(found: Verdict, name: str) -> Gate:
    return next(gate for gate in found.gates if gate.name == name)


# Scores


@pytest.mark.parametrize(
    ("gap", "kl", "target", "expected"),
    [
        (0.3, 0.05, 0.1, 0.3),
        (0.3, 0.1, 0.1, 0.3),
        (0.3, 0.1001, 0.1, -INF),
        (-0.3, 0.05, 0.1, -0.3),
        (0.3, NAN, 0.1, -INF),
        (NAN, 0.05, 0.1, -INF),
        (0.3, None, 0.1, 0.3),
        (0.3, 5.0, None, 0.3),
        (None, 0.05, 0.1, -INF),
    ],
)
def test_score(gap: float | None, kl: float | None, target: float | None, expected: float) -> None:
    assert score(gap, kl, target) == expected


def test_a_raised_beta_raises_no_score() -> None:
    """The same model evaluated at beta 0.1 and at 0.3: its margin is three times as large, its score the same."""
    ranking = Ranking(target_kl=0.1, beta=0.1)
    plain, raised = entry(5, gap=0.2, beta=0.1), entry(5, gap=0.6, beta=0.3)
    assert ranking.score(plain) == 0.2
    assert ranking.score(entry(5, gap=0.2031544954054727, beta=0.1)) == 0.2031544954054727, (
        "beta is what it was: to the bit"
    )
    assert ranking.score(raised) == pytest.approx(0.2)
    assert margin(raised) == 0.6, "without a configured beta the number stands as it is"


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({10: 0.1, 20: 0.3, 30: 0.2}, 20),
        ({10: 0.3, 20: 0.3}, 10),  # a tie keeps the older one
        ({20: 0.3, 10: 0.3}, 10),
        ({10: -INF, 20: -0.5}, 20),
        ({10: NAN, 20: 0.1}, 20),
        ({10: -INF, 20: -INF}, None),
        ({}, None),
    ],
)
def test_best(scores: dict[int, float], expected: int | None) -> None:
    assert Ranking(target_kl=0.1).best(scores) == expected


@pytest.mark.parametrize(
    ("metric", "greater_is_better", "best"),
    [
        ("loss", None, 2),
        ("eval_loss", None, 2),
        ("rewards/accuracies", None, 1),
        ("rewards/accuracies", False, 2),
        ("loss", True, 1),
    ],
)
def test_metric_for_best_model(metric: str, greater_is_better: bool | None, best: int) -> None:
    entries = {
        1: entry(1, loss=0.7, kl=9.0, **{"eval_rewards/accuracies": 0.9}),
        2: entry(2, loss=0.6, **{"eval_rewards/accuracies": 0.8}),
    }
    ranking = Ranking(0.1, metric, greater_is_better)
    assert ranking.best({step: ranking.score(found) for step, found in entries.items()}) == best


def test_an_unknown_metric_is_named_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"no rewards/margin\. Did you mean rewards/margins\? It has: kl_divergence"
    ) as error:
        Ranking(0.1, "rewards/margin").score(entry(1))
    assert error.value.name == "metric-for-best-model-unknown"


# Gates


def test_a_good_run() -> None:
    found = verdict(GOOD, best={"step": 20, "path": "checkpoint-20", "score": 0.1}, final_step=20)
    assert [(g.name, g.status) for g in found.gates] == [
        ("completed", "passed"),
        ("kl", "passed"),
        ("margin", "passed"),
        ("improving", "passed"),
    ]
    assert found.headline == "trained; all gates passed; best checkpoint-20; exit 0"
    assert (found.passed, found.exit_code) == (True, 0)
    assert (gate(found, "kl").value, gate(found, "kl").bound) == (0.05, 0.1)
    assert (gate(found, "improving").value, gate(found, "improving").bound) == (0.6, 0.6931)


@pytest.mark.parametrize(
    ("last", "failed", "words", "advice"),
    [
        (
            entry(20, kl=0.131),
            "kl",
            "0.131 > 0.1",
            "Lower learning_rate (now 1e-06; try 5e-07), or raise beta (now 0.1",
        ),
        (entry(20, kl=0.10001), "kl", "0.10001 > 0.1", "Lower learning_rate"),
        (entry(20, kl=NAN), "kl", "KL is nan: training diverged", "max_grad_norm"),
        (entry(20, gap=-0.02), "margin", "-0.02 is not above 0", "quality of the data"),
        (entry(20, gap=0.0), "margin", "0.0 is not above 0", "try 2e-06) or a lower beta (now 0.1; try 0.05)"),
        (entry(20, gap=NAN), "margin", "margin is nan: training diverged", "max_grad_norm"),
        (entry(20, loss=0.7), "improving", "0.7 is not below 0.6931 of the start", "warmup_steps"),
        (entry(20, loss=0.6931), "improving", "is not below 0.6931 of the start", "warmup_steps"),
        (entry(20, loss=NAN), "improving", "evaluation loss nan is not below", "Lower learning_rate"),
    ],
)
def test_a_gate_that_fails(last: dict[str, Any], failed: str, words: str, advice: str) -> None:
    found = verdict([*GOOD[:2], last])
    assert [g.name for g in found.gates if g.status == "failed"] == [failed]
    assert words in gate(found, failed).reason
    assert advice in gate(found, failed).advice
    assert (found.passed, found.exit_code) == (False, 3)
    assert words in found.headline and found.headline.endswith("; exit 3")


def test_a_loss_that_stands_still_with_its_margin_wants_a_higher_rate() -> None:
    still = verdict([START, entry(20, loss=0.6932, gap=0.001)])
    assert "a higher learning_rate (now 1e-06; try 2e-06)" in gate(still, "improving").advice
    assert "Lower learning_rate" in gate(verdict([START, entry(20, loss=0.8, gap=0.3)]), "improving").advice


def test_headlines() -> None:
    assert verdict([START, entry(20, kl=0.131)]).headline == "trained; gate KL failed: 0.131 > 0.1; exit 3"
    both = verdict([START, entry(20, kl=0.131, gap=-0.02)]).headline
    assert both == "trained; gates KL and margin failed: KL 0.131 > 0.1; margin -0.02 is not above 0; exit 3"
    assert verdict([]).headline == "trained; no gate failed; not judged: KL, margin, improving (no evaluation); exit 0"
    stopped = verdict(GOOD, completed=False, facts=Facts(done=12, planned=20)).headline
    assert stopped == "not completed; gate completed failed: stopped at step 12 of 20; exit 3"


def test_margin_is_held_against_the_first_evaluation() -> None:
    trained = [entry(0, gap=0.5), entry(20, gap=0.4)]
    assert "0.4 is not above 0.5 of the first evaluation (step 0)" in gate(verdict(trained), "margin").reason
    assert gate(verdict([entry(0, gap=-0.5), entry(20, gap=-0.4)]), "margin").status == "failed"
    assert gate(verdict([entry(0, gap=0.3), entry(20, gap=0.4)]), "margin").status == "passed"
    # At a beta of 0.2 the margin of 0.8 is one of 0.4 at the configured 0.1.
    assert gate(verdict([entry(0, gap=0.5, beta=0.1), entry(20, gap=0.8, beta=0.2)]), "margin").value == pytest.approx(
        0.4
    )


def test_numpy_numbers_are_numbers() -> None:
    last = {"step": 20, "eval_loss": np.float32(0.6), "eval_rewards/margins": np.float32(0.1)}
    assert verdict([START, {**last, "eval_kl_divergence": np.float32(0.2)}]).exit_code == 3


def test_the_bound_itself_is_within() -> None:
    assert gate(verdict([START, entry(20, kl=0.1)]), "kl").status == "passed"


def test_a_run_of_no_steps_is_judged_by_its_start() -> None:
    assert gate(verdict([START], final_step=0), "kl").status == "passed"


def test_the_last_evaluation_counts_not_the_worst() -> None:
    assert verdict([START, entry(10, 0.9, -1.0, 5.0), GOOD[-1]]).passed


# Trends


def course(losses: list[float], margins: list[float] | None = None) -> Verdict:
    """The verdict on evaluations every 10 steps from the start on."""
    margins = margins or [0.05 * i for i in range(len(losses))]
    found = [entry(10 * i, loss, gap) for i, (loss, gap) in enumerate(zip(losses, margins, strict=True))]
    return verdict(found, final_step=10 * len(losses))


def test_the_trend_of_a_gate_is_the_least_squares_line() -> None:
    """Oracle: numpy's polynomial fit and its covariance."""
    losses = [0.6931, 0.66, 0.64, 0.645, 0.61, 0.58]
    (slope, _), cov = np.polyfit(np.arange(6) * 10.0, losses, 1, cov=True)
    found = gate(course(losses), "improving")
    assert found.slope == pytest.approx(slope, rel=1e-9)
    assert found.slope_error == pytest.approx(np.sqrt(cov[0, 0]), rel=1e-9)
    two = gate(verdict([START, GOOD[-1]]), "improving")
    assert (two.slope, two.slope_error) == (pytest.approx((0.6 - 0.6931) / 20), None)


@pytest.mark.parametrize(
    ("losses", "passed", "words"),
    [
        # The last one dips below the start by luck: everything before it rose.
        ([0.6931, 0.70, 0.71, 0.72, 0.73, 0.74, 0.75, 0.692], False, "the line through 8 evaluations rises"),
        # It rose at a high rate and came back: the line falls, and the last one counts.
        ([0.6931, 0.80, 0.78, 0.74, 0.70, 0.66], True, ""),
        # A run that learned, with noise: its last evaluation is within the noise.
        ([0.6931, 0.60, 0.62, 0.55, 0.66, 0.58, 0.70], True, "is within the noise of those before it"),
        # The same last value after a quiet descent leaves the line: a collapse.
        ([0.6931, 0.67, 0.65, 0.63, 0.61, 0.59, 0.70], False, "0.7 is not below 0.6931 of the start"),
        # Too few to tell noise from anything.
        ([0.6931, 0.58, 0.62, 0.70], False, "0.7 is not below 0.6931 of the start"),
        # Noise around the start's own value is no improvement.
        ([0.6931, 0.70, 0.68, 0.70, 0.69, 0.71, 0.68, 0.70], False, "0.7 is not below"),
        # Over-fitting that has not yet come to the start's value: below it is below it.
        ([0.6931, 0.55, 0.50, 0.55, 0.62, 0.68], True, ""),
    ],
)
def test_one_evaluation_does_not_decide_against_the_others(losses: list[float], passed: bool, words: str) -> None:
    found = gate(course(losses), "improving")
    assert (found.status == "passed") == passed, found
    assert words in found.reason
    assert found.value == losses[-1], "what was measured stands as it is"


def test_the_margin_has_the_same_rule() -> None:
    losses = [0.69 - 0.01 * i for i in range(7)]
    noisy = gate(course(losses, [0.0, 0.09, 0.04, 0.12, 0.03, 0.1, -0.01]), "margin")
    assert noisy.status == "passed" and "-0.01, is within the noise" in noisy.reason
    lucky = gate(course(losses, [0.0, -0.02, -0.03, -0.05, -0.06, -0.08, 0.001]), "margin")
    assert lucky.status == "failed" and "falls" in lucky.reason and "below 0" in lucky.reason
    assert "quality of the data" in lucky.advice
    collapsed = gate(course(losses, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, -0.01]), "margin")
    assert collapsed.reason == "-0.01 is not above 0"


def test_an_evaluation_that_is_not_finite_is_no_noise() -> None:
    assert gate(course([0.6931, 0.6, 0.62, 0.55, 0.6, 0.58, NAN]), "improving").status == "failed"
    assert gate(course([0.6931, 0.6, NAN, 0.55, 0.6, 0.58, 0.57]), "improving").status == "passed"


@pytest.mark.parametrize(
    ("entries", "target", "status"),
    [
        ([], 0.1, {"kl": "not judged", "margin": "not judged", "improving": "not judged"}),
        ([{"step": 5, "loss": 0.4}], 0.1, {"kl": "not judged", "margin": "not judged", "improving": "not judged"}),
        # One evaluation after training: its sign can be judged, no trend.
        ([entry(20)], 0.1, {"kl": "passed", "margin": "passed", "improving": "not judged"}),
        ([entry(20, gap=-1.0)], 0.1, {"kl": "passed", "margin": "failed", "improving": "not judged"}),
        # Only the evaluation before step 1: it says nothing of the trained model.
        ([START], 0.1, {"kl": "not judged", "margin": "not judged", "improving": "not judged"}),
        # No exact KL where the reference was precomputed; none asked for.
        ([entry(0, 0.7, 0.0, None), entry(20, 0.6, 0.1, None)], 0.1, {"kl": "not judged", "margin": "passed"}),
        (GOOD, None, {"kl": "not judged", "margin": "passed", "improving": "passed"}),
        # Without an evaluation before step 1 the first one stands in for the start.
        ([entry(10, 0.5), entry(20, 0.6, 0.2)], 0.1, {"margin": "passed", "improving": "failed"}),
    ],
)
def test_what_is_not_judged_fails_nothing(entries: list[Any], target: float | None, status: dict[str, str]) -> None:
    found = verdict(entries, target_kl=target)
    for name, expected in status.items():
        assert gate(found, name).status == expected, name
    for one in found.gates:
        assert bool(one.reason) == (one.status != "passed")
    assert found.passed == ("failed" not in status.values())


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (Facts(20, 20, warmup_steps=100), "Warm-up (100 steps) outlasts the run (20 steps)"),
        (Facts(20, 20, all_rates_zero=True), "Every step had a learning rate of 0"),
    ],
)
def test_a_cause_in_the_schedule_is_named(facts: Facts, words: str) -> None:
    found = verdict([START, {**START, "step": 20}], facts=facts)
    assert words in gate(found, "margin").advice
    assert words in gate(found, "improving").advice
    assert (
        "Set warmup_steps to 2"
        in gate(verdict([START, {**START, "step": 20}], facts=Facts(20, 20, 100)), "margin").advice
    )


def test_steps_that_were_not_finite_are_the_advice_for_a_run_that_broke_off() -> None:
    found = gate(verdict(GOOD, completed=False, facts=Facts(12, 20, skipped=3)), "completed")
    assert found.reason == "stopped at step 12 of 20; 3 steps had a gradient that was not finite"
    assert "max_grad_norm" in found.advice
    passed = gate(verdict(GOOD, facts=Facts(20, 20, skipped=3)), "completed")
    assert (passed.status, passed.reason) == ("passed", "3 of 20 steps were skipped: not finite")
    assert "resume_from_checkpoint" in gate(verdict(GOOD, completed=False), "completed").advice


@pytest.mark.parametrize("with_key", [True, False])
def test_of_several_sets_the_first_judges_or_the_one_named(with_key: bool) -> None:
    def of(name: str, step: int, loss: float) -> dict[str, Any]:
        made = {
            f"eval_{name}_loss": loss,
            f"eval_{name}_rewards/margins": step / 10,
            f"eval_{name}_kl_divergence": 0.01,
        }
        return {"step": step, **made, **({"set": name} if with_key else {})}

    entries = [of("a", 0, 0.7), of("b", 0, 0.7), of("a", 20, 0.6), of("b", 20, 0.8)]
    assert (verdict(entries).set, verdict(entries).passed) == ("a", True)
    found = verdict(entries, set_name="b")
    assert (found.set, gate(found, "improving").status) == ("b", "failed")
    assert Ranking(0.1, "loss", set="b").score(entries[3]) == 0.8
    assert Ranking(0.1, set="a").score(entries[2]) == 2.0
    assert verdict(GOOD).set is None


def test_a_verdict_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a directory"):
        write_verdict(tmp_path / "file" / "verdict.json", verdict(GOOD))


def test_verdict_json(tmp_path: Path) -> None:
    best = {"step": 20, "path": "checkpoint-20", "score": np.float32(0.5)}
    found = verdict([START, entry(20, kl=INF)], best=best, final_step=20)
    write_verdict(tmp_path / "verdict.json", found)
    assert os.listdir(tmp_path) == ["verdict.json"]

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    read = json.loads((tmp_path / "verdict.json").read_text(), parse_constant=refuse)
    assert read == found.to_dict()
    assert set(read) == {"passed", "gates", "best", "final", "set", "headline", "exit_code", "findings"}
    assert read["best"] == {"step": 20, "path": "checkpoint-20", "score": 0.5}
    assert read["final"] == {"step": 20}
    assert read["passed"] is False and read["exit_code"] == 3
    kl = read["gates"][1]
    assert set(kl) == {"name", "status", "value", "bound", "reason", "advice", "slope", "slope_error"}
    assert (kl["status"], kl["value"]) == ("failed", None)


def test_a_number_that_was_not_finite_fails_its_gate() -> None:
    """run.jsonl has it as null, with its name beside it; that is no missing number."""
    names = ["eval_loss", "eval_rewards/margins", "eval_kl_divergence"]
    healthy = {"step": 0, "eval_loss": 0.69, "eval_rewards/margins": 0.0, "eval_kl_divergence": 0.0}
    lost = {"step": 9, **dict.fromkeys(names), "non_finite": names}
    verdict = judge([healthy, lost], completed=True, target_kl=0.1, final_step=9)
    assert [gate.status for gate in verdict.gates] == ["passed", "failed", "failed", "failed"]
    assert verdict.exit_code == 3
