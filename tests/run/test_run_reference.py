"""Which model a policy is held against, for every way of naming one. Oracle: log-probabilities in float64 from the logits of the two models
that are meant, each run on its own; those logits are held to transformers' in tests/weights and tests/models."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jax_dpo.arrays import flatten

BETA = 0.1
GGUF = tiny.GOLDEN / "gguf" / "llama-Q4_1.gguf"


class Tensor:
    """What a torch tensor offers, as far as it is read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype, self.shape = array, "torch.float32", array.shape

    detach = float = cpu = lambda self: self

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(np.asarray(self.array[index]))

    def numpy(self) -> np.ndarray:
        return self.array


class ModelObject:
    """A model of transformers, by what it offers."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoConfig

        self.name_or_path, self.config = str(directory), AutoConfig.from_pretrained(str(directory))
        self.tensors = {name: Tensor(x) for name, x in load_file(directory / "model.safetensors").items()}

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors


def make_adapter(folder: Path, base: Path, seed: int) -> Path:
    """A trained adapter in PEFT's files: both matrices of q_proj and down_proj differ from 0."""
    random, weights = np.random.default_rng(seed), {}
    for layer in range(2):
        for name, (out, into) in {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 64)}.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            weights[path + ".lora_A.weight"] = random.normal(0, 0.3, (2, into)).astype(np.float32)
            weights[path + ".lora_B.weight"] = random.normal(0, 0.3, (out, 2)).astype(np.float32)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    for file in tiny.TOKENIZER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


class Models(NamedTuple):
    base: Path
    other: Path
    qwen: Path
    one: Path
    """an adapter on `base`"""
    two: Path
    """another one"""


