"""Controllers that follow the KL continuously: (what is in force, KL) -> what is in force next. Pure, one small class each.

All of them are judged where the KL is judged, and none changes what is compiled. `adaptive_beta` steers to a band around half of the
bound; the other two treat the bound as a bound: they aim at `AIM` of it, so that what differs by sampling stays below, and never go
under the value that the user configured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

AIM = 0.9  # of target_kl
BETA_RANGE = (0.25, 10.0)  # of the configured beta
MOST_KL_COEF = 1e4


class Setting(NamedTuple):
    """A controlled value and what its controller remembers beside it (0 at the start)."""

    value: float
    memory: float = 0.0


class Controller(Protocol):
    """`kind` names it in `run.jsonl`, `option` is what it turns: "beta" or "kl_coef"."""

    @property
    def kind(self) -> str: ...

    @property
    def option(self) -> str: ...

    def __call__(self, now: Setting, *, kl: float, target_kl: float, configured: float) -> Setting:
        """The setting after a KL, in nats per token and finite, was seen."""
        ...


@dataclass(frozen=True)
class AdaptiveBeta:
    """Above the target beta is multiplied by 1 + rate, below half of it by 1 - rate; within `BETA_RANGE` of the configured beta.

    Early in a run the KL is near 0, which would bring beta down without end: hence the lower limit.
    """

    rate: float
    kind: str = "adaptive_beta"
    option: str = "beta"

    def __call__(self, now: Setting, *, kl: float, target_kl: float, configured: float) -> Setting:
        factor = 1 + self.rate if kl > target_kl else 1 - self.rate if kl < target_kl / 2 else 1.0
        return now._replace(value=_within(now.value * factor, *(configured * bound for bound in BETA_RANGE)))


@dataclass(frozen=True)
class PIBeta:
    """A proportional-integral controller of log beta.

    e = log(KL / aim), cut to [-1, 1]; log beta = log(configured beta) + proportional * e + sum of integral * e. PPO's adaptive KL
    penalty is its integral part with steps of a fixed size (arXiv 1707.06347, section 4; in log space and with a cut error
    arXiv 1909.08593, section 2.2). Beta stays between the configured one and 10 times it, and so does the sum by itself (anti-windup
    by clamping; Astrom and Hagglund, PID Controllers, 1995, section 3.5): a long time below the bound does not delay the answer to
    the first KL above it.
    """

    proportional: float
    integral: float
    kind: str = "pi_beta"
    option: str = "beta"

    def __call__(self, now: Setting, *, kl: float, target_kl: float, configured: float) -> Setting:
        error = _within(math.log(max(kl, 1e-9) / (AIM * target_kl)), -1.0, 1.0)
        most = math.log(BETA_RANGE[1])
        total = _within(now.memory + self.integral * error, 0.0, most)
        log_ratio = _within(self.proportional * error + total, 0.0, most)
        return Setting(configured * math.exp(log_ratio), total)


@dataclass(frozen=True)
class DualKLCoef:
    """Dual ascent on `kl_coef`, the multiplier of the constraint KL <= aim.

    kl_coef <- max(configured, kl_coef + rate * (KL / aim - 1)): projected gradient ascent on the Lagrangian's dual (Boyd and
    Vandenberghe 2004, chapter 5; for policies arXiv 1801.08757 and arXiv 2007.03964). The excess is cut at 1, so that one wild KL
    does not decide the rest of the run.
    """

    rate: float
    kind: str = "dual_kl_coef"
    option: str = "kl_coef"

    def __call__(self, now: Setting, *, kl: float, target_kl: float, configured: float) -> Setting:
        excess = min(kl / (AIM * target_kl) - 1.0, 1.0)
        return now._replace(value=_within(now.value + self.rate * excess, configured, max(configured, MOST_KL_COEF)))


def _within(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)
