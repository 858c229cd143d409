"""Scaling an update back. Oracles: curves whose KL is known in closed form, and what must hold whatever the curve is."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_dpo.train.trust_region import (
    MOST_TRIES,
    OVERSHOOT,
    UNKNOWN,
    Accepted,
    along_update,
    first_share,
    limit_of,
    next_first,
    next_rate,
    ratio_of,
    spread_over,
    toward_start,
)

Curve = Callable[[jax.Array], jax.Array]
Go = Callable[..., Accepted]


def taken(go: Go, curve: Curve, now: float | None, limit: float) -> Accepted:
    known = UNKNOWN if now is None else now
    found = jax.jit(lambda now, limit: go(curve, now, limit))(jnp.float32(known), jnp.float32(limit))
    return Accepted(*(np.asarray(x).item() for x in found))


def quadratic(at_once: float, slope: float, start: float = 0.0) -> Curve:
    """KL = start + slope s + (at_once - slope - start) s^2, which is `at_once` at the whole update."""
    return lambda s: start + slope * s + (at_once - slope - start) * s * s


@pytest.mark.parametrize("go", [along_update, toward_start])
def test_an_update_within_the_limit_is_taken_whole(go: Go) -> None:
    found = taken(go, quadratic(0.05, 0.0), 0.0, 0.09)
    assert found.scale == 1 and found.tries == 1 and found.taken
    assert found.kl == pytest.approx(0.05)


@pytest.mark.parametrize("start", [0.0, 0.04, 0.0899])
@pytest.mark.parametrize("at_once", [0.1, 1.0, 40.0])
@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_an_update_too_far_comes_back_in_one_try(start: float, at_once: float, slope: float) -> None:
    found = taken(along_update, quadratic(at_once, slope, start), start, 0.09)
    assert found.tries == 2
    assert found.scale == pytest.approx(min(0.98 * (0.09 - start) / (at_once - start), 0.9), rel=1e-3)
    assert start <= found.kl <= 0.09
    assert found.kl == pytest.approx(float(quadratic(at_once, slope, start)(jnp.float32(found.scale))), rel=1e-5)


@pytest.mark.parametrize("at_once", [0.091, 0.1, 1.0, 40.0])
def test_a_way_from_the_start_ends_close_to_the_limit(at_once: float) -> None:
    """On the curve that the first way back supposes, one further try is enough, and next to nothing of the limit is given away."""
    found = taken(toward_start, quadratic(at_once, 0.0), 0.08, 0.09)
    assert found.tries == 2
    assert found.kl == pytest.approx(0.97 * 0.09, rel=1e-3)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 3.0, 4.0])
@pytest.mark.parametrize("at_once", [0.1, 0.5, 2.0])
def test_a_way_back_is_found_where_the_kl_grows_in_another_way(power: float, at_once: float) -> None:
    found = taken(toward_start, lambda s: at_once * s**power, 0.08, 0.09)
    assert found.taken and found.tries <= 3
    assert 0.8 * 0.09 <= found.kl <= np.float32(0.09)


@pytest.mark.parametrize("go", [along_update, toward_start])
def test_no_curve_passes_the_limit(go: Go) -> None:
    """Curves that are anything but convex: what is taken is within the limit, or nothing is taken."""
    rng = np.random.default_rng(0)
    none = 0
    for _ in range(40):
        a, b, c = rng.uniform(0, 3, 3)
        curve: Curve = lambda s, a=a, b=b, c=c: a * jnp.sqrt(s) + b * jnp.abs(jnp.sin(9 * c * s))  # type: ignore[misc]  # noqa: E731
        found = taken(go, curve, 0.0, 0.09)
        assert found.tries <= MOST_TRIES
        assert found.kl <= np.float32(0.09)
        none += not found.taken
        if not found.taken:
            assert found.kl == 0 and found.tries == MOST_TRIES
    assert none < 40
    assert none > 0 or go is toward_start, "some of these curves rise too steeply for any share along the update"


def test_a_kl_that_is_not_finite_is_too_far() -> None:
    for go in (along_update, toward_start):
        found = taken(go, lambda s: jnp.where(s > 0.2, jnp.nan, s * s), 0.0, 0.09)
        assert 0.0625 <= found.scale < 0.2 and found.kl == pytest.approx(found.scale**2)
        found = taken(go, lambda s: jnp.where(s > 0, jnp.inf, 0.0), 0.0, 0.09)
        assert (found.scale, found.kl, found.tries, found.taken) == (0, 0, MOST_TRIES, False)


def test_where_the_limit_is_passed_already() -> None:
    """An update alone may only lower the KL; the way from the start leads back within the limit."""
    down = taken(along_update, lambda s: 0.5 - 0.2 * s, 0.5, 0.09)
    assert down.scale == 1 and down.kl == pytest.approx(0.3)
    up = taken(along_update, lambda s: 0.5 + 0.2 * s, 0.5, 0.09)
    assert up.scale == 0 and up.kl == 0.5
    back = taken(toward_start, quadratic(0.5, 0.0), 0.5, 0.09)
    assert back.taken and back.kl <= 0.09


def test_a_kl_that_was_not_measured_is_measured_first() -> None:
    known, unknown = (taken(along_update, quadratic(0.4, 0.0, 0.02), now, 0.09) for now in (0.02, None))
    assert (unknown.scale, unknown.kl) == (pytest.approx(known.scale), pytest.approx(known.kl))


def test_the_rate_is_lowered_until_updates_overshoot_by_little() -> None:
    """A plant: each update is worth `gain` times the rate's share of the way to the bound, and the run stands at the bound."""
    for gain in (0.02, 0.3, 3.0, 40.0):
        share, shares = jnp.float32(1), []
        for _ in range(150):
            scale = jnp.float32(1 / (1 + gain * float(share)))
            share = next_rate(share, scale)
            shares.append(float(share))
        most = OVERSHOOT / (1 - OVERSHOOT) / gain
        assert shares[-1] == pytest.approx(min(1.0, most), rel=0.05)
        assert min(shares) > 0.15 * min(1.0, most), "no further down than it must"
    assert float(next_rate(jnp.float32(0.5), jnp.float32(1))) == pytest.approx(0.51)
    assert float(next_rate(jnp.float32(1), jnp.float32(1))) == 1
    assert float(next_rate(jnp.float32(1), jnp.float32(0.1))) == pytest.approx(0.25 / 0.9)
    assert float(next_rate(jnp.float32(1), jnp.float32(0.0))) == pytest.approx(0.25)


