"""A mixture of experts: tokens laid out in blocks against every expert on every token, forward and backward."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_dpo.ops.experts import api, grouped


def inputs(
    N: int, k: int, E: int, D: int = 12, F: int = 20, skew: float = 0.0, dtype: str = "float32"
) -> tuple[Any, ...]:
    """x, shares and matrices, and choices of which `skew` go to expert 1; every fifth token is padding."""
    rng = np.random.default_rng([N, k, E])
    make = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)  # noqa: E731
    chosen = np.stack([rng.permutation(E)[:k] for _ in range(N)]).astype(np.int32)
    crowded = rng.random(N) < skew
    chosen[crowded] = (np.arange(k) + 1) % E
    chosen[::5] = E
    share = jnp.asarray(rng.random((N, k)), jnp.float32)
    return make(N, D), jnp.asarray(chosen), share, make(E, F, D), make(E, F, D), make(E, D, F)


SIZES = [(1, 1, 2, 0.0), (50, 2, 4, 0.0), (64, 2, 8, 1.0), (200, 3, 5, 0.7), (40, 8, 16, 0.0)]


@pytest.mark.parametrize(("N", "k", "E", "skew"), SIZES)
def test_blocks_are_every_expert_on_every_token(N: int, k: int, E: int, skew: float) -> None:
    """No token is dropped, however many one expert gets."""
    x, chosen, share, *matrices = inputs(N, k, E, skew=skew)
    g = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)

    def loss(name: str, x: jax.Array, share: jax.Array, *matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = api.mixture(x, chosen, share, *matrices, act=jax.nn.silu, implementation=name)
        return jnp.sum(y * g), y

    both = [
        jax.jit(jax.grad(partial(loss, name), argnums=range(5), has_aux=True))(x, share, *matrices)
        for name in ("grouped", "reference")
    ]
    for got, want in zip(*(jax.tree.leaves(found) for found in both), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * float(jnp.max(jnp.abs(want)) + 1))
    assert not np.asarray(both[0][1])[::5].any()


@pytest.mark.parametrize(("N", "k", "E", "skew"), SIZES)
def test_layout_names_every_choice_once(N: int, k: int, E: int, skew: float) -> None:
    chosen = np.asarray(inputs(N, k, E, skew=skew)[1])
    found = jax.tree.map(np.asarray, grouped.layout(jnp.asarray(chosen), E))
    P, B = found.item.size, found.item.size // found.expert.size
    for token, choice in np.ndindex(N, k):
        place = found.place[token, choice]
        if chosen[token, choice] == E:
            assert place == P
        else:
            assert found.item[place] == token * k + choice and found.expert[place // B] == chosen[token, choice]
    assert np.sum(found.item < N * k) == np.sum(chosen < E)
    filled = np.bincount(chosen[chosen < E], minlength=E)
    assert np.all(found.rows % B == 0) and np.all((found.rows - filled >= 0) & (found.rows - filled < B))


def test_ragged_dot_makes_the_same_products() -> None:
    """What a TPU does; here JAX makes plain products of it, so the numbers can be looked at."""
    x, chosen, _, gate, _, down = inputs(120, 2, 6)
    plan = grouped.layout(chosen, 6)
    laid = jnp.take(x, plan.item // 2, axis=0, mode="fill", fill_value=0)
    filled = np.arange(laid.shape[0]) < int(jnp.sum(plan.rows))
    for turned, w in ((False, gate), (True, down)):
        same = [f(laid, w, plan, turned) for f in (grouped._ragged, grouped._loop)]
        np.testing.assert_allclose(same[0][filled], same[1][filled], rtol=1e-5, atol=1e-5)
    other = jnp.cos(jnp.arange(laid.shape[0] * 7.0)).reshape(-1, 7)
    sums = [f(laid, other, plan) for f in (grouped._ragged_weights, grouped._loop_weights)]
    np.testing.assert_allclose(*sums, rtol=1e-5, atol=1e-5)


def test_work_is_that_of_the_chosen_experts() -> None:
    """At most an empty block an expert on top of the choices, and nothing for padding; padded groups would be E / k times the work."""
    chosen = np.tile(np.arange(2, dtype=np.int32), (2048, 1))
    for real in (2048, 100):
        chosen[real:] = 8
        rows = int(jnp.sum(grouped.layout(jnp.asarray(chosen), 8).rows))
        assert 2 * real <= rows < 2 * real + 2 * grouped.block_rows(4096, 8)


def test_a_frozen_base_costs_no_gradient_of_its_matrices() -> None:
    x, chosen, share, *matrices = inputs(64, 2, 4)
    run = lambda x: jnp.sum(api.mixture(x, chosen, share, *matrices, act=jax.nn.silu) ** 2)  # noqa: E731
    loops = lambda f, *args: len(re.findall(r" while\(", jax.jit(f).lower(*args).compile().as_text()))  # noqa: E731
    trained = lambda x, *w: jnp.sum(api.mixture(x, chosen, share, *w, act=jax.nn.silu) ** 2)  # noqa: E731
    more = loops(jax.grad(trained, argnums=(0, 1, 2, 3)), x, *matrices)
    assert loops(jax.grad(run), x) == more - 3


def test_bfloat16_sums_in_float32() -> None:
    wide = inputs(300, 2, 4)
    x, chosen, share, *matrices = inputs(300, 2, 4, dtype="bfloat16")
    got = jax.jit(partial(api.mixture, act=jax.nn.silu))(x, chosen, share, *matrices)
    want = api.mixture(*wide, act=jax.nn.silu, implementation="reference")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0.02, atol=0.02 * float(jnp.max(jnp.abs(want))))
