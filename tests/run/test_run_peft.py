"""Adapters of each kind. Oracle: tests/golden/adapters/kinds, which PEFT 0.21.2 and TRL 1.16 computed on a CPU in float32
(tests/parity/peft_numbers.py made them): files, logits with the adapter on and merged, and four steps of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from jax_dpo import DPOConfig, DPOTrainer, LoraConfig, load_model, save_model
from jax_dpo.errors import UserError

KINDS = tiny.GOLDEN / "adapters" / "kinds"
STARTS = tiny.GOLDEN / "training" / "start"
START = STARTS / "llama"
CASES = ("dora", "patterns", "dora_layer", "saved", "tied")
# The tolerances of a training run in float32, between two runs of torch times ten.
NEAR: dict[str, dict[str, float]] = {name: {"rel": 5e-5, "abs": 0} for name in ("loss", "grad_norm")}
NEAR |= {"rewards": {"rel": 0, "abs": 5e-5}, "logps": {"rel": 0, "abs": 5e-4}}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 512, (1, 6))


def start_of(case: Path) -> Path:
    return STARTS / ("qwen3" if case.name == "tied" else "llama")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Path:
    return KINDS / request.param


def test_logits_of_what_peft_wrote(case: Path) -> None:
    want = load_file(case / "logits.safetensors")
    for name in ("initial", "final"):
        got = load_model(start_of(case), adapter=case / name)(token_ids())
        np.testing.assert_allclose(got, want[name], atol=2e-5)


def test_files_come_back_byte_for_byte(case: Path, tmp_path: Path) -> None:
    save_model(load_model(start_of(case), adapter=case / "final"), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (case / "final" / WEIGHTS).read_bytes()
    written, theirs = (json.loads((d / CONFIG).read_text()) for d in (tmp_path / "out", case / "final"))
    assert written.pop("base_model_name_or_path") == str(start_of(case))
    theirs.pop("base_model_name_or_path")
    assert written == theirs


def test_merged_as_peft_merges(case: Path, tmp_path: Path) -> None:
    adapted = load_model(start_of(case), adapter=case / "final")
    save_model(adapted, tmp_path / "merged", merge=True)
    want = load_file(case / "logits.safetensors")["merged"]
    np.testing.assert_allclose(load_model(tmp_path / "merged")(token_ids()), want, atol=2e-5)
    # Without its adapter it is what it was.
    plain = load_model(start_of(case))
    assert np.array_equal(adapted.base()(token_ids()), plain(token_ids()))


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "dora" else pytest.mark.slow) for c in CASES], indirect=True
)
def test_four_steps_as_trl_trains_them(case: Path, tmp_path: Path) -> None:
    run = json.loads((case / "run.json").read_text())
    trainer = DPOTrainer(
        model=load_model(start_of(case), adapter=case / "initial"),
        ref_model=str(start_of(case)),
        args=DPOConfig(str(tmp_path / "run"), drop_rows=[], **run["options"]),
        train_dataset=tiny.PAIRS["train"][:16],
        processing_class=str(tiny.TOKENIZER),
    )
    trainer.train()
    found = [e for e in trainer.state.log_history if "loss" in e]
    assert len(found) == len(run["log"]) == 4
    for got, want in zip(found, run["log"]):
        for name, value in want.items():
            near = NEAR.get(name.partition("/")[0], {"rel": 1e-12, "abs": 0})
            assert got[name] == pytest.approx(value, **near), (got["step"], name)
    trainer.save_model(str(tmp_path / "out"))
    written, theirs = (load_file(d / WEIGHTS) for d in (tmp_path / "out", case / "final"))
    assert {n: x.shape for n, x in written.items()} == {n: x.shape for n, x in theirs.items()}
    for name, want in theirs.items():
        # Weights move up to 1.25e-2. Where a gradient is next to nothing Adam's direction is rounding: between this run of torch and
        # one in float64 up to one entry in a hundred parts, by at most 7.4e-4.
        apart = np.abs(written[name] - want)
        assert np.quantile(apart, 0.99) <= 2e-5 and apart.max() <= 2e-3, name
    # What is written is what was trained, and rows beyond a layer's rank, which are in the merge and not in the files, are still 0.
    trainer.save_model(str(tmp_path / "merged"), merge=True)
    merged = load_model(tmp_path / "merged")(token_ids())
    np.testing.assert_allclose(load_model(start_of(case), adapter=tmp_path / "out")(token_ids()), merged, atol=2e-5)
    np.testing.assert_allclose(merged, load_file(case / "logits.safetensors")["merged"], atol=2e-3)


def fresh(config: Any, out: Path, **options: Any) -> DPOTrainer:
    return DPOTrainer(
        model=str(START),
        args=DPOConfig(str(out), drop_rows=[], save_strategy="no", gradient_checkpointing=False, **options),
        train_dataset=tiny.PAIRS["train"][:8],
        processing_class=str(tiny.TOKENIZER),
        peft_config=config,
    )


@pytest.mark.parametrize(
    ("case", "bf16"),
    [("dora_layer", False), ("saved", False), pytest.param("dora_layer", True, marks=pytest.mark.slow)],
)
def test_a_fresh_adapter_starts_as_the_base(case: str, bf16: bool, tmp_path: Path) -> None:
    """Loss ln 2, margin and KL 0 before anything has moved: the base is the reference, whatever is trained beside it."""
    config = LoraConfig(**json.loads((KINDS / case / "run.json").read_text())["config"])
    trainer = fresh(config, tmp_path / "run", max_steps=1, learning_rate=1e-2, logging_steps=1, bf16=bf16)
    trainer.train()
    first = next(e for e in trainer.state.log_history if "loss" in e)
    # The norm of a row is computed twice for DoRA, before the run and in the step, where bfloat16 has the weights rounded.
    loss, margin, kl = (2e-3, 1e-2, 1e-5) if bf16 else (5e-6 if config.use_dora else 2e-7, 1e-5, 1e-6)
    assert first["loss"] == pytest.approx(np.log(2), abs=loss)
    assert first["rewards/margins"] == pytest.approx(0, abs=margin) and first["kl_divergence"] <= kl


def test_adapters_do_not_leak_into_each_other() -> None:
    """One base in memory, several adapters on it in turn; each is what it is alone."""
    from jax_dpo.weights.peft import read_adapter

    base = load_model(START)
    plain = np.asarray(base(token_ids()))
    on = {case: base.with_adapter(read_adapter(KINDS / case / "final", base.config)) for case in ("dora", "saved")}
    for case in ("dora", "saved", "dora"):
        want = load_file(KINDS / case / "logits.safetensors")["final"]
        np.testing.assert_allclose(on[case](token_ids()), want, atol=2e-5)
        assert np.array_equal(base(token_ids()), plain)
    with pytest.raises(UserError, match="an adapter already") as caught:
        on["dora"].with_new_adapter(LoraConfig(), 0)
    assert caught.value.name == "adapter-twice"


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_the_head_is_read_and_merged_but_not_trained(dora: bool, tmp_path: Path) -> None:
    """TRL refuses to train it too. Oracle of the logits: those of the merged model."""
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], use_dora=dora, init_lora_weights=False)
    adapted = load_model(START).with_new_adapter(config, 0)
    save_model(adapted, tmp_path / "merged", merge=True)
    got, plain = np.asarray(adapted(token_ids())), load_model(START)(token_ids())
    np.testing.assert_allclose(got, load_model(tmp_path / "merged")(token_ids()), atol=2e-5)
    if not dora:  # whose magnitudes begin as the norms with the adapter on
        assert np.abs(got - plain).max() > 1e-2
    with pytest.raises(UserError, match="modules_to_save") as caught:
        fresh(config, tmp_path / "run", max_steps=1)
    assert caught.value.name == "lora-head"


def test_an_adapter_whose_b_is_random_is_not_held_to_start_as_the_base(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    trainer = fresh(config, tmp_path / "run", max_steps=1, logging_steps=1)
    trainer.train()
    first = next(e for e in trainer.state.log_history if "loss" in e)
    assert first["kl_divergence"] > 1e-6 and first["loss"] != pytest.approx(np.log(2), abs=1e-6)
