"""Where a disease begins: records from formulas just above and just below each threshold; what stands in the report and the terminal.

Runs that really have the diseases are in tests/run/test_run_diagnosis.py.
"""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import Any

import pytest
import report_runs as runs
from rich.console import Console

from jax_dpo.report.diagnosis import NAMES, diagnose, from_record
from jax_dpo.report.html import write_report
from jax_dpo.report.terminal import Terminal

Record = dict[str, Any]


def start(steps: int = 100, **options: Any) -> Record:
    quiet = {
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "kl_actions": [],
        "target_kl": 0.1,
        "learning_rate": 1e-6,
        "beta": 0.1,
    }
    data = {"train": {"name": "t", "rows": 100, "kept": 100, "dropped": {}, "cut": 0}, "eval": {"eval": {"kept": 96}}}
    return runs.start(steps, options={**quiet, **options}, data=data)


def course(losses: list[float] | None = None, evals: list[Record] | None = None, **options: Any) -> list[Record]:
    """A run of 100 steps that learns: every tenth logged, every twentieth evaluated; `losses` and `evals` in place of its own."""
    train = losses or [math.log(2) * 0.985**i for i in range(10)]
    held_out = evals or [{} for _ in range(6)]
    made = [start(**options)]
    made += [
        {"kind": "train", "step": 10 * i + 1, "loss": y, "rewards/accuracies": 0.7, "grad_norm": 5.0, "learning_rate": 1e-6,
         "rewards/margins": 0.02 * i}
        for i, y in enumerate(train)
    ]  # fmt: skip
    for i, more in enumerate(held_out):
        healthy = {"eval_loss": 0.69 - 0.01 * i, "eval_rewards/margins": 0.03 * i, "eval_kl_divergence": 0.01 * i}
        made.append({"kind": "eval", "step": 20 * i, **healthy, "eval_logps/chosen": -90.0, **more})
    return made


def names(records: list[Record]) -> list[str]:
    return [f.name for f in diagnose(records)]


def test_a_healthy_course_has_none() -> None:
    assert names(course()) == []
    assert names([]) == [] and names([start()]) == []


@pytest.mark.parametrize("name", ["healthy", "failing", "running", "not_finite", "resumed", "several_sets"])
def test_any_log_can_be_diagnosed(name: str) -> None:
    for k in range(0, len(getattr(runs, name)()), 7):
        assert set(names(getattr(runs, name)()[:k])) <= set(NAMES)


@pytest.mark.parametrize(
    ("kls", "options", "expected"),
    [
        ([0, 0.02, 0.04, 0.06, 0.08, 0.1001], {}, ["kl-over-bound"]),
        ([0, 0.02, 0.04, 0.06, 0.08, 0.1], {}, ["kl-near-bound"]),
        ([0, 0.02, 0.04, 0.06, 0.08, 0.089], {}, []),
        ([0, 0.095, 0.097, 0.094, 0.096, 0.095], {}, []),  # near, but it does not rise
        ([0, 0.02, 0.04, 0.06, 0.08, 0.095], {"kl_trust_region": True}, []),
        ([0, 0.02, 0.04, 0.06, 0.08, 0.11], {"target_kl": None}, []),
    ],
)
def test_kl(kls: list[float], options: Record, expected: list[str]) -> None:
    assert names(course(evals=[{"eval_kl_divergence": kl} for kl in kls], **options)) == expected


def test_a_run_on_its_way_over_the_bound_is_told_in_time() -> None:
    """Oracle: 0.02 every 20 steps, 0.05 are left: 50 steps, and 100 - 40 are to come."""
    records = course(losses=[0.69, 0.68, 0.67, 0.66], evals=[{"eval_kl_divergence": k} for k in (0.01, 0.03, 0.05)])
    (found,) = diagnose(records)
    assert found.name == "kl-near-bound" and "in about 50 steps" in found.text
    slower = course(losses=[0.69, 0.68, 0.67, 0.66], evals=[{"eval_kl_divergence": k} for k in (0.01, 0.02, 0.03)])
    assert names(slower) == []


def test_one_pair_may_have_a_high_loss_and_a_steady_loss_does_not_leap() -> None:
    noise = random.Random(0)
    noisy = [0.69, *(0.5 + 0.25 * noise.random() for _ in range(60))]
    assert names(course(losses=noisy)) == []
    noisy[40] = 1.2
    assert names(course(losses=noisy)) == [], "0.6 above the others: less than the first loss"
    noisy[40] = 2.2
    assert names(course(losses=noisy)) == ["loss-spikes"]
    often = [2.0 if i % 5 == 4 else y for i, y in enumerate(noisy)]
    assert "leaps at 13 of 61" in diagnose(course(losses=often))[0].text


def test_steps_that_were_left_out_are_named() -> None:
    skipped = {"kind": "nonfinite", "step": 30, "what": "gradient", "rows": "row 3"}
    counted = {"kind": "nonfinite", "step": 40, "what": "evaluation", "rows": "row 3"}
    assert names([*course(), counted]) == []
    assert "1 step not finite, left out" in diagnose([*course(), skipped])[0].text


