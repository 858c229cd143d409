"""How checkpoints are compared: the score of an evaluation, and the best of several.

A score is the reward margin of an evaluation if its KL is within the bound, else minus infinity. The margin must be that
of the configured beta: a beta raised on the way would raise the margin of one and the same model. Evaluations at a moving
beta say so in their `beta` field and are brought back here by the ratio of the two. Of several evaluation sets one ranks.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax_dpo.errors import UserError

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Ranking:
    """How checkpoints are compared.

    Attributes:
        target_kl: the bound, or None where there is none.
        metric: `metric_for_best_model`, with or without `eval_`; None is the score of this module.
        greater_is_better: of that metric; None: unless its name ends in "loss", as in Hugging Face's trainer.
        set: the evaluation set that ranks, None where there is only one.
        beta: the configured beta.
    """

    target_kl: float | None
    metric: str | None = None
    greater_is_better: bool | None = None
    set: str | None = None
    beta: float | None = None

    @property
    def greater(self) -> bool:
        """Whether a higher value is the better one."""
        if self.metric is None:
            return True
        return not self.metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better

    def score(self, entry: Entry) -> float:
        """The value of one evaluation.

        Raises:
            UserError: the evaluation has no such metric; names those that it has.
        """
        if self.metric is None:
            return score(margin(entry, self.set, self.beta), value_of(entry, "kl_divergence", self.set), self.target_kl)
        name = self.metric.removeprefix("eval_")
        found = value_of(entry, name, self.set)
        if found is None:
            prefix = f"eval_{self.set}_" if self.set else "eval_"
            known = sorted(key.removeprefix(prefix) for key in entry if key.startswith(prefix))
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                "metric-for-best-model-unknown",
                f"metric_for_best_model: an evaluation has no {self.metric}.{hint} It has: {', '.join(known)}.",
            )
        return found

    def best(self, scores: Mapping[int, float]) -> int | None:
        """The step of the best score by step; of equal ones the oldest; None where none is a number above -inf."""
        usable = {step: value for step, value in sorted(scores.items()) if math.isfinite(value)}
        if not usable:
            return None
        return max(usable, key=lambda step: usable[step] if self.greater else -usable[step])


def score(margin: float | None, kl: float | None, target_kl: float | None) -> float:
    """`margin` if `kl` is within the bound, else -inf. Without a bound, or where no exact KL was measured (None), the
    margin stands alone; a margin or KL that is not a number is -inf."""
    if margin is None or math.isnan(margin):
        return -math.inf
    if target_kl is None or kl is None:
        return margin
    return margin if kl <= target_kl else -math.inf


def margin(entry: Entry, set_name: str | None = None, beta: float | None = None) -> float | None:
    """`rewards/margins` of an evaluation at the configured `beta`, whatever beta was in force when it was made."""
    found = value_of(entry, "rewards/margins", set_name)
    used = entry.get("beta")
    # The ratio is 1 where beta did not change, and the margin then as it was, to the bit.
    return found if found is None or not beta or not used else found * (beta / used)


def value_of(entry: Entry, metric: str, set_name: str | None) -> float | None:
    """A metric of an evaluation, with or without the name of its set; NaN where it was not finite, None where it is not there."""
    for key in ((f"eval_{set_name}_{metric}",) if set_name else ()) + (f"eval_{metric}",):
        if entry.get(key) is not None:
            return float(entry[key])
        if key in entry.get("non_finite", ()):  # as run.jsonl has it: null, and named
            return math.nan
    return None
