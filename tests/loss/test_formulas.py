"""Every loss against its formula, written again in numpy, in float64 to 1e-9. Derivatives by the complex step (W. Squire, G. Trapp, SIAM
Review 40, 1998), which has no rounding of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_dpo.loss.aot import AOT_TYPES
from jax_dpo.loss.family import FAMILIES, LossOptions, mixed_loss, pair_loss
from jax_dpo.loss.scores import Given, PairSums

PAIRS = 24
RNG = np.random.default_rng(7)
BETA, KL_COEF = 0.15, 0.6
REF = RNG.normal(-30, 6, (PAIRS, 2))
# Log-ratios near 0 and far out, on both sides.
LOGP = REF + np.concatenate([RNG.normal(0, 1, (8, 2)), RNG.normal(0, 8, (8, 2)), RNG.normal(0, 40, (8, 2))])
KL = RNG.gamma(1.0, 4.0, (PAIRS, 2))
TOKENS = RNG.integers(1, 40, (PAIRS, 2))
# What columns of the data say: beta as a multiple, margins of both signs, labels with both ends, weights with 0.
COLUMNS = {
    "beta": RNG.uniform(0.2, 4.0, PAIRS),
    "margin": RNG.normal(0.5, 1.0, PAIRS),
    "label": np.concatenate([[0.0, 1.0, 0.5], RNG.uniform(0, 1, PAIRS - 3)]),
    "weight": np.concatenate([[0.0, 1.0], RNG.uniform(0, 3, PAIRS - 2)]),
}
LENGTH = TOKENS + RNG.integers(0, 2, (PAIRS, 1))  # an answer without a prompt counts a token that is not scored

Array = np.ndarray


def ls(z: Array) -> Array:
    """log sigmoid, of complex numbers too."""
    small = np.exp(-np.where(z.real > 0, z, -z))
    return np.where(z.real > 0, 0, z) - np.log(1 + small)


def s(z: Array) -> Array:
    return np.exp(ls(z))


PHI: dict[str, Callable[[Array, float], Array]] = {
    "reverse_kl": lambda r, c: r,
    "forward_kl": lambda r, c: 1 - np.exp(-r),
    "js_divergence": lambda r, c: np.log(2) + ls(r),
    "alpha_divergence": lambda r, c: (np.exp((c - 1) * r) - 1) / (c - 1),
}


def plain(name: str, x: dict[str, Array], o: dict[str, Any]) -> Array:
    """One value a pair: `x` has a, b, u, v, n+ and n-."""
    a, b, u, v, n, m = (x[k] for k in ("a", "b", "u", "v", "n+", "n-"))
    columns = o.get("columns", ())
    B, e = BETA * (COLUMNS["beta"] if "beta" in columns else 1), o.get("label_smoothing", 0.0)
    z, half = B * (u - v), 1 / (2 * B)
    mean = u / n - v / m
    offset = COLUMNS["margin"] if "margin" in columns else 0
    doubt = 1 - COLUMNS["label"] if "label" in columns else e if o.get("smooth_sigmoid") else 0.0
    label = lambda z: -(1 - doubt) * ls(z - offset) - doubt * ls(offset - z)  # noqa: E731
    if name == "robust":
        return (-(1 - e) * ls(z) + e * ls(-z)) / (1 - 2 * e)
    if name == "exo_pair":
        return s(z) * (ls(z) - np.log(1 - e)) + (1 - s(z)) * (ls(-z) - np.log(e))
    if name == "discopop":
        m = s(z / o.get("discopop_tau", 0.05))
        return -ls(z) * (1 - m) + np.exp(-z) * m
    return {
        "sigmoid": lambda: label(z),
        "sigmoid_norm": lambda: label(B * mean),
        "hinge": lambda: np.where(z.real < 1 + offset, 1 + offset - z, 0),
        "ipo": lambda: (mean - half) ** 2,
        "nca_pair": lambda: -ls(B * a) - ls(-B * a) / 2 - ls(-B * b) / 2,
        "bco_pair": lambda: -ls(B * a) - ls(-B * b),
        "sppo_hard": lambda: (a - half) ** 2 + (b + half) ** 2,
        "apo_zero": lambda: 1 - s(B * a) + s(B * b),
        "apo_down": lambda: s(B * a) + 1 - s(B * (a - b)),
        "sft": lambda: 0 * a,
        "aot": lambda: 0 * a,
        "aot_unpaired": lambda: 0 * a,
    }[name]()


INSIDE = {"sigmoid", "sigmoid_norm", "hinge", "bco_pair", "apo_zero"}


def penalised(names: list[str], weights: list[float], o: dict[str, Any], logp: Array, kl: Array) -> Array:
    """Each pair's loss with its KL penalty: in the scores for those of `INSIDE`, unless the labels are doubted; else beside the loss."""
    tokens = TOKENS.sum(1) if o.get("kl_reduction", "token") == "token" else 1
    down, up = (KL_COEF * kl[:, side] / tokens for side in (0, 1))
    a, b = (logp - REF).T
    phi = PHI[o.get("f_divergence", "reverse_kl")]
    u, v = (phi(r, o.get("f_alpha", 0.5)) for r in (a, b))
    total = np.zeros(PAIRS)
    for name, weight in zip(names, weights):
        x = {"a": a, "b": b, "u": u, "v": v, "n+": LENGTH[:, 0], "n-": LENGTH[:, 1]}
        unsure = o.get("smooth_sigmoid") or "label" in o.get("columns", ())
        doubted = unsure and name in ("sigmoid", "sigmoid_norm")
        inside = name in INSIDE and not doubted
        if inside:
            n, m = (LENGTH.T) if name == "sigmoid_norm" else (1, 1)
            x |= {"a": a - down, "b": b + up, "u": u - n * down, "v": v + m * up}
        B = BETA * (COLUMNS["beta"] if "beta" in o.get("columns", ()) else 1)
        total = total + weight * (plain(name, x, o) + (0 if inside else B * (down + up)))
    return total * COLUMNS["weight"] if "weight" in o.get("columns", ()) else total


