"""Schedules against values that transformers 5.24 gave, AdamW against torch's formula in float64 numpy, clipping by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_dpo.arrays import flatten, unflatten
from jax_dpo.config import SCHEDULERS, DPOConfig
from jax_dpo.train import optimizer
from jax_dpo.trainer.parts import schedule_options

RATE = 1e-3
# (name, steps, warm-up, lr_scheduler_kwargs, factors of steps 0, 1, ...) from transformers.optimization.get_scheduler.
# fmt: off
TABLE: list[tuple[str, int, int, dict[str, Any], list[float]]] = [
    ("linear", 10, 3, {}, [0.0, 0.333333333, 0.666666667, 1.0, 0.857142857, 0.714285714, 0.571428571, 0.428571429, 0.285714286,
                           0.142857143, 0.0, 0.0]),
    ("linear", 6, 0, {}, [1.0, 0.833333333, 0.666666667, 0.5, 0.333333333, 0.166666667, 0.0, 0.0]),
    ("cosine", 10, 3, {}, [0.0, 0.333333333, 0.666666667, 1.0, 0.950484434, 0.811744901, 0.611260467, 0.388739533, 0.188255099,
                           0.049515566, 0.0, 0.049515566]),
    ("cosine", 10, 3, {"num_cycles": 1.5}, [0.0, 0.333333333, 0.666666667, 1.0, 0.611260467, 0.049515566, 0.188255099,
                                            0.811744901, 0.950484434, 0.388739533, 0.0, 0.388739533]),
    ("cosine_with_restarts", 12, 2, {"num_cycles": 2}, [0.0, 0.5, 1.0, 0.904508497, 0.654508497, 0.345491503, 0.095491503, 1.0,
                                                        0.904508497, 0.654508497, 0.345491503, 0.095491503, 0.0, 0.0]),
    ("cosine_with_min_lr", 10, 3, {"min_lr_rate": 0.1}, [0.0, 0.333333333, 0.666666667, 1.0, 0.955435991, 0.830570411, 0.65013442,
                                                         0.44986558, 0.269429589, 0.144564009, 0.1, 0.144564009]),
    ("cosine_with_min_lr", 10, 3, {"min_lr": 0.0002}, [0.0, 0.333333333, 0.666666667, 1.0, 0.960387547, 0.849395921, 0.689008374,
                                                       0.510991626, 0.350604079, 0.239612453, 0.2, 0.239612453]),
    ("polynomial", 10, 3, {}, [0.0, 0.333333333, 0.666666667, 1.0, 0.857157143, 0.714314286, 0.571471429, 0.428628571, 0.285785714,
                               0.142942857, 0.0001, 0.0001]),
    ("polynomial", 10, 3, {"power": 2.0, "lr_end": 0.0001}, [0.0, 0.333333333, 0.666666667, 1.0, 0.76122449, 0.559183673,
                                                             0.393877551, 0.265306122, 0.173469388, 0.118367347, 0.1, 0.1]),
    ("constant", 6, 3, {}, [1.0] * 8),
    ("constant_with_warmup", 6, 3, {}, [0.0, 0.333333333, 0.666666667, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ("inverse_sqrt", 10, 3, {}, [0.0, 0.333333333, 0.666666667, 1.0, 0.866025404, 0.774596669, 0.707106781, 0.654653671, 0.612372436,
                                 0.577350269, 0.547722558, 0.522232968]),
    ("inverse_sqrt", 6, 0, {}, [1.0, 0.999950004, 0.999900015, 0.999850034, 0.99980006, 0.999750094, 0.999700135, 0.999650184]),
    ("inverse_sqrt", 8, 2, {"timescale": 5}, [0.0, 0.5, 1.0, 0.912870929, 0.845154255, 0.790569415, 0.745355992, 0.707106781,
                                              0.674199862, 0.645497224]),
    ("warmup_stable_decay", 10, 3, {"num_decay_steps": 4}, [0.0, 0.333333333, 0.666666667, 1.0, 1.0, 1.0, 1.0, 0.853553391, 0.5,
                                                            0.146446609, 0.0, 0.0]),
    ("warmup_stable_decay", 10, 4,
     {"num_decay_steps": 4, "min_lr_ratio": 0.2, "warmup_type": "cosine", "decay_type": "linear"},
     [0.2, 0.317157288, 0.6, 0.882842712, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
    ("warmup_stable_decay", 10, 4,
     {"num_decay_steps": 3, "num_stable_steps": 1, "min_lr_ratio": 0.1, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"},
     [0.1, 0.220577137, 0.363603897, 0.55, 1.0, 1.0, 0.480384758, 0.265153077, 0.1, 0.1, 0.1, 0.1]),
    ("warmup_stable_decay", 10, 3, {"num_decay_steps": 4, "min_lr_ratio": 0.25},
     [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.890165043, 0.625, 0.359834957, 0.25, 0.25]),
]
# fmt: on


@pytest.mark.parametrize(("name", "total", "warmup", "kwargs", "factors"), TABLE)
def test_schedules_are_those_of_transformers(
    name: str, total: int, warmup: int, kwargs: dict[str, Any], factors: list[float]
) -> None:
    config = DPOConfig("unused", learning_rate=RATE, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs)
    made = optimizer.schedule(name, total=total, warmup=warmup, options=schedule_options(config))
    np.testing.assert_allclose([made(k) for k in range(len(factors))], factors, rtol=0, atol=6e-10)


def test_every_schedule_is_in_the_table() -> None:
    assert set(SCHEDULERS) == set(optimizer.SCHEDULES) == {row[0] for row in TABLE}


@pytest.mark.parametrize(
    ("warmup", "total", "steps"), [(0, 100, 0), (7, 100, 7), (0.1, 25, 3), (0.999, 10, 10), (1, 10, 1)]
)
def test_warmup_is_steps_or_a_share_rounded_up(warmup: float, total: int, steps: int) -> None:
    assert optimizer.warmup_of(warmup, total) == steps


PARAMS = {
    "model.embed_tokens.weight": (5, 4),
    "model.layers.self_attn.q_proj.weight": (2, 4, 4),
    "model.layers.self_attn.q_proj.bias": (2, 4),
    "model.layers.self_attn.q_proj.lora_a": (2, 3, 4),
    "model.layers.self_attn.q_norm.weight": (2, 4),
    "model.layers.input_layernorm.weight": (2, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (5, 4),
}
KEPT = ("model.layers.self_attn.q_proj.bias", "model.layers.self_attn.q_norm.weight")
KEPT += ("model.layers.input_layernorm.weight", "model.norm.weight")


def test_biases_and_norms_do_not_decay() -> None:
    assert tuple(path for path in PARAMS if not optimizer.decays(path)) == KEPT


def _by_hand(params, grads, rates, b1, b2, eps, decay):
    """torch.optim.AdamW in float64: p *= 1 - lr wd; p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)."""
    params = {path: x.astype(np.float64) for path, x in params.items()}
    m, v = ({path: np.zeros_like(x) for path, x in params.items()} for _ in range(2))
    for t, (grad, rate) in enumerate(zip(grads, rates), 1):
        for path, p in params.items():
            g = grad[path].astype(np.float64)
            m[path] = b1 * m[path] + (1 - b1) * g
            v[path] = b2 * v[path] + (1 - b2) * g * g
            shrunk = p * (1 - rate * (0 if path in KEPT else decay))
            params[path] = shrunk - rate / (1 - b1**t) * m[path] / (np.sqrt(v[path]) / np.sqrt(1 - b2**t) + eps)
    return params


@pytest.mark.parametrize(("b1", "b2", "eps", "decay"), [(0.9, 0.999, 1e-8, 0.1), (0.8, 0.95, 1e-2, 0.0)])
def test_adamw_is_torchs(b1: float, b2: float, eps: float, decay: float) -> None:
    rng = np.random.default_rng(0)
    draw = lambda: {path: rng.standard_normal(shape).astype(np.float32) for path, shape in PARAMS.items()}  # noqa: E731
    start, grads, rates = draw(), [draw() for _ in range(6)], [0.0, 0.01, 0.02, 0.015, 0.01, 0.003]
    params = unflatten({path: jnp.asarray(x) for path, x in start.items()})
    tx = optimizer.adamw(params, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    state = tx.init(params)
    for grad, rate in zip(grads, rates):
        updates, state = tx.update(unflatten(grad), state, params)
        params = jax.tree.map(lambda p, u, rate=rate: p - jnp.float32(rate) * u, params, updates)
    want = _by_hand(start, grads, rates, b1, b2, eps, decay)
    for path, x in flatten(params).items():
        np.testing.assert_allclose(x, want[path], rtol=0, atol=1e-6, err_msg=path)
        moved = np.abs(want[path] - start[path]).max()
        assert moved > 1e-3, path


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