@pytest.fixture(scope="module")
def models(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("references")
    other, qwen = tiny.make_model(folder / "other", seed=3), tiny.make_model(folder / "qwen", "qwen3", seed=4)
    return Models(model, other, qwen, *(make_adapter(folder / f"adapter{i}", model, i) for i in (1, 2)))


@cache
def logprobs(source: Path, adapter: Path | None, rows: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Log-probabilities [B, T-1, V] of equally long rows, float64."""
    from jax_dpo import load_model

    z = np.asarray(load_model(source, adapter=adapter)(np.array(rows)), np.float64)[:, :-1]
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def expected(pairs: Any, policy: tuple[Path, Path | None], reference: tuple[Path, Path | None]) -> dict[str, float]:
    """Rewards, loss and exact KL by their definitions."""
    sides, kl, tokens = [], 0.0, 0
    for side in ("chosen_ids", "rejected_ids"):
        rows = tuple(tuple(p["prompt_ids"]) + tuple(p[side]) for p in pairs)
        start = len(pairs[0]["prompt_ids"]) - 1
        pi, ref = (logprobs(*which, rows)[:, start:] for which in (policy, reference))
        target = np.array(rows)[:, start + 1 :, None]
        sides.append(BETA * np.take_along_axis(pi - ref, target, -1).sum((1, 2)))
        kl, tokens = kl + float((np.exp(pi) * (pi - ref)).sum()), tokens + target.size
    chosen, rejected = sides
    return {
        "eval_rewards/chosen": chosen.mean(),
        "eval_rewards/rejected": rejected.mean(),
        "eval_loss": np.log1p(np.exp(-(chosen - rejected))).mean(),
        "eval_kl_divergence": kl / tokens,
    }


class Case(NamedTuple):
    """Arguments of DPOTrainer, and which (model, adapter) is policy and which reference."""

    arguments: Callable[[Models], dict[str, Any]]
    policy: Callable[[Models], tuple[Path, Path | None]]
    reference: Callable[[Models], tuple[Path, Path | None]]


def _loaded(path: Any, adapter: Any = None) -> Any:
    from jax_dpo import load_model

    return load_model(path, adapter=adapter)


def _fresh() -> Any:
    from jax_dpo import LoraConfig

    return LoraConfig(r=2, lora_dropout=0.0)


BASE = lambda m: (m.base, None)  # noqa: E731
OTHER = lambda m: (m.other, None)  # noqa: E731
ONE = lambda m: (m.base, m.one)  # noqa: E731
CASES = {
    "the policy's start": Case(lambda m: {"model": str(m.base)}, BASE, BASE),
    "the policy's own directory": Case(lambda m: {"model": str(m.base), "ref_model": str(m.base)}, BASE, BASE),
    "the start of an object": Case(lambda m: {"model": ModelObject(m.base)}, BASE, BASE),
    "another directory": Case(lambda m: {"model": str(m.base), "ref_model": str(m.other)}, BASE, OTHER),
    "a model in hand": Case(lambda m: {"model": str(m.base), "ref_model": _loaded(m.other)}, BASE, OTHER),
    "a transformers object": Case(lambda m: {"model": str(m.base), "ref_model": ModelObject(m.other)}, BASE, OTHER),
    "another family": Case(lambda m: {"model": str(m.base), "ref_model": str(m.qwen)}, BASE, lambda m: (m.qwen, None)),
    "a GGUF file": Case(lambda m: {"model": str(m.base), "ref_model": str(GGUF)}, BASE, lambda m: (GGUF, None)),
    "the start of a GGUF file": Case(
        lambda m: {"model": str(GGUF), "processing_class": str(tiny.TOKENIZER)},
        lambda m: (GGUF, None),
        lambda m: (GGUF, None),
    ),
    "the adapter that came": Case(lambda m: {"model": _loaded(m.base, m.one)}, ONE, ONE),
    "the adapter's directory": Case(lambda m: {"model": str(m.one)}, ONE, ONE),
    "the base that is named": Case(lambda m: {"model": _loaded(m.base, m.one), "ref_model": str(m.base)}, ONE, BASE),
    "another adapter": Case(
        lambda m: {"model": _loaded(m.base, m.one), "ref_model": str(m.two)}, ONE, lambda m: (m.base, m.two)
    ),
    "another model than the adapter's": Case(
        lambda m: {"model": _loaded(m.base, m.one), "ref_model": str(m.other)}, ONE, OTHER
    ),
    "a fresh adapter's base": Case(lambda m: {"model": str(m.base), "peft_config": _fresh()}, BASE, BASE),
    "a fresh adapter and another model": Case(
        lambda m: {"model": str(m.base), "peft_config": _fresh(), "ref_model": str(m.other)}, BASE, OTHER
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_against_the_reference_that_is_meant(name: str, models: Models, data: Path, tmp_path: Path) -> None:
    from jax_dpo import DPOConfig, DPOTrainer

    case = CASES[name]
    args = DPOConfig(str(tmp_path / "out"), beta=BETA, gradient_checkpointing=False)
    trainer = DPOTrainer(args=args, eval_dataset=str(data / "eval.jsonl"), **case.arguments(models))
    found = trainer.evaluate()
    policy, reference = case.policy(models), case.reference(models)
    want = expected(list(trainer.eval_sets[None].pairs.rows()), policy, reference)
    for metric, value in want.items():
        assert found[metric] == pytest.approx(value, abs=2e-5, rel=2e-5), metric
    if policy == reference:
        assert found["eval_rewards/margins"] == found["eval_kl_divergence"] == 0
    else:
        assert want["eval_kl_divergence"] > 0.01


@pytest.mark.parametrize("name", ["the policy's start", "another directory", "the adapter that came"])
def test_training_leaves_the_reference_as_it_is(
    name: str, usual: dict[str, Any], models: Models, data: Path, tmp_path: Path
) -> None:
    from jax_dpo import DPOConfig, DPOTrainer

    options = {k: v for k, v in usual.items() if k not in ("model_name_or_path", "dataset_name")}
    args = DPOConfig(str(tmp_path / "out"), **{**options, "max_steps": 2, "save_strategy": "no"})
    files = {path: tiny.snapshot(path) for path in (models.base, models.other, models.one)}
    trainer = DPOTrainer(args=args, train_dataset=str(data / "train.jsonl"), **CASES[name].arguments(models))
    trainer._load()
    before = {p: np.array(x) for p, x in flatten(trainer._frozen._asdict()).items()}
    start = {p: np.array(x) for p, x in flatten(trainer._device_state.params).items()}
    trainer.train()
    after = {p: np.array(x) for p, x in flatten(trainer._frozen._asdict()).items()}
    assert before.keys() == after.keys() and any(p.startswith("reference.") for p in after)
    assert all(np.array_equal(before[p], after[p]) for p in before)
    trained = {p: np.array(x) for p, x in flatten(trainer._device_state.params).items()}
    assert not any(np.array_equal(start[p], trained[p]) for p in start)
    assert {path: tiny.snapshot(path) for path in files} == files
