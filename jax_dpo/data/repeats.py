"""An answer that stands in many pairs: what tells it from the others is learned in a few steps, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from jax_dpo.data.tokens import TokenizedPairs

SHARE = 0.5
"""of a side's answers, from which on one text is more than half of what is learned of that side"""
LEAST = 8
"""pairs, below which a text that comes twice is chance"""


class Repeat(NamedTuple):
    """One text that is `times` of the `total` answers of a side; `pair` is the first that has it."""

    side: str
    times: int
    total: int
    pair: int

    @property
    def share(self) -> str:
        """Whole percents, rounded down: 100 % are all."""
        return f"{100 * self.times // self.total} % ({self.times:,} of {self.total:,})"


def repeats(pairs: TokenizedPairs) -> list[Repeat]:
    """The texts that are half of the chosen, or of the rejected answers, or more."""
    total, found = len(pairs), []
    if total < LEAST:
        return []
    for side, column in (("chosen", 1), ("rejected", 3)):
        lengths = pairs.branch_lengths()[:, column]
        # Equal answers are equally long: most data end here, without a look at their tokens.
        for length in np.flatnonzero(np.bincount(lengths) >= SHARE * total):
            first: dict[bytes, int] = {}
            counts: Counter[bytes] = Counter()
            for i in np.flatnonzero(lengths == length).tolist():
                tree = pairs.tree(i)
                key = (tree.chosen if side == "chosen" else tree.rejected).tobytes()
                first.setdefault(key, i)
                counts[key] += 1
            text, count = counts.most_common(1)[0]
            if length and count >= SHARE * total:
                found.append(Repeat(side, count, total, first[text]))
    return found
