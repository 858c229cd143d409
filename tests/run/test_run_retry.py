"""`--retry`: a run whose gate failed is made again with one change. Oracle: plain runs with the options that a user would have changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from jax_dpo import DPOConfig
from jax_dpo.errors import UserError
from jax_dpo.trainer import attempts

SCRIPT = Path(__file__).with_name("signalled.py")


@pytest.fixture(scope="module")
def options(evaluated: dict[str, Any]) -> dict[str, Any]:
    """At 2e-3 the KL ends above 0.3, at half of that below."""
    chosen = {"learning_rate": 2e-3, "lr_scheduler_type": "constant", "target_kl": 0.3, "max_steps": 8, "save_steps": 4}
    return {**evaluated, **chosen, "resume_from_checkpoint": "auto"}


def train(options: dict[str, Any], out: Path, *more: Any) -> tiny.Ended:
    return tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", out, *more)


def results(out: Path) -> list[dict[str, Any]]:
    return tiny.untimed([r for r in tiny.records(out) if r["kind"] in ("train", "eval", "verdict")])


@pytest.fixture(scope="module")
def plain(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """The run as it is, and with half the rate, each by itself."""
    found = {}
    for rate in (2e-3, 1e-3):
        found[rate] = tmp_path_factory.mktemp("plain") / "out"
        train({**options, "learning_rate": rate}, found[rate])
    return found


@pytest.fixture(scope="module")
def retried(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tiny.Ended]:
    out = tmp_path_factory.mktemp("retried") / "out"
    return out, train(options, out, "--retry", 2)


def test_the_run_that_counts_is_the_one_with_the_change(
    retried: tuple[Path, tiny.Ended], plain: dict[float, Path]
) -> None:
    out, ended = retried
    assert ended.code == 0, ended.err
    assert (
        tiny.jax_dpo("report", plain[2e-3]).code == 0
        and json.loads((plain[2e-3] / "verdict.json").read_text())["exit_code"] == 3
    )
    assert results(out) == results(plain[1e-3])
    assert (
        tiny.snapshot(out / "final")["model.safetensors"] == tiny.snapshot(plain[1e-3] / "final")["model.safetensors"]
    )
    assert "again with learning_rate 0.002 -> 0.001, since gate kl failed" in ended.out
    assert "warning: attempt 2: learning_rate 0.002 -> 0.001" in ended.out, "also in its report, as a warning"


def test_nothing_of_the_first_attempt_is_lost(retried: tuple[Path, tiny.Ended], plain: dict[float, Path]) -> None:
    out, _ = retried
    first = out / "attempt-1"
    assert results(first) == results(plain[2e-3])
    left = {p.name for p in first.iterdir()}
    assert left == {p.name for p in plain[2e-3].iterdir()} | {"retry.json"}
    assert (
        tiny.snapshot(first / "final")["model.safetensors"] == tiny.snapshot(plain[2e-3] / "final")["model.safetensors"]
    )
    assert str(first / "final") in (first / "report.html").read_text()
    change = json.loads((first / "retry.json").read_text())
    assert (change["option"], change["old"], change["new"], change["gate"]) == ("learning_rate", 2e-3, 1e-3, "kl")
    assert not (out / "attempt-2").exists(), "it passed: no third attempt"


def test_the_attempts_are_on_one_page(retried: tuple[Path, tiny.Ended]) -> None:
    out, ended = retried
    page = (out / "comparison.html").read_text()
    assert "2 runs compared" in page and "attempt 1" in page and "attempt 2" in page
    assert '<td data-label="attempt 1">0.002</td><td data-label="attempt 2">0.001</td>' in page
    assert ended.last_line == f"the attempts on one page: {out / 'comparison.html'}"


def test_a_finished_run_is_left_alone(options: dict[str, Any], retried: tuple[Path, tiny.Ended]) -> None:
    out, _ = retried
    before = tiny.snapshot(out)
    for more in ((), ("--retry", 2), ("--retry", 5)):
        ended = train(options, out, *more)
        assert (ended.code, "nothing to do" in ended.out) == (0, True), ended.err
    assert {n: b for n, b in tiny.snapshot(out).items() if n != "comparison.html"} == {
        n: b for n, b in before.items() if n != "comparison.html"
    }


def test_other_options_are_refused_by_name(options: dict[str, Any], retried: tuple[Path, tiny.Ended]) -> None:
    out, _ = retried
    ended = train({**options, "beta": 0.2}, out, "--retry", 2)
    assert ended.code == 2 and "2 attempts at a run of other options: beta 0.1 there, 0.2 now" in ended.err
    fresh = train({**options, "resume_from_checkpoint": None}, out, "--retry", 2)
    assert fresh.code == 2 and "output-dir-taken" in fresh.err


@pytest.mark.slow
def test_all_attempts_fail(options: dict[str, Any], tmp_path: Path) -> None:
    """The exit code is that of the last. Asked for more of them later, it goes on where it stood."""
    out, hopeless = tmp_path / "out", {**options, "target_kl": 1e-5, "max_steps": 2, "save_strategy": "no"}
    ended = train(hopeless, out, "--retry", 1)
    assert ended.code == 3
    assert sorted(p.name for p in out.glob("attempt-*")) == ["attempt-1"]
    assert tiny.records(out, "start")[0]["options"]["learning_rate"] == 1e-3
    more = train(hopeless, out, "--retry", 2)
    assert more.code == 3
    assert sorted(p.name for p in out.glob("attempt-*")) == ["attempt-1", "attempt-2"]
    last = tiny.records(out, "start")[0]["options"]
    assert (last["learning_rate"], last["beta"]) == (1e-3, pytest.approx(0.15))
    assert "3 runs compared" in (out / "comparison.html").read_text()


def test_without_a_change_there_is_no_attempt(options: dict[str, Any], tmp_path: Path) -> None:
    ended = train(
        {**options, "learning_rate": 0.0, "max_steps": 2, "save_strategy": "no"}, tmp_path / "out", "--retry", 2
    )
    assert ended.code == 3 and "no further attempt" in ended.out
    assert list((tmp_path / "out").glob("*attempt*")) == []


@pytest.mark.slow
def test_a_stop_in_the_middle_of_a_retry_goes_on(
    options: dict[str, Any], plain: dict[float, Path], tmp_path: Path
) -> None:
    """SIGTERM after step 5 of the second attempt. Oracle: the run that nothing happened to."""
    out = tmp_path / "out"
    argv = ["train", *tiny.flags(options), "--output_dir", str(out), "--retry", "2"]
    stopped = subprocess.run(
        [sys.executable, SCRIPT, "5:2", "SIGTERM", *argv],
        capture_output=True,
        text=True,
        timeout=200,
        env=dict(os.environ),
        check=False,
    )
    assert stopped.returncode == 75, stopped.stderr
    assert (out / "attempt-1" / "verdict.json").exists() and tiny.checkpoints(out) == ["checkpoint-4", "checkpoint-6"]
    ended = tiny.jax_dpo(*argv)
    assert ended.code == 0 and "going on from checkpoint-6" in ended.out, ended.err
    assert results(out) == results(plain[1e-3])
    assert (out / "comparison.html").exists()


@pytest.mark.parametrize("after", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 99))])
def test_a_kill_while_it_is_set_aside_goes_on(
    options: dict[str, Any], plain: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """After none, some or all of the entries have moved, the last rename missing."""
    out = tmp_path / "out"
    shutil.copytree(plain[2e-3], out)
    moved: list[Any] = []
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if (len(moved) >= after and ".tmp" not in str(source)) or Path(target).name == "attempt-1":
            raise KeyboardInterrupt
        moved.append(source)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(attempts.os, "replace", killed)
        assert train(options, out, "--retry", 1).code == 130
    assert (out / ".attempt-1.moving").exists() and not (out / "attempt-1").exists()
    ended = train(options, out, "--retry", 1)
    assert ended.code == 0, ended.err
    assert not (out / ".attempt-1.moving").exists()
    assert results(out / "attempt-1") == results(plain[2e-3])
    assert results(out) == results(plain[1e-3])


def test_starting_over_removes_the_attempts_and_nothing_else(
    options: dict[str, Any], retried: tuple[Path, tiny.Ended], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(retried[0], out)
    (out / "attempt-notes").mkdir()
    (out / "mine.txt").write_text("mine")
    ended = train({**options, "target_kl": 10.0}, out, "--overwrite_output_dir", "--retry", 1)
    assert ended.code == 0, ended.err
    names = {p.name for p in out.iterdir()}
    assert names & {"attempt-1", "comparison.html"} == set() and {"attempt-notes", "mine.txt", "final"} <= names


def test_a_broken_attempt_is_named(options: dict[str, Any], retried: tuple[Path, tiny.Ended], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(retried[0], out)
    (out / "attempt-1" / "retry.json").write_text("{}")
    ended = train(options, out, "--retry", 2)
    assert ended.code == 2 and "attempt-1/retry.json: cannot be read" in ended.err and "[attempt-broken]" in ended.err


def test_python_is_told_what_to_do_instead() -> None:
    with pytest.raises(
        UserError,
        match=r"retry: is not an option here: run `jax-dpo train --retry N`; in Python make another DPOTrainer",
    ):
        DPOConfig("out", retry=2)  # type: ignore[call-arg]
