"""precompute_ref_log_probs: the reference's log-probabilities made before training. Oracles: TRL's own sums, and the same run with the
reference in the step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from jax_dpo.errors import UserError
from jax_dpo.trainer import precompute as module
from jax_dpo.trainer.precompute import entry_key

BEFORE = {"precompute_ref_log_probs": True}


def trainer_of(options: dict[str, Any], out: Path, **more: Any) -> Any:
    from jax_dpo import DPOConfig, DPOTrainer

    given = dict(options)
    model, train = more.pop("model", given.pop("model_name_or_path")), str(given.pop("dataset_name"))
    held_out = given.pop("eval_dataset", None)
    args = DPOConfig(str(out), **given)
    chosen = {"eval_dataset": held_out and str(held_out), **more}
    return DPOTrainer(str(model) if isinstance(model, Path) else model, args=args, train_dataset=train, **chosen)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own; the files of precomputed log-probabilities lie in it."""
    monkeypatch.setenv("JAX_DPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs that the reference was run on, batch by batch."""
    ran: list[int] = []
    original = module.make_reference_pass

    def counted(*args: Any) -> Any:
        run = original(*args)

        def count(frozen: Any, batch: Any) -> Any:
            ran.append(int(np.sum(np.asarray(batch.index) >= 0)))
            return run(frozen, batch)

        return count

    monkeypatch.setattr(module, "make_reference_pass", counted)
    return ran


def compare(found: Path, expected: Path, *, exact_eval: bool = True) -> None:
    """Two logs: training to 1e-6, evaluations to the same, with the KL in them."""
    for mine, theirs in zip(tiny.records(found, "train"), tiny.records(expected, "train"), strict=True):
        assert "kl_divergence" not in mine and np.isfinite(mine["kl_estimate"])
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "entropy"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-6, rel=1e-6), (mine["step"], name)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5)
    for mine, theirs in zip(tiny.records(found, "eval"), tiny.records(expected, "eval"), strict=True):
        for name in ("eval_loss", "eval_rewards/margins", "eval_kl_divergence"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-6, rel=2e-5), (mine["step"], name)


def test_the_sums_are_trls(tmp_path: Path) -> None:
    """TRL's columns of its own run; ours are on the rows of train_dataset as there."""
    from test_run_trl import recorded, trainer_of

    run = recorded("precompute")
    trainer = trainer_of(run, tmp_path / "out", None, start_is_reference=False, by_batches=False)
    theirs = run["precomputed"]["train"]
    of_row = dict(zip(theirs["row"], zip(theirs["ref_chosen_logps"], theirs["ref_rejected_logps"])))
    rows = trainer.train_dataset
    assert len(rows) == len(run["order"]) and set(rows[0]) == {
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "ref_chosen_logps",
        "ref_rejected_logps",
    }
    found = [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in rows]
    np.testing.assert_allclose(found, [of_row[i] for i in run["order"]], rtol=2e-5)


