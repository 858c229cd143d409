"""Learning-rate schedules as transformers has them, computed on the host in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Schedule = Callable[[int], float]


def warmup_of(warmup_steps: float, total: int) -> int:
    """Warm-up in steps: a number of steps, or a share in (0, 1) of the whole run, rounded up."""
    return math.ceil(total * warmup_steps) if 0 < warmup_steps < 1 else int(warmup_steps)


def schedule(name: str, *, total: int, warmup: int, options: dict[str, Any] | None = None) -> Schedule:
    """transformers' schedules: step k (from 0) -> factor of the learning rate used by that step, in float64.

    Args:
      name: linear, cosine, cosine_with_restarts, cosine_with_min_lr, cosine_warmup_with_min_lr, polynomial, constant,
        constant_with_warmup, inverse_sqrt or warmup_stable_decay.
      total, warmup: steps of the run and of its warm-up.
      options: `lr_scheduler_kwargs`; polynomial has `end`, which is lr_end as a share of the rate.
    """
    given = dict(options or {})
    shape = _SHAPES[name](total, warmup, given)
    if name in ("constant", "cosine_warmup_with_min_lr"):  # without a warm-up; with one of its own
        return shape
    rise = _rise(given.get("warmup_type", "linear"), given.get("min_lr_ratio", 0.0))
    return lambda k: rise(k / warmup) if k < warmup else shape(k)


def _rise(kind: str, least: float) -> Callable[[float], float]:
    """The warm-up: share of it that is done -> factor, from `least` to 1. Only warmup_stable_decay has other kinds than linear from 0."""

    def factor(p: float) -> float:
        if kind == "cosine":
            p = 0.5 * (1.0 - math.cos(math.pi * p))
        elif kind == "1-sqrt":
            p = 1.0 - math.sqrt(1.0 - p)
        return max(0.0, p * (1.0 - least) + least)

    return factor


def _progress(total: int, warmup: int) -> Callable[[int], float]:
    return lambda k: (k - warmup) / max(1, total - warmup)


def _linear(total: int, warmup: int, options: dict[str, Any]) -> Schedule:
    return lambda k: max(0.0, (total - k) / max(1, total - warmup))


def _cosine(total: int, warmup: int, options: dict[str, Any]) -> Schedule:
    cycles, at = options.get("num_cycles", 0.5), _progress(total, warmup)
    return lambda k: max(0.0, 0.5 * (1.0 + math.cos(math.pi * 2.0 * cycles * at(k))))


def _cosine_with_restarts(total: int, warmup: int, options: dict[str, Any]) -> Schedule:
    cycles, at = options.get("num_cycles", 1), _progress(total, warmup)
    return lambda k: 0.0 if at(k) >= 1 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * at(k)) % 1.0))))


def _cosine_with_min_lr(total: int, warmup: int, options: dict[str, Any]) -> Schedule:
    least, inner = options["min_lr_rate"], _cosine(total, warmup, options)
    return lambda k: inner(k) * (1.0 - least) + least


def _cosine_warmup_with_min_lr(total: int, warmup: int, options: dict[str, Any]) -> Schedule:
    """Its first step has a rate above 0: the warm-up begins one step in, or at `warmup_lr_rate`; so does the fall."""
    least, start, cycles = options["min_lr_rate"], options.get("warmup_lr_rate"), options.get("num_cycles", 0.5)

    def factor(k: int) -> float:
        if k < warmup:
            return (k + 1) / warmup if start is None else start + (1.0 - start) * k / max(1, warmup - 1)
        progress = (k - warmup + 1) / max(1, total - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 2.0 * cycles * progress)) * (1.0 - least) + least)

    return factor


def _polynomial(total: int, warmup: int, options: dict[str, Any]) -> Schedule:
    # `end` is lr_end / learning_rate; the caller knows the rate.
    end, power, at = options["end"], options.get("power", 1.0), _progress(total, warmup)
    return lambda k: end if k > total else (1.0 - end) * (1.0 - at(k)) ** power + end


def _constant(total: int, warmup: int, options: dict[str, Any]) -> Schedule:
    return lambda k: 1.0


def _inverse_sqrt(total: int, warmup: int, options: dict[str, Any]) -> Schedule:
    timescale = options.get("timescale") or warmup or 10_000
    return lambda k: 1.0 / math.sqrt((k + timescale - warmup) / timescale)


def _warmup_stable_decay(total: int, warmup: int, options: dict[str, Any]) -> Schedule:
    decay = options["num_decay_steps"]
    stable = options.get("num_stable_steps", total - warmup - decay)
    least, cycles = options.get("min_lr_ratio", 0.0), options.get("num_cycles", 0.5)
    kind = options.get("decay_type", "cosine")

    def fall(p: float) -> float:
        if kind == "linear":
            return 1.0 - p
        if kind == "1-sqrt":
            return 1.0 - math.sqrt(p)
        return 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * p))

    def factor(k: int) -> float:
        if k < warmup + stable:
            return 1.0
        if k < warmup + stable + decay:
            return max(0.0, fall((k - warmup - stable) / max(1, decay)) * (1.0 - least) + least)
        return least

    return factor


_SHAPES: dict[str, Callable[[int, int, dict[str, Any]], Schedule]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}
SCHEDULES = tuple(_SHAPES)