def case(*names: str, weights: list[float] | None = None, **options: Any) -> Any:
    label = "+".join(names) + "".join(f";{k}={v}" for k, v in options.items())
    return pytest.param(list(names), weights or [1.0] * len(names), options, id=label)


CASES = [
    *(case(name) for name in (*FAMILIES, "sft", *AOT_TYPES) if name not in ("robust", "exo_pair")),
    *(case(name, label_smoothing=e) for name in ("robust", "exo_pair") for e in (0.001, 0.1, 0.4)),
    *(case(name, label_smoothing=0.1, smooth_sigmoid=True) for name in ("sigmoid", "sigmoid_norm")),
    case("sigmoid", label_smoothing=0.1),
    *(
        case(name, f_divergence=kind, **({"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {}))
        for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust")
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
    case("sigmoid", f_divergence="alpha_divergence", f_alpha=1.5),
    case("discopop", discopop_tau=0.5),
    *(case(name, kl_reduction="sequence") for name in ("sigmoid", "sigmoid_norm", "ipo", "sft")),
    case("sigmoid", "bco_pair", "sft", weights=[0.8, 0.2, 1.0]),
    case("sigmoid", "sigmoid", weights=[0.5, 0.25]),
    *(case(name, columns=("beta", "margin", "label", "weight")) for name in ("sigmoid", "sigmoid_norm")),
    *(case("sigmoid", columns=(column,)) for column in COLUMNS),
    case("sigmoid", "sft", columns=("margin", "weight"), weights=[1.0, 0.5]),
    case("hinge", columns=("beta", "margin", "weight")),
    *(
        case(name, columns=("beta", "weight"), label_smoothing=0.1)
        for name in ("ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sft")
    ),
    case("discopop", columns=("beta",)),
]


def ours(names: list[str], weights: list[float], o: dict[str, Any], logp: Array, kl: Array) -> tuple[Array, ...]:
    """(loss of each pair, derivatives of their sum by the log-probabilities and by the KL), in float64."""
    options = LossOptions(types=tuple(names), weights=tuple(weights), **o)

    def total(logp: jax.Array, kl: jax.Array) -> tuple[jax.Array, jax.Array]:
        zero = jnp.zeros((1, PAIRS, 2))
        sums = PairSums(logp[None], jnp.asarray(REF)[None], kl[None], jnp.asarray(TOKENS)[None] * 1.0, *[zero] * 4)
        given = Given(**{name: jnp.asarray(COLUMNS[name])[None] for name in options.columns})
        length, beta, coef = jnp.asarray(LENGTH)[None], jnp.float64(BETA), jnp.float64(KL_COEF)
        each = pair_loss(sums, length, beta, coef, options, given)[0]
        return jnp.sum(each), each

    with jax.enable_x64(True):
        by, each = jax.grad(total, argnums=(0, 1), has_aux=True)(jnp.asarray(logp), jnp.asarray(kl))
        return np.asarray(each), *(np.asarray(x) for x in by)


@pytest.mark.parametrize(("names", "weights", "options"), CASES)
def test_values_and_derivatives(names: list[str], weights: list[float], options: dict[str, Any]) -> None:
    # Far out the exponentials of these have no finite square; there they are tested against TRL's numbers.
    grows = options.get("f_divergence") in ("forward_kl", "alpha_divergence") or "discopop" in names
    spread = 0.2 if grows else 1.0
    logp = REF + spread * (LOGP - REF)
    found = ours(names, weights, options, logp, KL)
    near = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(found[0], penalised(names, weights, options, logp, KL), **near)
    step = 1e-30
    for side in (0, 1):
        tilt = np.zeros((PAIRS, 2), complex)
        tilt[:, side] = 1j * step
        by_logp = penalised(names, weights, options, logp + tilt, KL).imag / step
        by_kl = penalised(names, weights, options, logp, KL + tilt).imag / step
        np.testing.assert_allclose(found[1][:, side], by_logp, **near)
        np.testing.assert_allclose(found[2][:, side], by_kl, **near)


@pytest.mark.parametrize(("names", "weights", "options"), CASES)
def test_more_divergence_never_lowers_a_loss(names: list[str], weights: list[float], options: dict[str, Any]) -> None:
    """dL/dK >= 0 on a grid of both log-ratios; the largest K moves a score by 12."""
    kl = np.array([0.0, 0.5, 20.0])[np.arange(PAIRS) % 3][:, None] * TOKENS.sum(1, keepdims=True) * [1.0, 0.0]
    spread = np.linspace(-60, 60, PAIRS)
    for other in (-45.0, -3.0, 0.0, 0.5, 30.0):
        for logp in (np.stack([spread, np.full(PAIRS, other)], 1), np.stack([np.full(PAIRS, other), spread], 1)):
            *_, by_kl = ours(names, weights, options, REF + logp, kl)
            assert (by_kl >= 0).all() and np.isfinite(by_kl).all()


@pytest.mark.parametrize("name", AOT_TYPES)
def test_sorted_losses_to_1e_9(name: str) -> None:
    """Three groups of 8 pairs with label_smoothing; TRL's numbers and the gradient are in test_aot and test_trl_bare."""
    with jax.enable_x64(True):
        sums = PairSums(*(jnp.asarray(x)[None] for x in (LOGP, REF, KL, TOKENS, *[np.zeros((PAIRS, 2))] * 4)))
        place = np.arange(PAIRS)
        group = jnp.asarray(np.stack([place // 8, place % 8], -1))[None]
        options = LossOptions(types=(name,), label_smoothing=0.1)
        found = float(mixed_loss(sums, group, jnp.full((1, PAIRS), 1 / PAIRS), jnp.float64(BETA), options))
    want = 0.0
    for i in range(0, PAIRS, 8):
        pi, ref = LOGP[i : i + 8], REF[i : i + 8]
        x, y = (pi @ [1, -1], ref @ [1, -1]) if name == "aot" else (pi - ref).T
        z = BETA * (np.sort(x) - np.sort(y))
        want += float((-0.9 * ls(z) - 0.1 * ls(-z)).sum()) / PAIRS
    assert found == pytest.approx(want, rel=1e-9)
