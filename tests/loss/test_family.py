"""Losses on given pairs: TRL's table of values (float64, by hand), the KL penalty's sign and its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_dpo.loss.dynamic_beta import batch_beta, next_threshold
from jax_dpo.loss.family import FAMILIES, LossOptions, pair_loss
from jax_dpo.loss.scores import PairSums

LOGP = np.array([[-12.0, -15.0], [-30.5, -28.0], [-7.25, -9.0]])
REF = np.array([[-13.0, -14.0], [-30.0, -29.5], [-7.25, -8.0]])
LENGTH = np.array([[6, 8], [12, 10], [4, 5]])

# Per pair, from the formulas in float64: three pairs with log-ratios (1, -1), (-0.5, 1.5), (0, -1), beta 0.1.
KNOWN = {
    "sigmoid": (0.598139, 0.798139, 0.644397),
    "hinge": (0.8, 1.2, 0.9),
    "ipo": (22.168403, 26.953403, 23.04),
    "nca_pair": (1.338793, 1.438168, 1.361919),
    "bco_pair": (1.288793, 1.489417, 1.337544),
    "sppo_hard": (32.0, 72.5, 41.0),
    "apo_zero": (0.950042, 1.049927, 0.975021),
    "apo_down": (0.975145, 1.037337, 0.975021),
    "discopop": (0.814763, 0.805752, 0.873792),
    "sigmoid_norm": (0.67867, 0.702776, 0.683197),
    "exo_pair;label_smoothing=0.001": (2.422015, 3.110397, 2.589954),
    "robust;label_smoothing=0.1": (0.573139, 0.823139, 0.631897),
    "sigmoid;f_divergence=forward_kl": (0.582517, 0.766965, 0.610919),
    "sigmoid;f_divergence=js_divergence": (0.644397, 0.732526, 0.662622),
    "sigmoid;f_divergence=alpha_divergence": (0.594349, 0.777603, 0.630378),
}


def sums(logp=LOGP, kl=None) -> PairSums:
    array = lambda x: jnp.asarray(x, jnp.float32)[None]  # noqa: E731
    zero = np.zeros_like(LOGP)
    return PairSums(
        logp=array(logp),
        ref_logp=array(REF),
        kl=array(zero if kl is None else kl),
        tokens=array(LENGTH),
        entropy=array(zero),
        mean_logit=array(zero),
        top1=array(zero),
        wpo=array(zero),
    )


def options_of(name: str, **more) -> LossOptions:
    loss, *rest = name.split(";")
    given = dict(x.split("=") for x in rest)
    return LossOptions(
        types=(loss,),
        label_smoothing=float(given.get("label_smoothing", 0.0)),
        f_divergence=given.get("f_divergence", "reverse_kl"),
        **more,
    )


def loss(name: str, s: PairSums, kl_coef: float = 0.0, **more) -> jax.Array:
    length = jnp.asarray(LENGTH)[None]
    return pair_loss(s, length, jnp.float32(0.1), jnp.float32(kl_coef), options_of(name, **more))[0]


@pytest.mark.parametrize("name", KNOWN)
def test_values(name: str) -> None:
    np.testing.assert_allclose(loss(name, sums()), KNOWN[name], rtol=2e-5)


def test_a_list_is_the_weighted_sum_of_its_terms() -> None:
    both = LossOptions(types=("sigmoid", "bco_pair"), weights=(0.8, 0.25))
    got = pair_loss(sums(), jnp.asarray(LENGTH)[None], jnp.float32(0.1), jnp.float32(0.0), both)[0]
    np.testing.assert_allclose(got, 0.8 * loss("sigmoid", sums()) + 0.25 * loss("bco_pair", sums()), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_penalty_of_sigmoid_is_the_formula(reduction: str) -> None:
    kl = np.array([[0.5, 0.25], [1.0, 2.0], [0.0, 0.125]])
    a = LOGP - REF
    k = kl.sum(1) / (1 if reduction == "sequence" else LENGTH.sum(1))
    want = np.log1p(np.exp(-(0.1 * (a[:, 0] - a[:, 1]) - 0.1 * 0.7 * k)))
    np.testing.assert_allclose(loss("sigmoid", sums(kl=kl), 0.7, kl_reduction=reduction), want, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_more_divergence_never_lowers_a_loss(name: str, reduction: str) -> None:
    full = name + (";label_smoothing=0.1" if name in ("exo_pair", "robust") else "")
    for shift in np.linspace(-40, 40, 17):
        moved = LOGP + np.array([shift, -0.5 * shift])
        grad = jax.grad(lambda kl, at=moved: loss(full, sums(at, kl), 0.5, kl_reduction=reduction).sum())(
            jnp.ones(LOGP.shape)
        )
        assert (np.asarray(grad) >= 0).all(), (name, shift)


def test_weighting_multiplies_and_has_no_gradient() -> None:
    wpo = np.array([[-3.0, -2.0], [-6.0, 1.0], [0.5, 0.0]])
    s = sums()._replace(wpo=jnp.asarray(wpo, jnp.float32)[None])
    factor = np.exp((wpo / LENGTH).sum(1))
    np.testing.assert_allclose(loss("sigmoid", s, use_weighting=True), factor * loss("sigmoid", s), rtol=1e-5)
    grad = jax.grad(lambda w: loss("sigmoid", s._replace(wpo=w), use_weighting=True).sum())(s.wpo)
    assert not np.asarray(grad).any()


def test_alpha_divergence_beyond_its_clamp_has_gradient_zero() -> None:
    moved = LOGP + np.array([-500.0, 0.0])
    grad = jax.grad(lambda x: loss("sigmoid;f_divergence=alpha_divergence", sums()._replace(logp=x)).sum())(
        jnp.asarray(moved, jnp.float32)[None]
    )
    assert np.isfinite(np.asarray(grad)).all()


@pytest.mark.parametrize(
    ("name", "z", "limit"),
    [
        # (log-ratio of chosen, of rejected), and the loss there; TRL 1.16 gives NaN in value or gradient.
        ("sigmoid;f_divergence=forward_kl", (303.0, -297.0), 0.0),
        ("hinge;f_divergence=forward_kl", (303.0, -297.0), 0.0),
        ("exo_pair;f_divergence=forward_kl;label_smoothing=0.01", (303.0, -297.0), -np.log(0.99)),
        ("exo_pair;f_divergence=forward_kl;label_smoothing=0.01", (-588.0, 12.0), -np.log(0.01)),
        ("discopop", (-5900.0, 12.0), 591.2),
    ],
)
def test_where_only_a_part_overflows_the_loss_is_its_limit(name: str, z: tuple[float, float], limit: float) -> None:
    far = REF + np.array(z)
    each = lambda x: loss(name, sums()._replace(logp=x))  # noqa: E731
    value, grad = jax.value_and_grad(lambda x: each(x).sum())(jnp.asarray(far, jnp.float32)[None])
    np.testing.assert_allclose(value, 3 * limit, rtol=1e-6)
    slope = -0.1 if name == "discopop" else 0.0
    np.testing.assert_allclose(grad[0], np.tile([slope, -slope], (3, 1)), atol=1e-7)


@pytest.mark.parametrize(
    ("margin", "threshold", "want"),
    # beta 0.1 and alpha 0.6: 0.1 (1 + 0.6 (0.1 margin - threshold)), but not below a tenth of 0.1.
    [(0.0, 0.0, 0.1), (20.0, 0.5, 0.19), (-5.0, 0.5, 0.04), (-40.0, 1.0, 0.01)],
)
def test_the_beta_of_a_batch(margin: float, threshold: float, want: float) -> None:
    of = lambda m: batch_beta(jnp.float32(0.1), m, jnp.float32(threshold), 0.6)  # noqa: E731
    value, slope = jax.value_and_grad(of)(jnp.float32(margin))
    assert float(value) == pytest.approx(want, rel=1e-6) and slope == 0
    after = next_threshold(jnp.float32(threshold), jnp.float32(0.1), jnp.float32(margin), 0.9)
    assert float(after) == pytest.approx(0.9 * threshold + 0.1 * 0.1 * margin, abs=1e-7)


def test_an_infinite_loss_is_not_hidden() -> None:
    far = jnp.asarray(REF + np.array([-588.0, 12.0]), jnp.float32)[None]
    assert np.isinf(loss("sigmoid;f_divergence=forward_kl", sums()._replace(logp=far))).all()
