"""Token statistics: float64 numpy is the oracle of the values, automatic differentiation of whole logits that of the gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_dpo.arrays import TokenStats
from jax_dpo.ops.token_stats import api, chunked, dense, reference


def inputs(V: int = 97, D: int = 12, R: int = 2, K: int = 5, spread: float = 1.0):
    rng = np.random.default_rng(V)
    make = lambda *s: jnp.asarray(rng.standard_normal(s) * spread, jnp.float32)  # noqa: E731
    target = np.array(rng.integers(0, V, (R, K)), np.int32)
    target[0, 0], target[-1, -1] = 0, V - 1
    return make(R, K, D), make(R, K, D), make(V, D), make(V, D), jnp.asarray(target)


def by_hand(h, h_ref, w, w_ref, target, softcap=None, scale=1.0):
    """The definitions in float64."""
    out = []
    for hidden, weight in ((h, w), (h_ref, w_ref)):
        z = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T * scale
        z = z if softcap is None else softcap * np.tanh(z / softcap)
        top = z.max(-1, keepdims=True)
        out.append((z, z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))))
    (z, log_pi), (_, log_ref) = out
    pi = np.exp(log_pi)
    pick = lambda x: np.take_along_axis(x, np.asarray(target)[..., None], -1)[..., 0]  # noqa: E731
    return (
        pick(log_pi),
        pick(log_ref),
        (pi * (log_pi - log_ref)).sum(-1),
        -(pi * log_pi).sum(-1),
        z.mean(-1),
        np.log((pi**2).sum(-1)),
        (z.argmax(-1) == np.asarray(target)).astype(float),
    )


def two_shards(h, h_ref, w, w_ref, target, **options):
    cut = lambda w: None if w is None else w.reshape(2, w.shape[0] // 2, -1)  # noqa: E731
    return chunked.token_stats(h, h_ref, cut(w), cut(w_ref), target, chunk=10, **options)


VERSIONS = {
    "reference": reference.token_stats,
    "dense": dense.token_stats,
    "one chunk": partial(chunked.token_stats, chunk=1000),
    "chunks that do not divide": partial(chunked.token_stats, chunk=16),
    "two shards": two_shards,
}


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (4.0, 1.0), (None, 0.25)])
@pytest.mark.parametrize("tied", [False, True])
def test_values(name: str, softcap: float | None, scale: float, tied: bool) -> None:
    h, h_ref, w, w_ref, target = inputs(V=98)
    got = jax.jit(partial(VERSIONS[name], softcap=softcap, scale=scale))(h, h_ref, w, None if tied else w_ref, target)
    want = by_hand(h, h_ref, w, w if tied else w_ref, target, softcap, scale)
    for field, a, b in zip(got._fields, got, want):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=2e-5, err_msg=field)


@pytest.mark.parametrize("name", [n for n in VERSIONS if n != "reference"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_whole_logits(name: str, softcap: float | None, tied: bool) -> None:
    h, h_ref, w, w_ref, target = inputs(V=98)
    rng = np.random.default_rng(1)
    g, c = (jnp.asarray(rng.standard_normal(target.shape), jnp.float32) for _ in range(2))

    def loss(version, h, h_ref, w, w_ref):
        stats = version(h, h_ref, w, None if tied else w_ref, target, softcap=softcap)
        # Everything without a gradient is added too: it must add nothing to the gradients.
        rest = stats.entropy + stats.mean_logit + stats.log_sum_sq + stats.top1 + stats.ref_logp
        return jnp.sum(stats.logp * g + stats.kl * c + rest)

    grad = lambda version: jax.jit(jax.grad(partial(loss, version), argnums=(0, 1, 2, 3)))(h, h_ref, w, w_ref)  # noqa: E731
    got, want = grad(VERSIONS[name]), grad(reference.token_stats)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)
    assert not np.asarray(got[1]).any()


@pytest.mark.parametrize("name", [n for n in VERSIONS if n != "reference"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        pytest.param("float32", {"softcap": 6.0}, marks=pytest.mark.slow),
        pytest.param("float32", {"scale": 0.3}, marks=pytest.mark.slow),
    ],
)
def test_equal_models_are_equal_to_the_bit(name: str, tied: bool, dtype: str, options: dict[str, float]) -> None:
    """Differentiated or not: a last bit that differs in a normaliser is lost in sums of log-probabilities, but not in the KL."""
    h, _, w, _, target = inputs(V=98, D=16, R=3, K=33)
    h, w = h.astype(dtype), w.astype(dtype)
    same = jnp.copy(h), None if tied else jnp.copy(w)

    def stats(h, w, h_ref, w_ref):
        found = VERSIONS[name](h, h_ref, w, w_ref, target, **options)
        return jnp.sum(found.logp) + jnp.sum(found.kl), found

    plain = jax.jit(stats)(h, w, *same)[1]
    (_, trained), _ = jax.jit(jax.value_and_grad(stats, argnums=(0, 1), has_aux=True))(h, w, *same)
    for found in (plain, trained):
        np.testing.assert_array_equal(found.logp, found.ref_logp)
        np.testing.assert_array_equal(found.kl, 0.0)


def test_a_tie_goes_to_the_lowest_id() -> None:
    h, w = jnp.ones((1, 2, 1)), jnp.asarray([[0.5], [2.0], [2.0], [1.0]])
    target = jnp.asarray([[1, 2]])
    for version in (
        reference.token_stats,
        partial(chunked.token_stats, chunk=2),
        partial(chunked.token_stats, chunk=1),
    ):
        np.testing.assert_array_equal(version(h, h, w, None, target).top1, [[1.0, 0.0]])


@pytest.mark.slow
def test_huge_logits_stay_finite() -> None:
    h, h_ref, w, w_ref, target = inputs(V=98, spread=60.0)
    for version in VERSIONS.values():
        stats = version(h, h_ref, w, w_ref, target)
        assert all(np.isfinite(np.asarray(x)).all() for x in stats)


def test_bfloat16_weights_are_summed_in_float32() -> None:
    h, h_ref, w, w_ref, target = (
        x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in inputs(V=512, D=64, spread=0.5)
    )
    for version in (reference.token_stats, partial(chunked.token_stats, chunk=100)):
        got = version(h, h_ref, w, w_ref, target)
        want = by_hand(*(x.astype(jnp.float32) for x in (h, h_ref, w, w_ref)), target)
        np.testing.assert_allclose(got.logp, want[0], atol=1e-4)
        np.testing.assert_allclose(got.kl, want[2], atol=1e-4)


def test_large_inputs_take_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    h, h_ref, w, w_ref, target = inputs(V=98)
    monkeypatch.setattr(api, "DENSE_BYTES", 100)
    text = str(jax.make_jaxpr(lambda *a: api.token_stats(*a))(h, h_ref, w, w_ref, target))
    assert "scan" in text


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (4.0, 0.5)])
def test_the_policy_alone_has_the_numbers_it_has_beside_a_reference(
    name: str, softcap: float | None, scale: float
) -> None:
    """Without a reference there is no KL and no ref_logp; everything else, and the gradient of logp, stay as they are."""
    h, h_ref, w, w_ref, target = inputs(V=96)
    stats = partial(VERSIONS[name], softcap=softcap, scale=scale)
    want, alone = stats(h, h_ref, w, w_ref, target), stats(h, None, w, None, target)
    assert alone.kl is None and alone.ref_logp is None
    for field in ("logp", "entropy", "mean_logit", "log_sum_sq", "top1"):
        np.testing.assert_allclose(getattr(alone, field), getattr(want, field), rtol=1e-6, atol=1e-6, err_msg=field)
    pull = jnp.asarray(np.random.default_rng(3).standard_normal(target.shape), jnp.float32)
    both = jax.grad(lambda h, w: jnp.sum(pull * stats(h, h_ref, w, w_ref, target).logp), argnums=(0, 1))(h, w)
    one = jax.grad(lambda h, w: jnp.sum(pull * stats(h, None, w, None, target).logp), argnums=(0, 1))(h, w)
    for a, b in zip(one, both):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", VERSIONS)
def test_a_reference_may_have_another_width(name: str) -> None:
    h, _, w, _, target = inputs(V=96)
    _, h_ref, _, w_ref, _ = inputs(V=96, D=20)
    found = VERSIONS[name](h, h_ref, w, w_ref, target)
    for field, want in zip(TokenStats._fields, by_hand(h, h_ref, w, w_ref, target)):
        np.testing.assert_allclose(getattr(found, field), want, rtol=2e-5, atol=2e-5, err_msg=field)
    public = api.token_stats(h, h_ref, w, w_ref, target)
    np.testing.assert_allclose(public.kl, found.kl, rtol=2e-5, atol=2e-5)
