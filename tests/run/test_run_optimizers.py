"""Runs with each optimizer through the command line. Oracle of a resumed run: the one that went through, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

CASES: dict[str, dict[str, Any]] = {
    "adafactor": {"optim": "adafactor"},
    "adafactor-lora": {"optim": "adafactor", "use_peft": True, "lora_r": 2, "learning_rate": 5e-3},
    "lion": {"optim": "lion_32bit", "learning_rate": 1e-4, "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "learning_rate": 0.05},
}


@pytest.mark.parametrize(
    "name", [name if name == "adafactor" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_run_learns_and_goes_on_to_the_bit(name: str, usual: dict[str, Any], tmp_path: Path) -> None:
    options = tiny.flags({**usual, **CASES[name]})
    ended = tiny.jax_dpo("train", *options, "--output_dir", tmp_path / "through")
    assert ended.code == 0, ended.err
    losses = [r["loss"] for r in tiny.records(tmp_path / "through", "train")]
    assert losses[-1] < losses[0] == pytest.approx(np.log(2), abs=2e-7)
    checkpoint = tmp_path / "through" / "checkpoint-2"
    ended = tiny.jax_dpo("train", *options, "--output_dir", tmp_path / "again", "--resume_from_checkpoint", checkpoint)
    assert ended.code == 0, ended.err
    again = tiny.untimed(tiny.records(tmp_path / "again", "train"))
    assert again == tiny.untimed(tiny.records(tmp_path / "through", "train"))[2:]
    file = "adapter_model.safetensors" if "use_peft" in CASES[name] else "model.safetensors"
    through, resumed = (tiny.tensors(tmp_path / run / "final", file) for run in ("through", "again"))
    for path, x in through.items():
        np.testing.assert_array_equal(resumed[path], x, err_msg=path)


def test_a_checkpoint_of_another_optimizer_is_refused(usual: dict[str, Any], tmp_path: Path) -> None:
    options = {**usual, "max_steps": 2}
    assert tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", tmp_path / "out").code == 0
    other = tiny.flags({**options, "max_steps": 4, "optim": "adafactor"})
    ended = tiny.jax_dpo("train", *other, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "true")
    assert ended.code == 2
    assert "written by a run with another model, LoRA, dtype, optimizer or beta_dpo_alpha" in ended.err
