"""The search for a learning rate and a beta by short trials: which trials are made, and what is proposed after them.

Pure: `search` is given a function that makes one trial, so it runs on a simulated model as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jax_dpo.errors import UserError
from jax_dpo.train.kl_growth import Growth, Point, careful_law, likely_law, usable

LADDER = (0.25, 0.5, 1.0, 2.0)  # of the rate whose trial ends at the bound
MOST_SCOUTS = 8
NEAR = 4.0  # a scout within this factor of the bound is near enough to build the ladder on
_JUMPS = (2.0, 30.0)  # least and most by which the rate changes from scout to scout
_SAME = 1.2  # rates closer than this factor need no trial each


@dataclass(frozen=True)
class Trial:
    """What a short training came to. Measures of the held-out pairs are those at its end.

    `kl` in nats per token; `margin` is the mean of logratio(c) - logratio(r) in nats, without beta; `growth` are (steps, KL above that of
    the start) on the way; `trouble` says why it is no guide, if it is none.
    """

    rate: float
    beta: float
    steps: int
    kl: float
    accuracy: float
    margin: float
    loss: float
    grad_norm: float
    growth: tuple[tuple[int, float], ...]
    seconds: float = 0.0
    trouble: str | None = None

    @property
    def risen(self) -> float:
        """KL above that of the start, at the end."""
        return self.growth[-1][1] if self.growth else math.inf


RunTrial = Callable[[float, float], Trial]


@dataclass(frozen=True)
class Found:
    """What is proposed: `rate` and `beta`, and what that rests on.

    `kl` is the KL above the start that is expected at most at the end of the planned run, by `law`; `likely_rate` the rate that would reach
    the limit by `likely`, the law that also asks how much of each step lasts. `capped`: a lower rate than the KL allows, since trials
    above it had trouble.
    """

    rate: float
    beta: float
    kl: float
    likely_rate: float
    law: Growth
    likely: Growth
    trials: tuple[Trial, ...]
    compared: tuple[Trial, ...]
    """one for each beta, at one and the same rate; empty where none was compared"""
    capped: bool
    why_beta: str


def search(
    trial: RunTrial,
    *,
    start: float,
    beta: float,
    limit: float,
    factors: Sequence[float],
    planned: Sequence[float],
    held_out: int,
    rates: Sequence[float] = (),
    betas: Sequence[float] = (),
) -> Found:
    """Makes the trials and proposes.

    Args:
      trial: makes one trial at (learning rate, beta).
      start: the rate of the first trial.
      limit: KL above that of the start, nats per token, that the planned run may end at.
      factors, planned: the schedule's factors of a trial's steps, and of the planned run's.
      held_out: pairs that accuracies are shares of.
      rates: those to try, in place of a search.
      betas: those to compare with `beta`.

    Raises:
      UserError: no trial says anything about the bound.
    """
    made = [trial(rate, beta) for rate in rates] if rates else _ladder(trial, start, beta, limit)
    law = careful_law(_usable(made, limit), factors)
    compared: list[Trial] = []
    if betas or not rates:
        # As far as the planned run will go: only there do betas differ, and there the law must be right.
        at = _digits(min(law.rate(limit, factors), max(t.rate for t in made)))
        compared = [trial(at, other) for other in (beta, *(b for b in betas if b != beta))]
        made.append(compared[0])
        law = careful_law(_usable(made, limit), factors)
    likely = likely_law(_usable(made, limit), factors)
    chosen, why = better_beta(compared, held_out) if len(compared) > 1 else (None, "only the configured one was tried")
    # Another beta goes at another speed; the rate makes up for it.
    speed = (
        1.0
        if chosen is None
        else (chosen.risen / compared[0].risen) ** (1 / law.slope(law.rate(limit, factors), factors))
    )
    rate, most = law.rate(limit, planned) / speed, _most(made)
    proposed = _digits(min(rate, most))
    return Found(
        rate=proposed,
        beta=beta if chosen is None else chosen.beta,
        kl=law.kl(proposed * speed, planned),
        likely_rate=max(rate, likely.rate(limit, planned) / speed),
        law=law,
        likely=likely,
        trials=tuple(made),
        compared=tuple(compared) if len(compared) > 1 else (),
        capped=rate > most,
        why_beta=why,
    )


def _most(made: Sequence[Trial]) -> float:
    """The highest rate below every rate that gave trouble; no limit where none did."""
    trouble = min((t.rate for t in made if t.trouble), default=math.inf)
    return trouble if math.isinf(trouble) else max((t.rate for t in made if t.rate < trouble), default=trouble)


def better_beta(compared: Sequence[Trial], held_out: int) -> tuple[Trial | None, str]:
    """The trial whose beta is taken in place of that of the first, which is the configured one; None where it stays.

    Another is taken only where its held-out accuracy is higher by more than one standard error of the difference, which for shares of n
    pairs is sqrt((a (1 - a) + b (1 - b)) / n).
    """
    base, best = compared[0], None
    if base.trouble:
        return None, f"not compared, since at learning rate {base.rate:.3g}, where betas differ: {base.trouble}"
    why = f"no other beta is better than {base.beta:g} by more than chance on {held_out} pairs"
    for other in compared[1:]:
        error = math.sqrt(sum(t.accuracy * (1 - t.accuracy) for t in (base, other)) / held_out)
        most = (best or base).accuracy
        if not other.trouble and other.accuracy - base.accuracy > error and other.accuracy > most:
            best = other
            why = (
                f"its held-out accuracy is {other.accuracy:.3f}, that of {base.beta:g} is {base.accuracy:.3f}, more than the standard "
                f"error of {error:.3f} apart"
            )
    return best, why


def _ladder(trial: RunTrial, start: float, beta: float, limit: float) -> list[Trial]:
    """Scouts until a trial ends near the bound, then a geometric ladder around the rate that reaches it."""
    made: list[Trial] = []
    below, above = 0.0, math.inf  # rates known to be too low and too high
    rate = start
    while len(made) < MOST_SCOUTS:
        rate = _digits(rate)
        made.append(trial(rate, beta))
        risen = made[-1].risen if not made[-1].trouble else math.inf
        if limit / NEAR <= risen <= limit * NEAR:
            break
        if risen > limit:
            above, down = min(above, rate), 10.0 if math.isinf(risen) else _clip(math.sqrt(risen / limit))
            rate = rate / down
        else:
            below, rate = max(below, rate), rate * _clip(math.sqrt(limit / max(risen, 1e-12)))
        if not below < rate < above:
            rate = math.sqrt(below * above)
    good = [t for t in made if not t.trouble and t.risen > 0]
    if not good:
        raise _nothing(made, limit)
    nearest = min(good, key=lambda t: abs(math.log(t.risen / limit)))
    centre = nearest.rate * math.sqrt(limit / nearest.risen)
    for step in LADDER:
        rate = _digits(centre * step)
        if rate < above and all(max(rate / t.rate, t.rate / rate) > _SAME for t in good):
            made.append(trial(rate, beta))
    return made


def _clip(jump: float) -> float:
    return min(max(jump, _JUMPS[0]), _JUMPS[1])


def _points(made: Sequence[Trial]) -> list[Point]:
    return [Point(t.rate, steps, kl) for t in made if not t.trouble for steps, kl in t.growth]


def _usable(made: Sequence[Trial], limit: float) -> list[Point]:
    points = usable(_points(made), limit)
    if len(points) < 2:
        raise _nothing(made, limit)
    return points


def _nothing(made: Sequence[Trial], limit: float) -> UserError:
    seen = "; ".join(f"{t.rate:.3g}: {t.trouble or f'{t.risen:.3g}'}" for t in made)
    return UserError(
        "tune-no-guide",
        f"No trial says how the KL grows toward {limit:.3g} nats per token. KL by learning rate: {seen}. Name rates at which it moves "
        "and stays finite with --trial_rates, or give the trials more steps with --trial_steps; where the KL stays 0 at every rate, "
        "nothing is trained.",
    )


def _digits(rate: float) -> float:
    """Rounded down to two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return float(f"{math.floor(rate / unit + 1e-9) * unit:.2g}")
