"""How far two sides are apart, and how far they may be.

The tolerances are about ten times what two runs of TRL in torch differ by among themselves (another attention, another AdamW,
float64); a larger difference is a fault, to be found and mended, never a tolerance to be raised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scripts.parity.cases import Case

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Tolerance:
    """`how` names a function of HOW; `limit` is in its unit."""

    how: str
    limit: float


@dataclass(frozen=True)
class Measure:
    """The worst difference of one quantity of a case. `values` numbers were compared."""

    quantity: str
    how: str
    difference: float
    limit: float
    values: int
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.difference <= self.limit  # false for NaN

    @property
    def share(self) -> float:
        """The difference in units of its limit."""
        if self.limit == 0:
            return 0.0 if self.difference == 0 else float("inf")
        return self.difference / self.limit if np.isfinite(self.difference) else float("inf")


def exact(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(ours - theirs), initial=0.0))


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    size = np.abs(theirs)
    return float(
        np.max(np.where(ours == theirs, 0.0, np.abs(ours - theirs) / np.where(size > 0, size, 1e-300)), initial=0.0)
    )


def relative_above_1(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs)), initial=0.0))


def relative_above_001(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(ours - theirs) / np.maximum(1e-3, np.abs(theirs)), initial=0.0))


def whole_tensor(ours: np.ndarray, theirs: np.ndarray) -> float:
    size = float(np.linalg.norm(theirs))
    return float(np.linalg.norm(ours - theirs)) / size if size else float(np.linalg.norm(ours))


HOW = {
    "equal": exact,
    "absolute": exact,
    "relative": relative,
    "relative to max(1, value)": relative_above_1,
    "relative to max(0.001, value)": relative_above_001,
    "norm of the difference / norm": whole_tensor,
}

# (pattern of the array's name, quantity on the page, {what is done: tolerance}); the first that matches counts.
_ALWAYS = ("step", "run", "penalty", "ids", "logits", "export")


def _runs(tolerance: Tolerance) -> dict[str, Tolerance]:
    return dict.fromkeys(("run", "penalty"), tolerance)


RULES: tuple[tuple[str, str, Mapping[str, Tolerance]], ...] = (
    (r"ids/.*", "token ids and lengths", dict.fromkeys(_ALWAYS, Tolerance("equal", 0.0))),
    (r"(last )?(eval_)?(step|num_tokens)", "step, num_tokens", dict.fromkeys(_ALWAYS, Tolerance("equal", 0.0))),
    (r"(last )?(eval_)?epoch", "epoch", dict.fromkeys(_ALWAYS, Tolerance("relative", 1e-12))),
    (r"learning_rate", "learning rate", dict.fromkeys(_ALWAYS, Tolerance("relative", 1e-12))),
    (r"adapter_config/.*", "adapter_config.json", {"run": Tolerance("equal", 0.0)}),
    (r"logits/(left|right)", "logits", dict.fromkeys(("logits", "export"), Tolerance("absolute", 2e-4))),
    (
        r"(last )?(eval_)?loss",
        "loss",
        {
            "step": Tolerance("relative to max(1, value)", 5e-5),
            "run": Tolerance("relative", 5e-5),
            "penalty": Tolerance("relative", 2e-5),
        },
    ),
    (
        r"grad_norm",
        "grad_norm",
        {
            "step": Tolerance("relative", 3e-4),
            "run": Tolerance("relative", 5e-5),
            "penalty": Tolerance("relative", 2e-5),
        },
    ),
    (r"(last )?(eval_)?aux_loss", "aux_loss", _runs(Tolerance("relative", 1e-5))),
    (r"gradient/.*", "gradient of each tensor", {"step": Tolerance("norm of the difference / norm", 5e-4)}),
    (r"(last )?(eval_)?rewards/accuracies", "rewards/accuracies", dict.fromkeys(_ALWAYS, Tolerance("absolute", 1e-6))),
    (r"(last )?(eval_)?rewards/.*", "rewards", dict.fromkeys(_ALWAYS, Tolerance("absolute", 5e-5))),
    (r"(last )?(eval_)?logps/.*", "logps", dict.fromkeys(_ALWAYS, Tolerance("absolute", 5e-4))),
    (r"(last )?(eval_)?entropy", "entropy", dict.fromkeys(_ALWAYS, Tolerance("absolute", 5e-5))),
    (r"(last )?(eval_)?logits/.*", "logits/chosen, rejected", dict.fromkeys(_ALWAYS, Tolerance("absolute", 5e-5))),
    (
        r"(last )?(eval_)?mean_token_accuracy",
        "mean_token_accuracy",
        dict.fromkeys(_ALWAYS, Tolerance("absolute", 1e-6)),
    ),
    (
        r"(last )?(eval_)?kl_divergence",
        "kl_divergence",
        {"step": Tolerance("relative", 1e-5), **_runs(Tolerance("relative to max(0.001, value)", 2e-4))},
    ),
    (r"weight/.*", "final weights", _runs(Tolerance("absolute", 1e-5))),
)


def rule_of(case: Case, name: str) -> tuple[str, Tolerance]:
    for pattern, quantity, tolerances in RULES:
        if re.fullmatch(pattern, name):
            if quantity in case.extra.get("tolerances", {}):
                return quantity, case.extra["tolerances"][quantity]
            return quantity, tolerances[case.do]
    raise KeyError(f"no rule says how far {name} of a case that does {case.do} may differ")


def measures(case: Case, ours: Arrays, theirs: Arrays) -> list[Measure]:
    """Every quantity that the other side has, with its worst difference; what this side lacks is infinitely far off."""
    found: dict[str, Measure] = {}
    names = sorted(set(theirs) | {n for n in ours if n.startswith(("weight/", "gradient/", "adapter_config/"))})
    for name in (n for n in names if not any(re.fullmatch(p, n) for p in case.extra.get("without", ()))):
        quantity, tolerance = rule_of(case, name)
        difference, note = _difference(name, ours.get(name), theirs.get(name), tolerance.how)
        size = theirs[name].size if name in theirs else 0
        one = Measure(quantity, tolerance.how, difference, tolerance.limit, size, note)
        before = found.get(quantity)
        worse = before is None or not one.difference <= before.difference
        kept = one if worse else before
        assert kept is not None
        found[quantity] = Measure(
            *(kept.quantity, kept.how, kept.difference, kept.limit), size + (before.values if before else 0), kept.note
        )
        if quantity == "final weights" and difference < float("inf"):
            _mean(found, case, ours[name], theirs[name])
    return list(found.values())


def _difference(name: str, ours: np.ndarray | None, theirs: np.ndarray | None, how: str) -> tuple[float, str]:
    if ours is None or theirs is None:
        return float("inf"), f"{name} is missing {'here' if ours is None else 'there'}"
    if ours.dtype.kind == "U":
        return float(str(ours) != str(theirs)), f"{name}: {ours} here, {theirs} there"
    if ours.shape != theirs.shape:
        return float("inf"), f"{name} has shape {ours.shape} here, {theirs.shape} there"
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf"), f"{name} is not finite"
    return HOW[how](a, b), name


MEAN_WEIGHT = Tolerance("absolute, mean of a tensor", 2e-7)


def _mean(found: dict[str, Measure], case: Case, ours: np.ndarray, theirs: np.ndarray) -> None:
    quantity = "final weights, mean"
    limit = case.extra.get("tolerances", {}).get(quantity, MEAN_WEIGHT).limit
    mean = float(np.mean(np.abs(ours.astype(np.float64) - theirs.astype(np.float64))))
    before = found.get(quantity)
    values = ours.size + (before.values if before else 0)
    found[quantity] = Measure(quantity, MEAN_WEIGHT.how, max(mean, before.difference if before else 0.0), limit, values)
