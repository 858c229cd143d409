"""Tree attention: bounds against the definition of the tree, the chunked version against plain softmax, both directions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_dpo.ops.attention import api, chunked, reference
from jax_dpo.ops.attention.bounds import tree_bounds, visible


def random_trees(rng: np.random.Generator, T: int, branches: int, fill: float = 0.9) -> tuple[np.ndarray, ...]:
    """One row of trees, some with an empty prompt or an empty branch."""
    pair, branch, position = np.zeros(T, np.int32), np.zeros(T, np.int32), np.zeros(T, np.int32)
    at, number = 0, 1
    while at < fill * T:
        sizes = [int(rng.integers(0, 9))] + [int(rng.integers(0, 7)) for _ in range(branches)]
        if sum(sizes) == 0 or at + sum(sizes) > T:
            break
        for b, size in enumerate(sizes):
            pair[at : at + size] = number
            branch[at : at + size] = b
            position[at : at + size] = np.arange(size) + (sizes[0] if b else 0)
            at += size
        number += 1
    return pair, branch, position


def defined_mask(pair: np.ndarray, branch: np.ndarray, position: np.ndarray, window: int | None) -> np.ndarray:
    """The definition, one query and one key at a time."""
    T = len(pair)
    mask = np.zeros((T, T), bool)
    for q in range(T):
        for k in range(q + 1):
            same = pair[q] == pair[k] != 0 and (branch[k] == 0 or branch[k] == branch[q])
            mask[q, k] = same and (window is None or position[q] - position[k] < window)
    return mask


@pytest.mark.parametrize("T", [1, 7, 64, 130])
@pytest.mark.parametrize("branches", [0, 1, 2, 5])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 17, 1000])
def test_bounds_are_the_definition(T: int, branches: int, window: int | None) -> None:
    rng = np.random.default_rng(T * 100 + branches * 10 + (window or 0))
    rows = [random_trees(rng, T, branches) for _ in range(4)] + [tuple(np.zeros((3, T), np.int32))]
    pair, branch, position = (np.stack(x) for x in zip(*rows))
    got = visible(tree_bounds(jnp.asarray(pair), jnp.asarray(branch), window), jnp.arange(T), jnp.arange(T))
    for r in range(len(rows)):
        np.testing.assert_array_equal(np.asarray(got[r]), defined_mask(pair[r], branch[r], position[r], window))


def inputs(T: int, N: int, G: int, H: int, dtype: str = "float32"):
    rng = np.random.default_rng(0)
    rows = [random_trees(rng, T, 2), random_trees(rng, T, 3), tuple(np.zeros((3, T), np.int32))]
    pair, branch, _ = (jnp.asarray(np.stack(x)) for x in zip(*rows))
    make = lambda heads: jnp.asarray(rng.standard_normal((3, T, heads, H)), dtype)  # noqa: E731
    return make(N), make(G), make(G), make(N), pair, branch


@pytest.mark.parametrize("T", [5, pytest.param(64, marks=pytest.mark.slow), 200])
@pytest.mark.parametrize(("N", "G"), [(4, 4), (9, 3), (4, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, None), (None, 5.0), (7, 2.0)])
def test_chunked_equals_plain_softmax_forward_and_backward(T, N, G, window, softcap) -> None:
    q, k, v, weight, pair, branch = inputs(T, N, G, 8)
    bounds = tree_bounds(pair, branch, window)
    options = dict(scale=0.35, softcap=softcap)

    def run(attention):
        def loss(q, k, v):
            out = attention(q, k, v, bounds, **options)
            return jnp.sum(out * weight), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    for got, want in zip(run(chunked.attention), run(reference.attention)):
        np.testing.assert_allclose(got, want, atol=5e-6)


def test_padding_gives_exact_zeros_and_no_gradient() -> None:
    q, k, v, weight, pair, branch = inputs(96, 4, 2, 8)
    bounds = tree_bounds(pair, branch)

    def loss(q, k, v):
        return jnp.sum(chunked.attention(q, k, v, bounds, scale=0.3) * weight)

    pad = np.asarray(pair) == 0
    assert pad.any()
    out = np.asarray(chunked.attention(q, k, v, bounds, scale=0.3))
    assert (out[pad] == 0).all()
    for grad in jax.grad(loss, argnums=(0, 1, 2))(q, k, v):
        assert (np.asarray(grad)[pad] == 0).all()


def test_bfloat16_stays_near_float32() -> None:
    q, k, v, _, pair, branch = inputs(128, 4, 2, 16, "bfloat16")
    bounds = tree_bounds(pair, branch)
    got = chunked.attention(q, k, v, bounds, scale=0.25)
    assert got.dtype == jnp.bfloat16
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    np.testing.assert_allclose(got.astype(jnp.float32), reference.attention(*wide, bounds, scale=0.25), atol=2e-2)


def test_huge_scores_stay_finite() -> None:
    q, k, v, _, pair, branch = inputs(64, 2, 2, 8)
    out = api.attention(q * 1e4, k * 1e4, v, tree_bounds(pair, branch), scale=1.0)
    assert np.isfinite(np.asarray(out)).all()


@pytest.mark.slow
def test_no_square_buffer_is_kept_for_the_backward() -> None:
    """Between forward and backward the memory grows with T, not with its square."""

    def residuals(T: int) -> int:
        q, k, v, _, pair, branch = inputs(T, 2, 1, 4)
        bounds = tree_bounds(pair, branch)
        _, pullback = jax.vjp(lambda q, k, v: chunked.attention(q, k, v, bounds, scale=1.0), q, k, v)
        return sum(x.size for x in jax.tree.leaves(pullback))

    assert residuals(512) < 2.2 * residuals(256)
