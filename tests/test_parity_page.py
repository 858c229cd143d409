"""docs/parity.md is what `make parity` wrote for the cases that there are; the comparison itself can fail; the replay of TRL's recorded
run. The numbers of the page are made anew by tests/parity. Oracles: the table of cases, differences put in by hand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "run"))

import tiny

from scripts.parity import replay_trl
from scripts.parity.cases import Case, all_cases
from scripts.parity.compare import measures, rule_of
from scripts.parity.page import rounded
from scripts.parity.results import Result, line

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")


def rows_of(area: str) -> list[list[str]]:
    """The table of an area, row by row."""
    section = PAGE.partition(f"\n## {area}\n")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\) \| ", text.strip("| ")) for text in section.splitlines() if text.startswith("| ")]
    return rows[1:]


@pytest.mark.parametrize("area", list(dict.fromkeys(case.area for case in all_cases())))
def test_the_page_has_every_case_and_all_hold(area: str) -> None:
    rows = rows_of(area)
    names = [case.name.replace("|", "\\|") for case in all_cases() if case.area == area]
    assert [row[0] for row in rows] == names, "make parity"
    assert {row[-1] for row in rows} == {"yes"}


def test_no_difference_on_the_page_is_over_its_tolerance() -> None:
    summary = rows_of("Summary")
    assert len({row[0] for row in summary}) == len({case.area for case in all_cases()})
    for row in summary:
        assert float(row[5]) <= float(row[7]), row
        assert row[-1] == "yes"


CASE = Case("Area", "name", "run")
LOG = {"loss": np.array([0.7, 0.6]), "learning_rate": np.array([1e-3, 0.0]), "weight/a": np.ones((2, 3), np.float32)}


@pytest.mark.parametrize(
    ("name", "value", "quantity"),
    [
        ("loss", np.array([0.7, 0.6 * (1 + 6e-5)]), "loss"),
        ("learning_rate", np.array([1e-3, 1e-12]), "learning rate"),
        ("weight/a", np.ones((2, 3), np.float32) + np.float32(2e-5), "final weights"),
        ("weight/a", np.ones((2, 3), np.float32) + np.float32(1e-6), "final weights, mean"),
        ("weight/a", np.ones((3, 2), np.float32), "final weights"),
        ("loss", np.array([0.7, np.nan]), "loss"),
        ("loss", None, "loss"),
    ],
)
def test_a_difference_that_is_too_large_is_told(name: str, value: np.ndarray | None, quantity: str) -> None:
    ours = {k: v for k, v in {**LOG, name: value}.items() if v is not None}
    result = Result(CASE, measures(CASE, ours, LOG))
    assert not result.holds
    assert quantity in [m.quantity for m in result.measures if not m.holds]
    assert line(result).startswith("FAIL")
    assert Result(CASE, measures(CASE, LOG, LOG)).holds


def test_a_tensor_that_only_this_side_has_is_told() -> None:
    result = Result(CASE, measures(CASE, {**LOG, "weight/b": np.ones(2)}, LOG))
    assert not result.holds and "weight/b" in line(result)


def test_a_case_that_failed_or_compared_nothing_does_not_hold() -> None:
    assert not Result(CASE, failure="ours: it broke").holds
    assert not Result(CASE, []).holds


# The table of tolerances (training and losses), so that none is raised here unnoticed.
@pytest.mark.parametrize(
    ("do", "name", "limit"),
    [
        ("step", "loss", 5e-5),
        ("step", "grad_norm", 3e-4),
        ("step", "gradient/x", 5e-4),
        ("step", "kl_divergence", 1e-5),
        ("run", "eval_loss", 5e-5),
        ("run", "grad_norm", 5e-5),
        ("run", "rewards/margins", 5e-5),
        ("run", "logps/chosen", 5e-4),
        ("run", "last eval_kl_divergence", 2e-4),
        ("run", "weight/x", 1e-5),
        ("run", "num_tokens", 0.0),
        ("run", "learning_rate", 1e-12),
        ("ids", "ids/chosen_ids", 0.0),
        ("logits", "logits/left", 2e-4),
    ],
)
def test_tolerances_are_those_of_the_reference_numbers(do: str, name: str, limit: float) -> None:
    assert rule_of(Case("Area", "name", do), name)[1].limit == limit


def test_no_case_has_a_tolerance_of_its_own() -> None:
    assert not [case.name for case in all_cases() if "tolerances" in case.extra]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (2.1e-6, "3e-6"), (3e-6, "3e-6"), (9.5e-6, "1e-5"), (1e-12, "1e-12"), (0.04, "4e-2")],
)
def test_one_digit_rounded_up(number: float, text: str) -> None:
    assert rounded(number) == text


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that put a small model and conversations without a prompt column in place of the Hub's."""
    folder = tmp_path_factory.mktemp("replay")
    rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in tiny.chat_rows(20)]
    model, data = tiny.make_model(folder / "model"), tiny.write_rows(folder / "pairs.jsonl", rows)
    return [
        "--model",
        str(model),
        "--data",
        str(data),
        "--output",
        str(folder / "out"),
    ]  # a pair on each of eight devices


def recorded(path: Path, **changes: list[float]) -> str:
    """A file of recorded numbers, by hand."""
    bounds = {"loss": {"worst": 1e-4, "mean": 1e-5}, "grad_norm": {"worst": 1e-2, "mean": 1e-3}}
    path.write_text(json.dumps({"bounds": bounds, **changes}), encoding="utf-8")
    return str(path)


@pytest.mark.slow
def test_the_replay_compares_every_step(
    stand_in: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(stand_in[stand_in.index("--output") + 1])
    other = recorded(tmp_path / "other.json", loss=[0.7] * 3, grad_norm=[1.0] * 3)
    assert replay_trl.main(["--recorded", other, *stand_in]) == 1
    assert "NOT the recorded run" in capsys.readouterr().out
    log = tiny.records(out, "train")
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and len(log) == 3  # one model against itself
    same = {name: [r[name] for r in log] for name in ("loss", "grad_norm")}
    kept = json.loads(Path(recorded(tmp_path / "same.json", **same)).read_text(encoding="utf-8"))
    assert replay_trl.judge(log, kept) == 0
    kept["loss"][1] += 2e-4
    assert replay_trl.judge(log, kept) == 1
    off = replay_trl.compare(log, kept)[0]
    assert off.at == 2 and off.worst == pytest.approx(2e-4, rel=1e-3)


def test_the_replay_says_what_is_missing_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay_trl.main(["--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "--model DIR --data FILE" in told and "ultrafeedback_binarized" in told


def test_the_recorded_run_is_whole() -> None:
    kept = json.loads(replay_trl.RECORDED.read_text(encoding="utf-8"))
    assert len(kept["loss"]) == len(kept["grad_norm"]) == 50
    assert (kept["loss"][0], kept["loss"][-1], kept["grad_norm"][-1]) == (0.693147, 0.710056, 159.0868)
