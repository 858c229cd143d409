"""run.jsonl: what is written is valid JSON and comes back; a killed writer and abandoned steps leave nothing behind.

Oracles: json itself, in its strict form; the bytes of the file; the shape of TRL's log_history (names of its metrics).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import report_runs as runs

from jax_dpo.errors import UserError
from jax_dpo.report.records import RunLog, json_ready, log_history, read_records


def _strict(line: bytes) -> dict:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(line, parse_constant=no_constant)


def test_what_is_appended_comes_back_in_order(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "new" / "run.jsonl")
    for record in runs.healthy():
        log.append(record)
    assert log.records() == read_records(log.path) == runs.healthy()
    log.close()


def test_time_is_added_and_the_written_record_is_returned(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.jsonl")
    written = log.append({"kind": "train", "step": np.int64(3), "loss": np.float32(0.5)})
    assert list(written)[:3] == ["kind", "step", "time"]
    assert abs(written["time"] - os.stat(log.path).st_mtime) < 60
    assert log.records() == [written]


def test_scalars_of_numpy_and_jax_become_numbers(tmp_path: Path) -> None:
    import jax.numpy as jnp
    import ml_dtypes

    @dataclass(frozen=True)
    class Spec:
        r: int
        targets: tuple[str, ...]

    values = {
        "a": np.float32(0.25),
        "b": np.int32(7),
        "c": np.bool_(True),
        "d": jnp.float32(1.5),
        "e": ml_dtypes.bfloat16(2.5),
        "f": np.arange(3),
        "g": Path("outputs/x"),
        "h": {"set": {"b", "a"}, 3: (1, 2)},
        "i": Spec(16, ("q_proj",)),
        "j": None,
        "k": False,
        "l": "snow ☃ \ud800",
    }
    log = RunLog(tmp_path / "run.jsonl")
    log.append({"kind": "start", "step": 0, "options": values})
    assert _strict(log.path.read_bytes())["options"] == {
        "a": 0.25,
        "b": 7,
        "c": True,
        "d": 1.5,
        "e": 2.5,
        "f": [0, 1, 2],
        "g": "outputs/x",
        "h": {"set": ["a", "b"], "3": [1, 2]},
        "i": {"r": 16, "targets": ["q_proj"]},
        "j": None,
        "k": False,
        "l": "snow ☃ ?",
    }


def test_a_value_that_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.jsonl")
    log.append({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": np.float32("inf"), "beta": 0.1})
    log.append({"kind": "verdict", "step": 1, "gates": [{"value": -math.inf}]})
    first, second = (_strict(line) for line in log.path.read_bytes().splitlines())
    assert (first["loss"], first["grad_norm"], first["beta"]) == (None, None, 0.1)
    assert first["non_finite"] == ["loss", "grad_norm"]
    assert second["gates"] == [{"value": None}]
    assert second["non_finite"] == ["gates.0.value"]
    assert json_ready(first) == first


@pytest.mark.parametrize("record", [{"step": 1}, {"kind": "trian", "step": 1}, {"kind": "train"}])
def test_a_record_without_kind_or_step_is_a_bug(tmp_path: Path, record: dict) -> None:
    with pytest.raises(ValueError, match="kind"):
        RunLog(tmp_path / "run.jsonl").append(record)


def test_every_line_is_one_write_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path / "run.jsonl")
    calls, write = [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(data) or write(fd, data))
    for record in runs.healthy():
        log.append(record)
    assert len(calls) == len(runs.healthy())
    assert all(c.endswith(b"\n") and c.count(b"\n") == 1 for c in calls)


@pytest.mark.parametrize("keep", [1, 30, -2])
def test_a_torn_last_line_is_left_out_and_mended(tmp_path: Path, keep: int) -> None:
    folder = runs.write(tmp_path, runs.healthy())
    path = folder / "run.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    assert read_records(path) == runs.healthy()[:-1]
    log = RunLog(path)
    log.append(runs.end())
    assert log.records() == [*runs.healthy()[:-1], runs.end()]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = runs.write(tmp_path, runs.healthy()) / "run.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert read_records(path) == runs.healthy()
    log = RunLog(path)
    log.append(runs.end())
    assert log.records() == [*runs.healthy(), runs.end()]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = runs.write(tmp_path, runs.healthy()) / "run.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"kind": "tr\n', *lines[2:]]))
    with pytest.raises(UserError, match="line 3") as caught:
        read_records(path)
    assert caught.value.name == "run-log-broken"


def test_a_missing_log_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output_dir") as caught:
        read_records(tmp_path / "run.jsonl")
    assert caught.value.name == "run-log-missing"


def test_a_full_disk_is_a_clear_message() -> None:
    log = RunLog("/dev/full")
    with pytest.raises(UserError, match="No space left") as caught:
        log.append(runs.end())
    assert caught.value.name == "run-log-not-writable"


def test_a_write_that_fails_half_way_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path / "run.jsonl")
    log.append(runs.train(1))
    write, calls = os.write, []

    def nearly_full(fd: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(fd, data[:10])

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(UserError):
        log.append(runs.train(2))
    monkeypatch.undo()
    log.append(runs.train(3))
    assert [r["step"] for r in log.records()] == [1, 3]


def test_truncation_drops_what_came_after_the_step(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.jsonl")
    for record in runs.healthy():
        log.append(record)
    before = log.path.read_bytes()
    gone = log.truncate_after(12)
    kept = log.records()
    assert gone == len(runs.healthy()) - len(kept) > 0
    assert (
        log.path.read_bytes()
        == b"".join(before.splitlines(keepends=True)[: len(kept) - 1]) + before.splitlines(keepends=True)[-1]
    )
    assert max(r["step"] for r in kept if r["kind"] in ("train", "eval", "checkpoint")) == 12
    assert {r["kind"] for r in kept} == {"start", "eval", "train", "checkpoint", "end"}
    log.append(runs.train(13))
    assert log.records()[-1] == runs.train(13)
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]
    assert log.truncate_after(13) == 0


def test_a_rollback_keeps_the_actions_that_led_to_it(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.jsonl")
    for step in range(1, 31):
        log.append(runs.train(step))
    log.append(runs.action(20, "halve_lr", "learning_rate", 5e-6, 2.5e-6, 0.11))
    log.append(runs.action(30, "rollback", "step", 30, 10, 0.13))
    log.truncate_after(10)
    log.append(runs.train(11))
    log.append(runs.action(25, "raise_beta", "beta", 0.1, 0.15, 0.12))
    assert [r["step"] for r in log.records() if r["kind"] == "train"] == list(range(1, 12))
    # A resumption at step 11 takes back what came after the rollback, and nothing before it.
    log.truncate_after(11)
    assert [r["action"] for r in log.records() if r["kind"] == "kl_action"] == ["halve_lr", "rollback"]


def _append_for_ever(path: str) -> None:
    log = RunLog(path)
    step = 0
    while True:
        step += 1
        log.append({**runs.train(1), "step": step})


def test_a_killed_writer_leaves_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    process = multiprocessing.get_context("spawn").Process(target=_append_for_ever, args=(str(path),))
    process.start()
    while not path.exists() or path.stat().st_size < 100_000:
        assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    steps = [r["step"] for r in read_records(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 50


def test_log_history_has_the_shape_of_trl(tmp_path: Path) -> None:
    history = log_history(runs.healthy())
    assert [d["step"] for d in history] == [r["step"] for r in runs.healthy() if r["kind"] in ("train", "eval", "end")]
    assert all(list(d)[-2:] == ["epoch", "step"] for d in history)
    assert not any({"kind", "time", "set", "non_finite"} & set(d) for d in history)
    trained = next(d for d in history if "loss" in d)
    assert {"grad_norm", "learning_rate", "rewards/margins", "rewards/accuracies", "kl_divergence"} <= set(trained)
    evaluated = next(d for d in history if "eval_loss" in d)
    assert {"eval_rewards/margins", "eval_kl_divergence", "eval_runtime", "eval_samples_per_second"} <= set(evaluated)
    assert history[-1] == {"train_runtime": 244.0, "epoch": runs.train(24)["epoch"], "step": 24}


def test_log_history_names_sets_and_keeps_nan() -> None:
    assert "eval_helpful_loss" in log_history(runs.several_sets())[0]
    lost = next(d for d in log_history(runs.not_finite()) if d["step"] == 8)
    assert math.isnan(lost["loss"]) and math.isnan(lost["grad_norm"])
    assert lost["beta"] == 0.1


def test_log_history_of_a_stopped_run_has_no_runtime_yet() -> None:
    assert not any("train_runtime" in d for d in log_history(runs.resumed()[:-1]))
