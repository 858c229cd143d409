"""A curriculum on several devices. Oracles: one device that accumulates as many micro-batches; the numbers of transformers' classifier."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))

import tiny

from jax_dpo import DPOConfig, DPOTrainer


def test_eight_devices_take_the_pairs_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    monkeypatch.setenv("JAX_DPO_CACHE", str(tmp_path / "cache"))
    gaps = np.random.default_rng(0).permutation(40)
    rows = [
        {**row, "score_chosen": float(g), "score_rejected": 0.0}
        for row, g in zip(tiny.text_rows(40), gaps, strict=True)
    ]
    model = tiny.make_model(tmp_path / "model")
    given = {"train_sampling_strategy": "curriculum", "curriculum_buckets": 5, "per_device_train_batch_size": 1}

    def steps(accumulation: int) -> list[list[int]]:
        args = DPOConfig(str(tmp_path / "out"), gradient_accumulation_steps=accumulation, **given)
        trainer = DPOTrainer(str(model), args=args, train_dataset=rows)
        assert trainer.plan is not None and trainer.plan.pairs_per_step == 16
        return [
            np.concatenate(trainer.engine.groups(trainer.plan.after(k))).tolist() for k in range(trainer.plan.total)
        ]

    assert jax.device_count() == 8
    eight = steps(2)
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    assert steps(16) == eight
    whole = [i for step in eight[:3] for i in step]
    assert [sorted(gaps[whole[8 * b : 8 * b + 8]]) for b in range(5)] == [
        list(range(32 - 8 * b, 40 - 8 * b)) for b in range(5)
    ]


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_reward_model_lies_over_the_devices(tensor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_run_reward_model import BY_REWARD, GOLDEN, NUMBERS, given, rows

    monkeypatch.setenv("JAX_DPO_CACHE", str(tmp_path / "cache"))
    path = Path(shutil.copytree(GOLDEN / "gemma2", tmp_path / "reward"))
    for file in tiny.TOKENIZER.iterdir():
        shutil.copyfile(file, path / file.name)
    assert json.loads((path / "config.json").read_text())["num_key_value_heads"] == 2
    args = DPOConfig(
        str(tmp_path / "out"), **{**BY_REWARD, "curriculum_reward_model": str(path), "mesh_tensor": tensor}
    )
    trainer = DPOTrainer(str(tiny.make_model(tmp_path / "model")), args=args, train_dataset=rows("chat"))
    assert dict(trainer.engine.mesh.shape) == {"data": 1, "fsdp": 8 // tensor, "tensor": tensor}
    np.testing.assert_allclose(given(trainer), NUMBERS["gemma2"]["chat"], rtol=0, atol=1e-4)
