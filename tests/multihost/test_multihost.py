"""Two processes of four devices each as one run, through the command line. Oracle: the same command on one process of eight devices."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from cluster import Cluster, Ended


def spoken(ended: Ended) -> list[str]:
    """The lines of a process without those of the transport of CPU collectives, whose threads may tear each other's."""
    return [
        line for line in ended.out.splitlines() if line.strip() and "[Gloo]" not in line and "peer ranks" not in line
    ]


@pytest.fixture(scope="module")
def one(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, in this one: it has eight virtual devices."""
    out = tmp_path_factory.mktemp("one") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DPO_CACHE", str(cluster.folder / "cache"))
        ended = tiny.jax_dpo("train", *tiny.flags({**cluster.options, "output_dir": out}))
    assert ended.code == 0, ended.err
    return out


@pytest.fixture(scope="module")
def two(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    out = tmp_path_factory.mktemp("two") / "out"
    return out, cluster.run(out)


def assert_close(found: Any, expected: Any, where: str) -> None:
    """Numbers within tolerance, all else equal, however deep they lie."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for a, b in zip(found, expected):
            assert_close(a, b, where)
    elif isinstance(expected, float):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5, err_msg=where)
    else:
        assert found == expected, where


def assert_same_numbers(found: Path, expected: Path) -> None:
    kinds = ("train", "eval", "verdict")
    a, b = (tiny.untimed([r for r in tiny.records(p) if r["kind"] in kinds]) for p in (found, expected))
    assert [(r["kind"], r["step"]) for r in a] == [(r["kind"], r["step"]) for r in b]
    for x, y in zip(a, b):
        for name, value in y.items():
            if name not in ("gates", "best", "headline", "findings"):
                assert_close(x[name], value, f"{name} of step {y['step']}")
    for folder in ("final", "best"):
        weights = tiny.tensors(expected / folder)
        for name, value in tiny.tensors(found / folder).items():
            np.testing.assert_allclose(value, weights[name], rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_are_one_run(one: Path, two: tuple[Path, list[Ended]]) -> None:
    out, (first, second) = two
    assert (first.code, second.code) == (0, 0), first.err + second.err
    start = tiny.records(out, "start")[0]
    assert start["devices"]["hosts"] == 2 and start["devices"]["count"] == 8
    assert start["plan"]["pairs_per_step"] == 8
    assert_same_numbers(out, one)
    assert tiny.records(out, "train")[0]["rewards/margins"] == 0
    # One process writes and speaks; both hold the checkpoint's arrays.
    assert first.out.rstrip().endswith("exit 0")
    assert spoken(second) == [] and second.err == ""
    assert {p.name for p in out.iterdir()} == {p.name for p in one.iterdir()}


def at_step(step: int, which: int, name: str) -> str:
    """Python that sends one of the processes a signal after a step's log line; what was being saved by then is saved."""
    return f"""
import os, signal, jax
from jax_dpo.train.loop import Loop
log = Loop._log
def told(self):
    log(self)
    if self.progress.step == {step}:
        self.parts.checkpoints.wait()
        if jax.process_index() == {which}:
            os.kill(os.getpid(), signal.{name})
Loop._log = told
"""


LOST = "Checkpoints are whole: start the same command on all hosts again"


@pytest.fixture(scope="module")
def long(cluster: Cluster) -> Cluster:
    """The same with eight steps."""
    return replace(cluster, options={**cluster.options, "max_steps": 8, "save_steps": 3, "eval_steps": 4})


@pytest.fixture(scope="module")
def unbroken(long: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    ended = long.run(out, processes=1)
    assert ended[0].code in (0, 3), ended[0].err
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("which", "then"), [(1, 1), (0, 2)])
def test_a_killed_process_ends_the_run_and_the_next_start_goes_on(
    which: int, then: int, long: Cluster, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    running = long.start(out, before=at_step(5, which, "SIGKILL"))
    running.processes[which].wait(200)
    lost = time.monotonic()
    ended = running.wait()
    assert time.monotonic() - lost < 30
    assert ended[which].code == -signal.SIGKILL
    other = ended[1 - which]
    assert other.code not in (0, 3)
    assert LOST in other.err.splitlines()[-1] and "another process is lost" in other.err
    assert tiny.checkpoints(out) == ["checkpoint-3"]
    again = long.run(out, processes=then)
    assert again[0].code in (0, 3), again[0].err
    assert "going on from checkpoint-3, after step 3" in again[0].out
    assert_same_numbers(out, unbroken)


@pytest.mark.slow
def test_an_adapter_rolled_back_and_sampled_is_one_run_too(long: Cluster, tmp_path: Path) -> None:
    options = {
        "use_peft": True,
        "lora_r": 4,
        "learning_rate": 0.02,
        "target_kl": 0.002,
        "kl_actions": ["rollback", "halve_lr"],
        "save_steps": 2,
        "eval_steps": 2,
        "generate_samples": 2,
        "eval_on_policy_prompts": 3,
        "eval_on_policy_tokens": 5,
        "load_best_model_at_end": True,
    }
    for name, processes in (("two", 2), ("one", 1)):
        ended = long.run(tmp_path / name, processes=processes, **options)
        assert {e.code for e in ended} <= {0, 3}, ended[0].err
        assert len({e.code for e in ended}) == 1
    found, expected = (tiny.records(tmp_path / name) for name in ("two", "one"))
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]
    assert any(r["kind"] == "kl_action" and r["action"] == "rollback" for r in found)
    on_policy = [[r["eval_kl_on_policy"] for r in tiny.records(tmp_path / n, "eval")] for n in ("two", "one")]
    np.testing.assert_allclose(*on_policy, rtol=1e-3, atol=1e-6)
    assert on_policy[0][-1] > 0
    samples = [tiny.records(tmp_path / name, "samples")[0]["samples"] for name in ("two", "one")]
    assert samples[0] == samples[1]
    mine, theirs = (tiny.tensors(tmp_path / name / "final", "adapter_model.safetensors") for name in ("two", "one"))
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, rtol=0, atol=5e-5, err_msg=name)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_saving(long: Cluster, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = long.run(out, before=at_step(4, 1, "SIGTERM"))
    assert [e.code for e in stopped] == [75, 75], stopped[0].err + stopped[1].err
    saved = tiny.checkpoints(out)[-1]
    assert saved in ("checkpoint-4", "checkpoint-5", "checkpoint-6")
    assert f"saved as {saved}" in stopped[0].out
    again = long.run(out)
    assert [e.code for e in again] == [tiny.records(out, "verdict")[0]["exit_code"]] * 2
    assert_same_numbers(out, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(("only", "found"), [(0, "1 of 2 joined"), (1, "nobody answers there")])
def test_a_process_that_waits_alone_ends_and_says_so(only: int, found: str, cluster: Cluster, tmp_path: Path) -> None:
    before = "import jax_dpo.sharding.multihost as m; m.JOIN_SECONDS = 4"
    ended = cluster.run(tmp_path / "out", only=only, before=before)
    assert ended[0].code == 2
    assert f"process {only} of 2 waited 4 s" in ended[0].err and found in ended[0].err
    assert "Traceback" not in ended[0].err and len(ended[0].err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_error_on_one_host_ends_the_others(cluster: Cluster, tmp_path: Path) -> None:
    before = (
        "import sys\n"
        "if sys.argv[sys.argv.index('--process_id') + 1] == '1':\n"
        "    sys.argv[sys.argv.index('--dataset_name') + 1] = 'missing.jsonl'"
    )
    began = time.monotonic()
    first, second = cluster.run(tmp_path / "out", before=before)
    assert second.code == 2 and "missing.jsonl" in second.err and LOST not in second.err
    assert first.code not in (0, 3) and LOST in first.err.splitlines()[-1]
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_an_error_of_all_is_said_by_all(cluster: Cluster, two: tuple[Path, list[Ended]]) -> None:
    before = tiny.snapshot(two[0])
    ended = cluster.run(two[0], resume_from_checkpoint=None)
    for process in ended:
        assert process.code == 2
        assert "holds a run already" in process.err and "Traceback" not in process.err and LOST not in process.err
    assert tiny.snapshot(two[0]) == before


@pytest.mark.slow
def test_another_attempt_is_one_for_all_processes(cluster: Cluster, tmp_path: Path) -> None:
    """Both attempts are over a bound that nothing holds; one process moves and speaks, and both go on with the changed rate."""
    out = tmp_path / "out"
    first, second = cluster.run(out, target_kl=1e-5, retry=1)
    assert (first.code, second.code) == (3, 3), first.err + second.err
    assert spoken(second) == [] and second.err == ""
    rates = [tiny.records(folder, "start")[0]["options"]["learning_rate"] for folder in (out / "attempt-1", out)]
    assert rates == [1e-3, 5e-4]
    assert f"the attempts on one page: {out / 'comparison.html'}" in first.out
    alone = tmp_path / "alone"
    cluster.run(alone, target_kl=1e-5, learning_rate=5e-4)
    losses, expected = ([r["loss"] for r in tiny.records(folder, "train")] for folder in (out, alone))
    assert losses == pytest.approx(expected, rel=2e-5)