@pytest.fixture(scope="module")
def usual_run(evaluated: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Options and output of a run with the reference in its step; the tail of the longer answer counts half."""
    options = {**evaluated, "max_length": 13, "ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"], "max_steps": 4}
    out = tmp_path_factory.mktemp("usual") / "out"
    trainer_of(options, out).train()
    return options, out


def test_a_run_is_the_one_with_the_reference_in_its_step(
    usual_run: tuple[dict[str, Any], Path], tmp_path: Path, cache: Path, passes: list[int]
) -> None:
    options, expected = usual_run
    trainer = trainer_of({**options, **BEFORE}, tmp_path / "a")
    trainer.train()
    compare(tmp_path / "a", expected)
    assert sum(passes) == 24  # every pair once
    assert tiny.records(tmp_path / "a", "eval")[0]["eval_kl_divergence"] == 0
    text = tiny.records(tmp_path / "a", "start")[0]["reference"]
    assert "log-probabilities of the 24 training pairs were computed beforehand, so it is not there" in text
    # While it trains, the reference is not on the device; evaluations load it, of any set.
    assert trainer._frozen.reference == {}
    again = trainer.evaluate(tiny.text_rows(8, seed=2))
    assert again["eval_loss"] == tiny.records(tmp_path / "a", "eval")[-1]["eval_loss"]
    # The next run finds them, whatever its rate, loss, batches and steps.
    other = {"learning_rate": 1e-4, "loss_type": ["ipo"], "per_device_train_batch_size": 8, "max_steps": 1}
    changed = {**options, **BEFORE, **other, "share_prompt": False, "eval_strategy": "no", "eval_on_start": False}
    second = trainer_of(changed, tmp_path / "b")
    second.train()
    assert sum(passes) == 24 and second.ref_logps_found == 24
    assert "beforehand, 24 of them by an earlier run" in tiny.records(tmp_path / "b", "start")[0]["reference"]
    np.testing.assert_array_equal(second.engine.ref_logps, trainer.engine.ref_logps)


def test_what_decides_the_numbers_is_in_the_key(usual: dict[str, Any], model: Path, data: Path, tmp_path: Path) -> None:
    """The keys of runs that differ in one thing, and whether they may share what was computed."""
    from jax_dpo import LoraConfig, load_model

    def key(more: dict[str, Any] | None = None, **kwargs: Any) -> str:
        trainer = trainer_of({**usual, **BEFORE, **(more or {})}, tmp_path / "out", **kwargs)
        return entry_key(trainer.pairing, trainer.engine, trainer.train_set)

    first = key()
    same = [
        {"learning_rate": 1e-3, "beta": 0.5, "loss_type": ["ipo"], "seed": 7},
        {"per_device_train_batch_size": 1, "precompute_ref_batch_size": 2, "share_prompt": False},
        {"max_length": 500},  # nothing is cut
    ]
    assert [key(more) for more in same] == [first] * len(same)
    assert key(ref_model=str(model)) == first
    assert key(model=load_model(model)) == first
    assert key(peft_config=LoraConfig(r=2)) == first  # whose reference is the base
    ended = tiny.jax_dpo("convert", model, tmp_path / "copy")
    assert ended.code == 0 and key(ref_model=str(tmp_path / "copy")) == first  # content, not path
    other = tiny.make_model(tmp_path / "other", seed=9)
    long_rope = tiny.make_model(tmp_path / "rope", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})
    different = [
        key({"ld_alpha": 0.5}),
        key({"max_length": 9}),
        key({"max_length": 9, "truncation_mode": "keep_end"}),
        key({"bf16": True}),
        key({"dataset_name": data / "chat.jsonl"}),
        key(ref_model=str(other)),
        key(ref_model=str(long_rope)),
    ]
    assert len({first, *different}) == 1 + len(different)


def test_an_interruption_costs_what_was_not_written(
    usual: dict[str, Any], tmp_path: Path, cache: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_PAIRS", 8)
    options = {**usual, **BEFORE, "precompute_ref_batch_size": 1, "max_steps": 1}
    whole = trainer_of(options, tmp_path / "whole").train_dataset
    assert sum(passes) == 24
    files = sorted(p for p in cache.rglob("*") if p.is_file())
    assert [p.name for p in files] == [
        "000000000-000000008.logps",
        "000000008-000000016.logps",
        "000000016-000000024.logps",
    ]
    kept = files[0].read_bytes()

    # Killed before the second range was written whole, which left half a file of another name.
    files[1].rename(files[1].with_name(files[1].name + ".123.abcd.part"))
    files[2].unlink()
    passes.clear()
    trainer = trainer_of(options, tmp_path / "killed")
    assert trainer.train_dataset == whole
    assert sum(passes) == 16 and trainer.ref_logps_found == 8 and files[0].read_bytes() == kept

    # Damaged: a byte, the end, another entry's file. Each is computed anew and said.
    passes.clear()
    damaged = bytearray(kept)
    damaged[-3] ^= 1
    files[0].write_bytes(bytes(damaged))
    files[2].write_bytes(files[2].read_bytes()[:-1])
    trainer = trainer_of(options, tmp_path / "damaged")
    assert trainer.train_dataset == whole and sum(passes) == 16
    assert sum("are computed anew" in note for note in trainer.notes) == 2
    other = trainer_of({**options, "ld_alpha": 0.5}, tmp_path / "other")
    folder = cache / entry_key(other.pairing, other.engine, other.train_set)
    folder.mkdir()
    (folder / files[1].name).write_bytes(files[1].read_bytes())
    assert other.engine.ref_logps is None and len(other.train_dataset) == 24 and other.ref_logps_found == 0


def test_a_signal_ends_it_between_two_ranges(
    usual: dict[str, Any], tmp_path: Path, cache: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax_dpo.train.signals import StopRequest

    monkeypatch.setattr(module, "LEAST_PAIRS", 8)
    options = tiny.flags(
        {**usual, **BEFORE, "precompute_ref_batch_size": 1, "max_steps": 1, "output_dir": tmp_path / "out"}
    )
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "asked", lambda self: True)
        stopped = tiny.jax_dpo("train", *options)
    assert stopped.code == 75 and sum(passes) == 8
    assert "stopped by a signal" in stopped.out and stopped.out.rstrip().endswith("exit 75")
    assert not (tmp_path / "out" / "run.jsonl").exists()
    ended = tiny.jax_dpo("train", *options)  # the same command, and no word of a run that is there
    assert ended.code == 0, ended.err
    assert sum(passes) == 24


def test_a_cache_that_cannot_be_written_costs_time_not_the_run(
    usual: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in the way")
    trainer = trainer_of({**usual, **BEFORE, "max_steps": 1}, tmp_path / "out")
    trainer.train()
    warnings = tiny.records(tmp_path / "out", "start")[0]["plan"]["warnings"]
    assert any("not kept for the next run, which will compute them again" in w and str(cache) in w for w in warnings)


@pytest.mark.parametrize(
    "kind", ["another", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("base", "adapter"))]
)
def test_every_reference_has_its_numbers(
    kind: str, usual: dict[str, Any], evaluated: dict[str, Any], model: Path, tmp_path: Path, cache: Path
) -> None:
    from jax_dpo import LoraConfig, load_model

    options, more = {**evaluated, "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no"}, {}
    if kind == "another":
        more["ref_model"] = str(tiny.make_model(tmp_path / "other", seed=3))
        options["learning_rate"] = 5e-4
    elif kind == "base":
        more["peft_config"] = LoraConfig(r=4, lora_dropout=0.0)
    else:
        first = trainer_of(
            {**usual, "max_steps": 2, "learning_rate": 1e-2}, tmp_path / "first", peft_config=LoraConfig(r=4)
        )
        first.train()
        more["model"] = load_model(model, adapter=tmp_path / "first" / "final")
    if kind != "another":
        options |= {"eval_steps": 1}
    with_it = trainer_of(options, tmp_path / "in_step", **more)
    with_it.train()
    before = trainer_of({**options, **BEFORE}, tmp_path / "before", **more)
    before.train()
    compare(tmp_path / "before", tmp_path / "in_step")
    assert tiny.records(tmp_path / "before", "eval")[-1]["eval_kl_divergence"] > 0
    assert before._frozen.reference == {}


def test_a_run_goes_on_to_the_bit(usual: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    options = {**usual, **BEFORE}
    trainer_of(options, tmp_path / "whole").train()
    resumed = {**options, "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2")}
    trainer_of(resumed, tmp_path / "out").train()
    found, expected = (tiny.untimed(tiny.records(tmp_path / name, "train")) for name in ("out", "whole"))
    assert found == expected[2:]
    weights = [tiny.snapshot(tmp_path / name / "final")["model.safetensors"] for name in ("out", "whole")]
    assert weights[0] == weights[1]


def test_control_acts_on_the_exact_kl_of_evaluations(evaluated: dict[str, Any], tmp_path: Path) -> None:
    options = {**evaluated, **BEFORE, "target_kl": 1e-4, "kl_actions": ["raise_beta"], "max_steps": 4}
    ended = tiny.jax_dpo("train", *tiny.flags({**options, "output_dir": tmp_path / "out"}))
    assert ended.code == 3
    *_, middle, evaluation = tiny.records(tmp_path / "out", "eval")
    (action,) = tiny.records(tmp_path / "out", "kl_action")
    assert action["kl"] == middle["eval_kl_divergence"] > 1e-4
    gates = {g["name"]: g for g in json.loads((tmp_path / "out" / "verdict.json").read_text())["gates"]}
    assert gates["kl"]["status"] == "failed" and gates["kl"]["value"] == evaluation["eval_kl_divergence"]


def test_what_needs_the_whole_distribution_is_refused(tmp_path: Path) -> None:
    from jax_dpo import DPOConfig

    for more, said in (
        ({"kl_coef": 1.0}, "beside kl_coef 1.0: the penalty needs"),
        ({"kl_controller": "dual_kl_coef"}, "beside kl_controller dual_kl_coef"),
        ({"sync_ref_model": True}, "beside sync_ref_model, whose reference moves"),
    ):
        with pytest.raises(UserError, match=said):
            DPOConfig(str(tmp_path), **BEFORE, **more)
    assert any("can do nothing" in w for w in DPOConfig(precompute_ref_batch_size=2).warnings())


def test_a_reference_without_numbers_is_told_by_row(usual: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    broken = tiny.make_model(tmp_path / "broken", seed=4)
    weights = tiny.tensors(broken)
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    trainer = trainer_of({**usual, **BEFORE}, tmp_path / "out", ref_model=str(broken))
    with pytest.raises(UserError, match=r"not finite for 24 of 24 pairs, in rows 1, 2, 3") as refused:
        trainer.train()
    assert refused.value.name == "reference-not-finite"
    assert not (tmp_path / "out" / "run.jsonl").exists()


def test_columns_that_came_with_the_data_are_not_taken_for_ours(usual: dict[str, Any], tmp_path: Path) -> None:
    """TRL computes them anew as well; whose they are is not known."""
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in tiny.text_rows(4)]
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    trainer = trainer_of({**usual, **BEFORE, "dataset_name": file}, tmp_path / "out")
    assert any(
        "ref_chosen_logps and ref_rejected_logps came with the data" in w for w in trainer.train_set.data.warnings
    )
    assert all(row["ref_chosen_logps"] < -5 for row in trainer.train_dataset)


KILLED = """
import os, signal, sys
from jax_dpo.cli import main
from jax_dpo.data.ref_logps import RefLogps
from jax_dpo.trainer import precompute
precompute.LEAST_PAIRS, write = 8, RefLogps.write
def killed(self, start, rows):
    if start == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, start, rows)
RefLogps.write = killed
main()
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_with_what_it_had_written(
    usual: dict[str, Any], tmp_path: Path, cache: Path, passes: list[int]
) -> None:
    options = {**usual, **BEFORE, "precompute_ref_batch_size": 1, "max_steps": 2, "resume_from_checkpoint": "auto"}
    options |= {"mesh_fsdp": 1, "output_dir": tmp_path / "out"}
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "-c", KILLED, "train", *tiny.flags(options)]
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert [p.name for p in cache.rglob("*.logps")] == ["000000000-000000008.logps"]
    ended = tiny.jax_dpo("train", *tiny.flags(options))
    assert ended.code == 0, ended.err
    assert sum(passes) == 16
    assert (
        "24 training pairs were computed beforehand, 8 of them"
        in tiny.records(tmp_path / "out", "start")[0]["reference"]
    )
