"""A reference that moves (TR-DPO, arXiv 2404.09656). Oracles: the formula by hand, the run that nothing happened to, to the bit; TRL's own
run is in test_run_trl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from jax_dpo.arrays import flatten
from jax_dpo.train.checkpoint import Checkpoints
from jax_dpo.train.loop import Loop

MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}


def trainer_of(options: dict[str, Any], out: Path, **more: Any) -> Any:
    from jax_dpo import DPOConfig, DPOTrainer

    given = dict(options)
    model, train = str(given.pop("model_name_or_path")), str(given.pop("dataset_name"))
    held_out = given.pop("eval_dataset", None)
    args = DPOConfig(str(out), **given)
    return DPOTrainer(model, args=args, train_dataset=train, eval_dataset=held_out and str(held_out), **more)


def states_of(trainer: Any, steps: list[int]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(policy, reference) of each checkpoint, by path."""
    with Checkpoints(trainer.args.output_dir, save_total_limit=None) as checkpoints:
        states = [checkpoints.restore(step, trainer.engine.abstract_state)[0] for step in steps]
    return [tuple({p: np.asarray(x) for p, x in flatten(t).items()} for t in (s.params, s.reference)) for s in states]


@pytest.fixture(scope="module")
def options(evaluated: dict[str, Any]) -> dict[str, Any]:
    """Six steps; the reference moves after 2, 4 and 6, a checkpoint lies between two moves."""
    return {**evaluated, **MOVING, "max_steps": 6, "save_steps": 1, "eval_steps": 3, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = trainer_of(options, tmp_path_factory.mktemp("whole") / "out")
    trainer.train()
    return trainer


def test_the_reference_moves_by_the_formula_and_only_then(whole: Any) -> None:
    (_, start), *_ = states_of(whole, [1])
    (p2, r2), (_, r3), (p4, r4) = states_of(whole, [2, 3, 4])
    first = whole.pairing.policy.leaves
    for path, x in start.items():
        np.testing.assert_array_equal(x, first[path].read(), err_msg=path)
        np.testing.assert_allclose(r2[path], 0.25 * p2[path] + 0.75 * x, rtol=3e-7, atol=1e-9)
        np.testing.assert_array_equal(r3[path], r2[path])
        np.testing.assert_allclose(r4[path], 0.25 * p4[path] + 0.75 * r2[path], rtol=3e-7, atol=1e-9)
        assert not np.array_equal(r4[path], r2[path])


def test_a_run_goes_on_to_the_bit_with_the_moved_reference(whole: Any, options: dict[str, Any], tmp_path: Path) -> None:
    before = Path(whole.args.output_dir)
    again = {**options, "resume_from_checkpoint": str(before / "checkpoint-3")}
    trainer = trainer_of(again, tmp_path / "out")
    trainer.train()
    kinds = ("train", "eval")
    found, expected = (
        tiny.untimed([r for r in tiny.records(d) if r["kind"] in kinds]) for d in (tmp_path / "out", before)
    )
    assert found == [r for r in expected if r["step"] > 3]
    for mine, theirs in zip(states_of(trainer, [6]), states_of(whole, [6])):
        for a, b in zip(mine, theirs):
            assert all(np.array_equal(a[p], b[p]) for p in b)


def test_the_finished_run_evaluates_against_the_moved_reference(
    whole: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    last = whole.state.log_history[-2]
    assert last["step"] == 6 and "eval_loss" in last
    again = trainer_of({**options, "resume_from_checkpoint": "auto"}, Path(whole.args.output_dir))
    again.train()
    assert again.already_finished
    for name in ("eval_loss", "eval_kl_divergence", "eval_rewards/margins"):
        assert again.evaluate()[name] == last[name] == whole.evaluate()[name]


def test_a_moved_reference_that_nobody_kept_is_missed(usual: dict[str, Any], tmp_path: Path) -> None:
    from jax_dpo.errors import UserError

    options = {**usual, **MOVING, "max_steps": 2, "save_strategy": "no", "resume_from_checkpoint": "auto"}
    trainer_of(options, tmp_path / "out").train()
    again = trainer_of(options, tmp_path / "out")
    again.train()
    with pytest.raises(UserError, match="checkpoint-2 is not there") as refused:
        again.evaluate(tiny.text_rows(4))
    assert refused.value.name == "moved-reference-missing" and str(tmp_path / "out" / "final") in str(refused.value)


def test_reports_say_what_the_kl_is_against(whole: Any) -> None:
    out = Path(whole.args.output_dir)
    start = tiny.records(out, "start")[0]
    assert "moved 0.25 of the way to the policy every 2 steps (TR-DPO)" in start["reference"]
    assert any("against two references" in w for w in start["plan"]["warnings"])
    assert "KL to the moved reference" in (out / "report.html").read_text()
    assert "KL to the moved reference" in (out / "final" / "README.md").read_text()
    gates = {g["name"]: g for g in json.loads((out / "verdict.json").read_text())["gates"]}
    assert gates["kl"]["status"] == "passed"
    for name in ("margin", "improving"):
        assert gates[name]["status"] == "not judged" and "the reference moved" in gates[name]["reason"]


@pytest.mark.slow
def test_a_rollback_brings_the_reference_of_its_checkpoint_back(
    evaluated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = {"learning_rate": 2e-3, "lr_scheduler_type": "constant", "max_steps": 5, "save_steps": 1, "eval_steps": 1}
    fast |= {"target_kl": 0.06, "kl_actions": ["halve_lr", "raise_beta", "rollback"]}
    fast |= {**MOVING, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.02}
    copy = lambda tree: {p: np.array(x) for p, x in flatten(tree).items()}  # noqa: E731
    saved: dict[int, Any] = {}
    back: list[int] = []
    write, roll = Loop._write_checkpoint, Loop._roll_back

    def keep(loop: Loop, step: int) -> None:
        saved.setdefault(0, {p: x.read() for p, x in trainer.pairing.policy.leaves.items()})
        saved[step] = copy(loop.state.reference)
        write(loop, step)

    def look(loop: Loop, to: int) -> None:
        left, expected = copy(loop.state.reference), dict(saved)
        roll(loop, to)
        back.append(to)
        now = copy(loop.state.reference)
        assert all(np.array_equal(now[p], expected[to][p]) for p in now)
        assert not any(np.array_equal(now[p], left[p]) for p in now)

    monkeypatch.setattr(Loop, "_write_checkpoint", keep)
    monkeypatch.setattr(Loop, "_roll_back", look)
    trainer = trainer_of({**evaluated, **fast}, tmp_path / "out")
    trainer.train()
    assert 0 in back and max(back) > 0, back


def test_another_model_as_a_reference_moves_from_there(usual: dict[str, Any], tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "other", seed=5)
    before = tiny.snapshot(other)
    trainer = trainer_of({**usual, **MOVING, "max_steps": 2}, tmp_path / "out", ref_model=str(other))
    trainer.train()
    ((p2, r2),) = states_of(trainer, [2])
    theirs = {p: x.read() for p, x in trainer.pairing.other.leaves.items()}
    for path, x in theirs.items():
        np.testing.assert_allclose(r2[path], 0.25 * p2[path] + 0.75 * x, rtol=3e-7, atol=1e-8)
    assert tiny.snapshot(other) == before


def test_what_cannot_move_is_refused(usual: dict[str, Any], tmp_path: Path) -> None:
    from jax_dpo import LoraConfig
    from jax_dpo.errors import UserError

    with pytest.raises(UserError, match="an adapter is trained") as refused:
        trainer_of({**usual, **MOVING}, tmp_path / "out", peft_config=LoraConfig())
    assert refused.value.name == "sync-ref-model-adapter"
    wide = tiny.make_model(tmp_path / "wide", intermediate_size=96)
    with pytest.raises(UserError, match=r"gate_proj.weight is \(2, 64, 32\) .* and \(2, 96, 32\)") as refused:
        trainer_of({**usual, **MOVING}, tmp_path / "out", ref_model=str(wide))
    assert refused.value.name == "sync-ref-model-shapes"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_share_is_not_lost_in_bfloat16() -> None:
    """The reference is kept in float32: in bfloat16 a thousandth of a step's change would round to nothing."""
    import jax
    import jax.numpy as jnp
    import tiny_engine

    engine = tiny_engine.engine_on(
        (1, 1, 1), bf16=True, sync_ref_model=True, ref_model_mixup_alpha=1e-3, ref_model_sync_steps=1
    )
    state = engine.fresh_state()
    start = {p: np.array(x) for p, x in flatten(state.reference).items()}
    frozen, batch = engine.frozen(state), engine.batch_at(engine.plan.after(0))
    arrays, knobs = engine.to_devices(batch), tiny_engine.knobs_of(engine)
    state, _ = engine.step(state, frozen, arrays, jnp.int32(batch.micro_batches), knobs, jax.random.key(0))
    state = engine.sync(state)
    for path, x in flatten(state.reference).items():
        moved = np.asarray(flatten(state.params)[path]).astype(np.float64) - start[path]
        np.testing.assert_allclose(np.asarray(x).astype(np.float64) - start[path], 1e-3 * moved, atol=3e-7)
        assert np.any(np.asarray(x) != start[path]), path
