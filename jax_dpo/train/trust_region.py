"""The trust region: an update whose KL on the probe set would pass its limit is scaled back before it is taken.

The probe set is a few held-out pairs, chosen once. What is bounded is their KL, in nats per token, under the parameters as they would
be after the update; so no step of a run ends above the limit, whatever learning rate, data or loss are.

Scaled back is the update together with what came before it: the parameters go toward those that the run started from until the KL
is at the limit. That is a projection, so the run goes on along the bound, old updates fading as new ones come; scaled back alone, an
update that points outward, as nearly all do there, would be nothing but lost, and the first ones that reached the bound would decide
the rest of the run. Where the reference is another model than the start there is no such way back, and the update alone is scaled.

A learning rate that is far too high would have the policy thrown out and brought back at every step, which leaves it little more than
its last update. So the rate is lowered until an update overshoots by no more than `OVERSHOOT` of the way: then the policy is made of
the last few updates, and of more and more as the schedule falls. It rises again, slowly, where updates are taken whole.

The limit is `AIM` of `target_kl`, divided by how much higher the KL of the whole evaluation set was than the probe set's when both were
last seen. Until they were, it is `CAUTION` of `target_kl`: what a few pairs say of all is not known then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_dpo.train.controllers import AIM

CAUTION = 0.6  # of target_kl, before the probe set was held against the evaluation set
KNOWN_FROM = 0.1  # of target_kl: below it the ratio of two KLs is not what it will be at the bound
MOST_TRIES = 6
CLOSE = 0.8  # of the limit: where the policy was scaled back, less would be given away
UNKNOWN = -1.0  # a KL that has not been measured; no KL is below 0
# Of the way from the start. At 0.05 the first few updates, far too large, decided the demo's run at five times its rate (held-out margin
# +0.28, accuracy 83 %); where it was a quarter, and less with the schedule, the run ended at +0.33 and 88 %.
OVERSHOOT = 0.25
RAISED = 1.02  # the rate's share rises by no more in a step
REGION_START = {"kl": UNKNOWN, "rate": 1.0, "first": 1.0}
"""what a trust region remembers (`TrainState.region`), before the first step"""


class Accepted(NamedTuple):
    """Scalars of a step, float32."""

    scale: jax.Array
    """1 where the update was taken as it is; below it, what it, or the whole way from the start, was multiplied by"""
    kl: jax.Array
    """KL of the probe set after it, nats per token"""
    tries: jax.Array
    """forward passes over the probe set"""
    taken: jax.Array
    """false where no try was within the limit, and the parameters stay"""


class _Try(NamedTuple):
    """What was tried last and before it, and the largest share so far that was within the limit."""

    scale: jax.Array
    kl: jax.Array
    before: tuple[jax.Array, jax.Array]
    best: tuple[jax.Array, jax.Array]
    tries: jax.Array


def toward_start(
    kl_at: Callable[[jax.Array], jax.Array], now: jax.Array, limit: jax.Array, first: jax.Array | float = 1.0
) -> Accepted:
    """Scales the whole way from the start, the update's included, so that its end is within the limit, and above `CLOSE` of it.

    Args:
      kl_at: KL of the probe set, nats per token, at a share of the way; 0 at the start itself.
      now: that KL before the update, for where nothing is taken.
      limit: the KL that may not be passed.
      first: the share that is tried first; a good guess saves a forward pass.

    Near the start the KL is quadratic in the distance (its second-order form: Kullback 1959, section 2.6), which the first way back
    supposes; the next ones take the power of the distance that the last two tries show.
    """

    def other(t: _Try) -> jax.Array:
        scale, kl = t.before
        seen = jnp.log(kl / t.kl) / jnp.log(scale / t.scale)
        power = jnp.where((t.tries > 1) & jnp.isfinite(seen), jnp.clip(seen, 0.3, 8.0), 2.0)
        return t.scale * jnp.minimum(0.97 * limit / t.kl, 1e3) ** (1 / power)

    return _tried(kl_at, now, limit, CLOSE * limit, other, jnp.float32(first))


def along_update(kl_at: Callable[[jax.Array], jax.Array], now: jax.Array, limit: jax.Array) -> Accepted:
    """Scales the update alone. Where the limit is passed already, the KL may not rise.

    Args:
      kl_at: KL of the probe set, nats per token, after a share of the update.
      now: that KL after none of it, or `UNKNOWN`.
      limit: the KL that may not be passed.

    A convex curve lies below its chord from `now` to a try that is too far, so one further try is enough; where it is not convex,
    the chord of each try is shorter than that of the last.
    """
    now = jax.lax.cond(now < 0, lambda: kl_at(jnp.float32(0)), lambda: now)
    ceiling = jnp.maximum(limit, now)

    def other(t: _Try) -> jax.Array:
        return t.scale * jnp.clip(0.98 * (ceiling - now) / (t.kl - now), 0.0, 0.9)

    return _tried(kl_at, now, ceiling, jnp.float32(0), other)


def _tried(
    kl_at: Callable[[jax.Array], jax.Array],
    now: jax.Array,
    limit: jax.Array,
    enough: jax.Array,
    other: Callable[[_Try], jax.Array],
    first: jax.Array | None = None,
) -> Accepted:
    """Tries shares, the whole or `first` first, until one has a KL between `enough` and `limit`, and takes the largest within the limit.

    What is tried is compiled once. Nothing is taken where none of `MOST_TRIES` is within the limit.
    """

    def one(t: _Try) -> _Try:
        kl = kl_at(t.scale)
        within = (kl <= limit) & (t.scale > t.best[0])
        best = tuple(jnp.where(within, new, old) for new, old in zip((t.scale, kl), t.best))
        tried = t._replace(kl=kl, best=(best[0], best[1]), tries=t.tries + 1)
        next_one = jnp.where(jnp.isfinite(kl), jnp.clip(other(tried), 0.0, 1.0), 0.25 * t.scale)
        return tried._replace(scale=next_one, before=(t.scale, kl))

    def goes_on(t: _Try) -> jax.Array:
        close = (t.best[1] >= enough) | (t.best[0] == 1)
        return ~((t.best[0] >= 0) & close) & (t.tries < MOST_TRIES)

    zero, nothing = jnp.float32(0), (jnp.float32(-1), jnp.asarray(now, jnp.float32))
    end = jax.lax.while_loop(
        goes_on, one, _Try(jnp.float32(1) if first is None else first, zero, (zero, zero), nothing, jnp.int32(0))
    )
    scale, kl = end.best
    return Accepted(jnp.maximum(scale, 0.0), kl, end.tries, scale >= 0)


def next_rate(share: jax.Array, scale: jax.Array) -> jax.Array:
    """The share of the scheduled learning rate for the next step, after a step whose way was scaled by `scale`."""
    over = 1.0 - scale
    factor = jnp.where(over > OVERSHOOT, OVERSHOOT / over, RAISED)
    return jnp.minimum(share * factor, 1.0)


def first_share(first: jax.Array, now: jax.Array, limit: jax.Array) -> jax.Array:
    """The share of the way to try first: the whole one, or, where the last step was scaled back, what will end just below the limit if this
    one overshoots as that one did, the change of the rate included (`first`: see `next_first`)."""
    return jnp.where((first < 1) & (now > 0), jnp.minimum(first * jnp.sqrt(0.97 * limit / now), 1.0), 1.0)


def next_first(scale: jax.Array, share: jax.Array, next_share: jax.Array) -> jax.Array:
    """By what the next step's way would be scaled to the KL that the last one has now: the last one's scale, corrected for the change of
    the rate."""
    return 1.0 - (1.0 - scale) * next_share / share


def limit_of(target_kl: float, ratio: float | None) -> float:
    """What the probe set's KL may be; `ratio` is the evaluation set's KL over the probe set's, None where it is not known."""
    return CAUTION * target_kl if ratio is None else AIM * target_kl / max(ratio, 1.0)


def ratio_of(kl: float, probe_kl: float, target_kl: float) -> float | None:
    """How much higher the KL of the whole set is; None where both are too low to tell."""
    return kl / probe_kl if min(kl, probe_kl) >= KNOWN_FROM * target_kl else None


def spread_over(lengths: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` of the pairs, in order, one from the middle of each of `count` equal parts of the pairs by length.

    The KL of a token changes along an answer, so a set that has long and short answers in their shares stands for all better than one
    drawn at random, and it takes no seed.
    """
    count = min(count, len(lengths))
    by_length = np.argsort(lengths, kind="stable")
    middles = ((np.arange(count) + 0.5) * len(lengths) / count).astype(int)
    return np.sort(by_length[middles])
