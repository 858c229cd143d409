"""PEFT and TRL themselves against their recorded numbers, and against this package: adapters and models go both ways."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent))

import peft_numbers as numbers

pytestmark = pytest.mark.parity
CASES = sorted(numbers.CASES)
WEIGHTS = "adapter_model.safetensors"


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(numbers.token_ids())).logits.float().numpy()


def torch_base(case: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(numbers.start_of(case)), dtype=torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_numbers_are_what_peft_and_trl_compute(case: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    numbers.write_case(case, tmp_path)
    then, now = (json.loads((d / "run.json").read_text()) for d in (numbers.KINDS / case, tmp_path))
    for before, after in zip(then["log"], now["log"], strict=True):
        assert after == pytest.approx(before, rel=1e-5, abs=1e-5)
    for name in ("initial", "merged"):
        old, new = (load_file(d / "logits.safetensors")[name] for d in (numbers.KINDS / case, tmp_path))
        np.testing.assert_allclose(new, old, atol=2e-5 if name == "initial" else 2e-3)


def test_the_recorded_targets_are_pefts() -> None:
    pytest.importorskip("peft")
    recorded = json.loads((numbers.KINDS / "targets.json").read_text())
    assert recorded == [json.loads(json.dumps(numbers.adapted(*case))) for case in numbers.TARGETS]


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_written_here(case: str, tmp_path: Path) -> None:
    """An adapter that was begun here, moved at random, and written: logits in PEFT, and merged there and here."""
    peft = pytest.importorskip("peft")
    from dataclasses import replace

    from jax_dpo import LoraConfig, load_model, save_model
    from jax_dpo.weights.leaves import InMemory
    from jax_dpo.weights.peft import pieces

    policy = load_model(numbers.start_of(case)).with_new_adapter(
        LoraConfig(**copy.deepcopy(numbers.CASES[case])), seed=1
    )
    assert policy.config.lora is not None
    moved = {path: leaf.read() for path, leaf in policy.leaves.items() if policy.config.lora.trains(path)}
    for piece in pieces(policy.config.lora, policy.config):
        moved[piece.path][piece.part] += 0.05 * numbers.random_for(piece.name, piece.shape)
    policy = replace(policy, leaves={**policy.leaves, **{path: InMemory(x) for path, x in moved.items()}})
    save_model(policy, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(torch_base(case), str(tmp_path / "adapter"))
    np.testing.assert_allclose(policy(numbers.token_ids()), torch_logits(theirs), atol=2e-5)
    save_model(policy, tmp_path / "merged", merge=True)
    merged = load_model(tmp_path / "merged")(numbers.token_ids())
    np.testing.assert_allclose(merged, torch_logits(theirs.merge_and_unload()), atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_peft_model_in_memory_is_taken_as_it_is(case: str) -> None:
    """Also the configuration object; a second adapter on it changes nothing."""
    peft = pytest.importorskip("peft")
    from jax_dpo import LoraConfig, load_model

    model = peft.PeftModel.from_pretrained(torch_base(case), str(numbers.KINDS / case / "initial"))
    if "modules_to_save" not in numbers.CASES[case]:
        model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    got = load_model(model)
    np.testing.assert_allclose(got(numbers.token_ids()), torch_logits(model), atol=2e-5)
    want = load_model(numbers.start_of(case), adapter=numbers.KINDS / case / "initial")
    assert got.config == want.config
    given = LoraConfig.of(peft.LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(numbers.CASES[case])))
    ours = load_model(numbers.start_of(case)).with_new_adapter(LoraConfig(**copy.deepcopy(numbers.CASES[case])), 0)
    assert load_model(numbers.start_of(case)).with_new_adapter(given, 0).config == ours.config
