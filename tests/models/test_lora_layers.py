"""A linear layer with an adapter. Oracle: PEFT's formula written out in float64, of masks that jax draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_dpo.models.families import model_config
from jax_dpo.models.layers import Linear, dora_factor
from jax_dpo.models.lora import LoraConfig
from jax_dpo.models.lora_targets import lora_spec

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
HEAD = "lm_head"


def layer(**options: Any) -> tuple[Linear, dict[str, np.ndarray]]:
    """The head, which is not stacked, with random numbers."""
    config = model_config(json.loads((GOLDEN / "models" / "llama" / "config.json").read_text()))
    spec = lora_spec(LoraConfig(r=3, lora_alpha=7, target_modules=[HEAD], **options), config)
    made = Linear(replace(config, lora=spec), HEAD)
    random = np.random.default_rng(0)
    values = {}
    for name in ("weight", "lora_a", "lora_b", *(["lora_magnitude"] if spec.use_dora else [])):
        variable = getattr(made, name)
        values[name] = random.standard_normal(variable[...].shape).astype(np.float32)
        variable[...] = jnp.asarray(values[name])
    return made, {name: x.astype(np.float64) for name, x in values.items()}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_output_is_pefts_formula(dora: bool, dropped: bool) -> None:
    """DoRA under dropout: x W^T + (m/n - 1) x' W^T + m/n s B A x', where x' alone is dropped out."""
    made, v = layer(use_dora=dora, lora_dropout=0.4)
    x = np.random.default_rng(1).standard_normal((2, 5, v["weight"].shape[1])).astype(np.float32)
    key = jax.random.key(3) if dropped else None
    kept = np.ones(x.shape)
    if key is not None:
        kept = np.asarray(jax.random.bernoulli(jax.random.fold_in(key, made.dropout_id), 0.6, x.shape)) / 0.6
        assert 0.2 < (kept == 0).mean() < 0.6
    scale, part = 7 / 3, x * kept
    low = scale * part @ v["lora_a"].T @ v["lora_b"].T
    want = x @ v["weight"].T + low
    if dora:
        whole = v["weight"] + scale * v["lora_b"] @ v["lora_a"]
        factor = v["lora_magnitude"] / np.linalg.norm(whole, axis=1)
        want = x @ v["weight"].T + (factor - 1) * (part @ v["weight"].T) + factor * low
    np.testing.assert_allclose(made(jnp.asarray(x), key), want, atol=2e-4, rtol=1e-5)


def test_the_norm_is_a_constant_of_the_gradient() -> None:
    """Section 4.3 of the paper. Oracle: the gradient of the formula with the norm put in as a number."""
    made, v = layer(use_dora=True)
    graph, state = nnx.split(made)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 4, v["weight"].shape[1])), jnp.float32)
    w = {name: jnp.asarray(value, jnp.float32) for name, value in v.items()}
    norm = jnp.linalg.norm(w["weight"] + 7 / 3 * w["lora_b"] @ w["lora_a"], axis=1)

    def plain(p: dict[str, jax.Array]) -> jax.Array:
        whole = w["weight"] + 7 / 3 * p["lora_b"] @ p["lora_a"]
        return jnp.sum(jnp.sin(x @ ((p["lora_magnitude"] / norm)[:, None] * whole).T))

    def ours(p: dict[str, jax.Array]) -> jax.Array:
        pure = nnx.to_pure_dict(state) | p
        return jnp.sum(jnp.sin(nnx.merge(graph, pure)(x)))

    trained = {name: w[name] for name in ("lora_a", "lora_b", "lora_magnitude")}
    want, got = jax.grad(plain)(trained), jax.grad(ours)(trained)
    for name, g in want.items():
        assert np.linalg.norm(got[name] - g) <= 1e-4 * np.linalg.norm(g), name


def test_a_row_of_length_zero_is_left_alone() -> None:
    """A magnitude of 0 (a layer without an adapter, or a row of zeros) has the factor 1 and no gradient."""
    w, a, b = jnp.zeros((2, 3)), jnp.ones((1, 3)), jnp.zeros((2, 1))
    of = lambda m: jnp.sum(dora_factor(w, a, b, m, 1.0))  # noqa: E731
    value, gradient = jax.value_and_grad(of)(jnp.zeros(2))
    assert value == 2.0 and not gradient.any()
