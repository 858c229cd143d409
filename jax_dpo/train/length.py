"""How far the reward margin goes with the length of the answers."""

from __future__ import annotations

import numpy as np

from jax_dpo.loss.scores import CHOSEN, REJECTED, PairSums


def length_effect(sums: PairSums, beta: float | np.ndarray) -> dict[str, float]:
    """What the margins of an evaluation owe to the lengths: metrics under `length/`.

    Ordinary least squares of each pair's margin m on d, its chosen answer's tokens less its rejected one's. With r the
    correlation, m = a + b d: a is the margin between answers of one length, b times the mean of d what the lengths add.

    Args:
      sums: arrays [N, 2] of each pair.
      beta: of all pairs, or [N] of each.

    Returns:
      `length/chosen` and `length/rejected` mean tokens of an answer, `length/chosen_longer` share of pairs with d > 0,
      `length/margin_slope` b in reward per token, `length/margin_correlation` r. The last two are absent where they are
      not defined: a d that is the same in all pairs, margins that are all equal or not finite.
    """
    tokens, logratio = np.asarray(sums.tokens, np.float64), np.asarray(sums.logratio, np.float64)
    difference = tokens[:, CHOSEN] - tokens[:, REJECTED]
    margin = beta * (logratio[:, CHOSEN] - logratio[:, REJECTED])
    found = {
        "length/chosen": float(tokens[:, CHOSEN].mean()),
        "length/rejected": float(tokens[:, REJECTED].mean()),
        "length/chosen_longer": float((difference > 0).mean()),
    }
    if not np.isfinite(margin).all():
        return found
    d, m = difference - difference.mean(), margin - margin.mean()
    spread, scatter = float(d @ d), float(m @ m)
    if spread == 0 or scatter == 0:
        return found
    shared = float(d @ m)
    return {
        **found,
        "length/margin_slope": shared / spread,
        "length/margin_correlation": shared / float(np.sqrt(spread) * np.sqrt(scatter)),
    }