@pytest.mark.parametrize(
    ("gain", "options", "done", "expected"),
    [
        (0.019, {}, 6, ["flat-margins"]),
        (0.021, {}, 6, []),
        (0.0, {"sync_ref_model": True}, 6, []),  # against a reference that moved
        (0.0, {}, 2, []),  # at its beginning every margin is flat
    ],
)
def test_flat_margins(gain: float, options: Record, done: int, expected: list[str]) -> None:
    margins = [{"eval_rewards/margins": gain * i / 5} for i in range(done)]
    assert names(course(losses=[0.69] * 2 * done, evals=margins, **options)) == expected


@pytest.mark.parametrize(
    ("held_out", "train_end", "expected"),
    [
        ([0.69, 0.60, 0.62, 0.64, 0.66, 0.68], 0.4, ["over-fitting"]),
        ([0.69, 0.60, 0.62, 0.64, 0.66, 0.68], 0.69, []),  # training learns nothing either
        ([0.69, 0.60, 0.605, 0.61, 0.6, 0.61], 0.4, []),  # less than 3 % of the start
        ([0.69, 0.66, 0.64, 0.62, 0.60, 0.68], 0.6, []),  # one evaluation is no trend
        ([0.69, 0.70, 0.68, 0.70, 0.69, 0.69], 0.4, ["over-fitting"]),  # learned, and nothing of it holds elsewhere
    ],
)
def test_over_fitting(held_out: list[float], train_end: float, expected: list[str]) -> None:
    losses = [0.69 + (train_end - 0.69) * i / 9 for i in range(10)]
    assert names(course(losses=losses, evals=[{"eval_loss": y} for y in held_out])) == expected


@pytest.mark.parametrize(
    ("last", "expected"),
    [(-91.7, []), (-90.9, []), (-91.9, ["chosen-falls"]), (-88.0, [])],
)
def test_chosen_falls_by_a_share_of_its_log_probability(last: float, expected: list[str]) -> None:
    """2 % of 90 nats are 1.8; both must hold, a fall of 0.9 is neither."""
    assert names(course(evals=[{"eval_logps/chosen": -90 + (last + 90) * i / 5} for i in range(6)])) == expected


@pytest.mark.parametrize(
    ("slope", "r", "chosen", "longer", "expected"),
    [
        (0.005, 0.6, 40.0, 0.7, ["length-exploitation"]),  # 0.005 * 20 of 0.15
        (0.003, 0.6, 40.0, 0.7, []),  # 0.06 of 0.15
        (0.005, 0.2, 40.0, 0.7, []),  # not clear of its error: 2.0 standard errors
        (0.005, 0.6, 20.0, 0.5, []),  # as long as the rejected ones
        (-0.005, -0.6, 40.0, 0.97, []),  # longer by rule, and seen not to count
        (None, None, 40.0, 0.97, ["length-exploitation"]),
        (None, None, 29.0, 0.97, []),  # longer by less than half
    ],
)
def test_length(slope: float | None, r: float | None, chosen: float, longer: float, expected: list[str]) -> None:
    facts = {"eval_length/chosen": chosen, "eval_length/rejected": 20.0, "eval_length/chosen_longer": longer}
    if slope is not None:
        facts |= {"eval_length/margin_slope": slope, "eval_length/margin_correlation": r}
    assert names(course(evals=[{}] * 5 + [facts])) == expected


@pytest.mark.parametrize(
    ("dropped", "cut", "expected"), [(9, 9, []), (10, 0, ["dropped-data"]), (0, 10, ["dropped-data"])]
)
def test_dropped(dropped: int, cut: int, expected: list[str]) -> None:
    first, *rest = course()
    data = {"train": {"name": "t", "rows": 100, "kept": 100 - dropped, "dropped": {"too_long": dropped}, "cut": cut}}
    assert names([{**first, "data": data}, *rest]) == expected


def test_clipped() -> None:
    """The norm is 5 throughout."""
    assert names(course(max_grad_norm=1.0)) == [], "as in every run with the usual options"
    assert names(course(max_grad_norm=5.0 / 29)) == []
    assert names(course(max_grad_norm=5.0 / 31)) == ["always-clipped"]
    assert names(course(max_grad_norm=5.0, optim="sgd")) == [], "at the bound nothing is cut"
    assert names(course(max_grad_norm=4.9, optim="sgd")) == ["always-clipped"]
    assert names(course(max_grad_norm=0.0)) == [], "0 does not clip"


def test_it_is_told_in_the_report_and_in_the_terminal(tmp_path: Path) -> None:
    records = course(evals=[{"eval_kl_divergence": 0.03 * i} for i in range(6)], max_grad_norm=0.1)
    found = diagnose(records)
    assert [f.name for f in found] == ["kl-over-bound", "always-clipped"]
    verdict = runs.verdict(100, passed=False) | {"findings": [f.to_dict() for f in found]}
    page = write_report(runs.write(tmp_path, [*records, verdict])).read_text()
    assert page.index("Gates</h2>") < page.index("Diagnosis</h2>") < page.index("Curves</h2>")
    assert '<span class="pill bad">serious</span>' in page and '<span class="pill quiet">note</span>' in page
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, width=200), live=False)
    for record in (records[0], verdict):
        terminal.write(record)
    said = shown.getvalue()
    assert "Diagnosis" in said and found[0].text[:60] in said and "kl-over-bound" in said
    assert [from_record(entry) for entry in verdict["findings"]] == found
