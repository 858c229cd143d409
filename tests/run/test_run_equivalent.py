"""One trajectory, however it is computed: the same pairs at each step give the same numbers and the same weights.

The oracle is the run with every option at its default on one device. Float32 sums in another order differ by some 1e-6 of their size, and
Adam carries that into the weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

# {what differs: options}. Pairs a step stay 8, and with them what TRL would train on.
ALONE: dict[str, dict[str, Any]] = {
    "prompt not shared": {"share_prompt": False},
    "no packing": {"packing": False},
    "reference path": {"kernels": "reference"},
    "rematerialised": {"gradient_checkpointing": True},
    "many micro-batches": {"micro_batch_tokens": 32},
    "one micro-batch of TRL's": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "four micro-batches of TRL's": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "longer rows": {"pad_to_multiple_of": 96},
    "all at once": {
        "share_prompt": False,
        "packing": False,
        "kernels": "reference",
        "gradient_checkpointing": True,
        "micro_batch_tokens": 32,
    },
}
# On eight devices, one pair on each. Two key-value heads: tensor goes up to 2.
ONE_EACH = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
SPREAD: dict[str, dict[str, Any]] = {
    "eight devices": ONE_EACH,
    "eight devices, tensor and data": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "mesh_data": 2,
        "mesh_fsdp": 2,
        "mesh_tensor": 2,
    },
    "eight devices, no packing, reference path": {**ONE_EACH, "packing": False, "kernels": "reference"},
}
EXACT = ("num_tokens", "learning_rate", "epoch", "beta")
NOT_COMPARED = {*tiny.TIMING, "row_fill", "kind", "mfu"}


@pytest.fixture(scope="module")
def quick_compile() -> None:
    """Compiled as for a user: the numbers are compared to their rounding, and sums that are not vectorized round more."""


@pytest.fixture(scope="module")
def options(evaluated: dict[str, Any]) -> dict[str, Any]:
    return {
        **evaluated,
        "max_steps": 3,
        "save_strategy": "no",
        "kl_coef": 1.0,
        "weight_decay": 0.1,
        "adam_epsilon": 1e-6,
    }


@pytest.fixture(scope="module")
def plain(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "out"
    assert tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", out).code == 0
    return out


def flat(value: Any, name: str) -> dict[str, Any]:
    """{dotted name: number} of what is nested; an empty place counts as -1."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: x for key, part in parts for k, x in flat(part, f"{name}.{key}" if name else str(key)).items()}
    return {name: -1 if value is None else value}


def check_same(got: Path, want: Path) -> None:
    for kind in ("train", "eval"):
        found, expected = ([flat(r, "") for r in tiny.records(out, kind)] for out in (got, want))
        assert len(found) == len(expected) > 0
        for a, b in zip(found, expected):
            assert set(a) == set(b)
            for name in set(b) - NOT_COMPARED:
                if name.removeprefix("eval_") in EXACT:
                    assert a[name] == b[name], name
                else:
                    assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-6), f"{kind} {b['step']} {name}"
    weights, others = tiny.tensors(want / "final"), tiny.tensors(got / "final")
    assert set(weights) == set(others)
    for name, weight in weights.items():
        np.testing.assert_allclose(others[name], weight, rtol=0, atol=2e-6, err_msg=name)


# Each compiles a step of its own; "all at once" has most of the first ones in it.
SLOW = (
    "longer rows",
    "one micro-batch of TRL's",
    "rematerialised",
    "no packing",
    "prompt not shared",
    "reference path",
)


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in ALONE])
def test_one_device(case: str, options: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tiny.jax_dpo("train", *tiny.flags({**options, **ALONE[case]}), "--output_dir", out).code == 0
    check_same(out, plain)
    row_fill = {r["row_fill"] for r in tiny.records(out, "train")}
    if "packing" in ALONE[case]:
        assert max(row_fill) < min(r["row_fill"] for r in tiny.records(plain, "train")), "a row holds one pair"


@pytest.mark.slow
@pytest.mark.parametrize("case", SPREAD)
def test_eight_devices(case: str, options: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "jax_dpo",
        "train",
        *tiny.flags({**options, **SPREAD[case]}),
        "--output_dir",
        str(out),
    ]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    ended = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert tiny.records(out, "start")[0]["devices"]["count"] == 8
    check_same(out, plain)
