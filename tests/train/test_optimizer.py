"""Schedules and ten steps of each optimizer against the numbers of transformers 5.24, torch 2.13 and bitsandbytes 0.50 (for Lion).

The numbers are made by tests/parity/test_optimizers.py. Clipping by hand.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizer_cases as cases
import pytest
import schedule_cases

from jax_dpo.arrays import flatten, unflatten
from jax_dpo.config import OPTIMIZERS, SCHEDULERS, DPOConfig
from jax_dpo.train import optimizer, schedule
from jax_dpo.trainer.engine import optimizer_options
from jax_dpo.trainer.parts import schedule_options

SCHEDULES = json.loads(schedule_cases.GOLDEN.read_text(encoding="utf-8"))
WEIGHTS = json.loads(cases.GOLDEN.read_text(encoding="utf-8"))


def our_factors(name: str, total: int, warmup: int, kwargs: dict[str, Any]) -> list[float]:
    """Factors of the rate in steps 0 to total + 2."""
    config = DPOConfig(
        "unused", learning_rate=schedule_cases.RATE, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs or None
    )
    made = schedule.schedule(name, total=total, warmup=warmup, options=schedule_options(config))
    return [made(k) for k in range(total + 3)]


@pytest.mark.parametrize("row", SCHEDULES, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_schedules_are_those_of_transformers(row: list[Any]) -> None:
    *given, factors = row
    np.testing.assert_allclose(our_factors(*given), factors, rtol=0, atol=1e-15)


def test_every_schedule_and_optimizer_has_numbers() -> None:
    assert set(SCHEDULERS) == set(schedule.SCHEDULES) == {row[0] for row in SCHEDULES}
    assert [tuple(row[:4]) for row in SCHEDULES] == schedule_cases.CASES
    assert set(OPTIMIZERS) == set(optimizer.OPTIMIZERS)
    assert {case["optim"] for case in cases.CASES.values()} == set(OPTIMIZERS) - {"adamw_torch_fused"}  # adamw_torch's
    assert WEIGHTS.keys() == cases.CASES.keys()


@pytest.mark.parametrize(
    ("warmup", "total", "steps"), [(0, 100, 0), (7, 100, 7), (0.1, 25, 3), (0.999, 10, 10), (1, 10, 1)]
)
def test_warmup_is_steps_or_a_share_rounded_up(warmup: float, total: int, steps: int) -> None:
    assert schedule.warmup_of(warmup, total) == steps


def test_biases_and_norms_do_not_decay() -> None:
    assert tuple(path for path in cases.PARAMS if not optimizer.decays(path)) == cases.KEPT


def ours(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights after the steps, by the optimizer that a run with these options has."""
    params = unflatten({path: jnp.asarray(x) for path, x in cases.start().items()})
    tx = optimizer.make_optimizer(optimizer_options(DPOConfig("unused", **case)), params)
    state = tx.init(params)
    for step, rate in enumerate(cases.RATES):
        updates, state = tx.update(unflatten(cases.gradients(step)), state, params)
        params = jax.tree.map(lambda p, u, rate=rate: p - jnp.float32(rate) * u, params, updates)
    return {path: np.asarray(x) for path, x in flatten(params).items()}


@pytest.mark.parametrize("name", cases.CASES)
def test_ten_steps_are_those_of_torch(name: str) -> None:
    found, start = ours(cases.CASES[name]), cases.start()
    for path, x in found.items():
        want = np.asarray(WEIGHTS[name][path], np.float32)
        np.testing.assert_allclose(x, want, rtol=0, atol=2e-6, err_msg=path)
        assert np.abs(want - start[path]).max() > 1e-3, path


def test_both_names_of_adamw_are_one() -> None:
    case = cases.CASES["adamw"]
    found, fused = ours(case), ours({**case, "optim": "adamw_torch_fused"})
    for path, x in found.items():
        np.testing.assert_array_equal(x, fused[path])


def test_adafactor_keeps_a_row_and_a_column_of_each_matrix() -> None:
    """Two layers of [64, 32] have 2 * (64 + 32) numbers of state, where AdamW has 2 * 2 * 64 * 32."""
    params = unflatten({"model.layers.mlp.up_proj.weight": jnp.zeros((2, 64, 32)), "model.norm.weight": jnp.zeros(32)})
    made = optimizer.make_optimizer(optimizer.OptimizerOptions("adafactor"), params)
    sizes = [x.size for x in jax.tree.leaves(made.init(params))]
    assert sum(sizes) == 1 + 2 * (64 + 32) + 32


@pytest.mark.parametrize("most", [0.5, 1.0, 1e9, 0.0])
def test_clipping_is_torchs(most: float) -> None:
    grads = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([[4.0]])}
    norm = optax.tree.norm(grads)
    assert float(norm) == 5.0
    clipped = optimizer.clip(grads, norm, most)
    factor = min(1.0, most / (5.0 + 1e-6)) if most else 1.0
    np.testing.assert_allclose(clipped["a"], [3.0 * factor, 0.0], rtol=1e-7)
    np.testing.assert_allclose(clipped["b"], [[4.0 * factor]], rtol=1e-7)


def test_a_norm_at_the_bound_is_still_scaled() -> None:
    grads = {"a": jnp.asarray([1e-3])}
    clipped = optimizer.clip(grads, jnp.float32(1e-3), 1e-3)
    np.testing.assert_allclose(clipped["a"], 1e-3 * (1e-3 / (1e-3 + 1e-6)), rtol=1e-6)


def test_adam_s_bias_correction_is_exact_from_the_first_step_on() -> None:
    """Under a constant gradient both corrected moments are the gradient and its square, at every step: u = g / (|g| + eps)."""
    grads = {"a": jnp.asarray([1.0, -0.25, 3e-4], jnp.float32)}
    made = optimizer.make_optimizer(optimizer.OptimizerOptions(), grads)
    state = made.init(grads)
    want = np.asarray(grads["a"], np.float64)
    for _ in range(30):
        found, state = made.update(grads, state, grads)
        np.testing.assert_allclose(found["a"], want / (np.abs(want) + 1e-8), rtol=1e-6)