def test_at_the_bound_one_forward_pass_a_step_is_enough() -> None:
    """A plant: the KL is the square of the way, each update adds `gain` times the rate's share to it, under a falling schedule."""
    go = jax.jit(
        lambda length, now, first: toward_start(
            lambda s: (s * length) ** 2, now, jnp.float32(0.09), first_share(first, now, 0.09)
        )
    )
    for gain in (0.02, 0.3, 3.0):
        way, now, share, first, tries, kls = 0.0, jnp.float32(0), jnp.float32(1), jnp.float32(1), [], []
        for k in range(80):
            way += gain * float(share) * (1 - k / 80)
            found = go(jnp.float32(way), now, first)
            way, now = way * float(found.scale), found.kl
            rate = next_rate(share, found.scale)
            share, first = rate, next_first(found.scale, share, rate)
            tries.append(int(found.tries))
            kls.append(float(now))
            assert found.taken and now <= np.float32(0.09)
        at_bound = [t for t, kl in zip(tries, kls) if kl > 0.08]
        assert len(at_bound) > 30 and np.mean(at_bound) < 1.2
        assert max(tries) <= 3 and kls[-1] > 0.9 * 0.09


def test_what_is_tried_first() -> None:
    assert float(first_share(jnp.float32(1), jnp.float32(0.0899), 0.09)) == 1, (
        "a step that was taken whole says nothing"
    )
    assert float(first_share(jnp.float32(0.8), jnp.float32(0.97 * 0.09), 0.09)) == pytest.approx(0.8)
    assert float(first_share(jnp.float32(0.9), jnp.float32(0.0225 * 0.97), 0.09)) == 1
    assert float(first_share(jnp.float32(0.9), jnp.float32(UNKNOWN), 0.09)) == 1
    assert float(next_first(jnp.float32(0.6), jnp.float32(1), jnp.float32(0.5))) == pytest.approx(0.8)
    guess, whole = (
        taken(lambda *a, f=f: toward_start(*a, f), quadratic(0.36, 0.0), 0.08, 0.09) for f in (0.5 * 0.97**0.5, 1.0)
    )
    assert (guess.tries, whole.tries) == (1, 2) and guess.kl == pytest.approx(whole.kl, rel=1e-5)


def test_the_limit_follows_what_the_probe_set_says_of_all() -> None:
    assert limit_of(0.1, None) == pytest.approx(0.06)
    assert limit_of(0.1, 0.7) == limit_of(0.1, 1.0) == pytest.approx(0.09)
    assert limit_of(0.1, 1.2) == pytest.approx(0.075)
    assert ratio_of(0.06, 0.05, 0.1) == pytest.approx(1.2)
    assert ratio_of(0.06, 0.005, 0.1) is None and ratio_of(0.005, 0.06, 0.1) is None


def test_the_probe_set_has_short_and_long_answers() -> None:
    lengths = np.arange(100)[::-1]
    found = spread_over(lengths, 4)
    assert sorted(lengths[found]) == [12, 37, 62, 87]
    assert (np.diff(found) > 0).all()
    np.testing.assert_array_equal(spread_over(lengths, 1000), np.arange(100))
