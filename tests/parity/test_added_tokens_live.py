"""Models and adapters with added tokens, as transformers and PEFT read them. Oracle: their logits, in torch."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))

import tiny

pytestmark = pytest.mark.parity
IDS = [[512, 3, 5, 513, 201, 512, 7]]


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.float().numpy()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("lora", [False, True])
def test_what_is_written_loads_with_its_rows(family: str, lora: bool, tmp_path: Path) -> None:
    """qwen3 ties its head to its embedding. What is trained was moved at random."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jax_dpo import DPOConfig, DPOTrainer, LoraConfig, save_model
    from jax_dpo.weights.leaves import InMemory

    args = DPOConfig("unused", added_special_tokens=["<|turn|>", "<|stop|>"], eos_token="<|stop|>")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None
    trainer = DPOTrainer(str(tiny.make_model(tmp_path / "model", family)), args=args, peft_config=config)
    policy, random = trainer.model, np.random.default_rng(0)
    spec = policy.config.lora
    moved = {p: x.read() for p, x in policy.leaves.items() if spec is None or spec.trains(p)}
    moved = {p: InMemory((x + 0.02 * random.normal(size=x.shape)).astype(np.float32)) for p, x in moved.items()}
    policy = replace(policy, leaves={**policy.leaves, **moved})
    save_model(policy, tmp_path / "final", tokenizer_files=trainer.tokenizer.files)
    save_model(policy, tmp_path / "merged", tokenizer_files=trainer.tokenizer.files, merge=True)
    ours = np.asarray(policy(np.array(IDS)))
    reader = peft.AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    np.testing.assert_allclose(
        torch_logits(reader.from_pretrained(str(tmp_path / "final"), dtype=torch.float32)), ours, atol=2e-5
    )
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    np.testing.assert_allclose(torch_logits(merged), ours, atol=2e-5)
    assert merged.config.vocab_size == 514
    assert 513 in merged.generation_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "final"))
    assert (tokenizer.eos_token_id, len(tokenizer)) == (513, 514)


def test_new_rows_are_those_of_transformers_without_its_noise(tmp_path: Path) -> None:
    """The noise has 1e-9 of the covariance: for entries of 0.15, a standard deviation of 5e-6."""
    pytest.importorskip("torch")
    import torch
    from transformers import AutoModelForCausalLM

    from jax_dpo import load_model

    where = tiny.make_model(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(str(where), dtype=torch.float32)
    theirs.resize_token_embeddings(515)
    ours = load_model(where).with_rows(515)
    for path, table in (
        ("model.embed_tokens.weight", theirs.get_input_embeddings()),
        ("lm_head.weight", theirs.get_output_embeddings()),
    ):
        np.testing.assert_allclose(ours.leaves[path].read(), table.weight.detach().numpy(), atol=5e-5)
