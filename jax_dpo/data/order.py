"""The order of examples: TRL's, from the seed alone, without torch; or a curriculum's, from the seed and the gaps of the pairs.

TRL's sampler takes `torch.randperm(n)` of a CPU generator seeded with seed + epoch. That generator is a Mersenne twister
(MT19937, seeded as `numpy.random.RandomState` is), and randperm is a shuffle from the front: for i = 0 .. n-2 it draws
32 bits z and swaps places i and i + (z mod (n - i)).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# From here on torch draws 64 bits a place, in another order; no data set of pairs is near it.
_MOST_ROWS = 2**32 // 20
STRATEGIES = ("random", "sequential", "curriculum")


class Position(NamedTuple):
    """A place in the data: the epoch (from 0) and the pairs of it that are used up."""

    epoch: int
    consumed: int


START = Position(0, 0)


@dataclass(frozen=True, eq=False)
class Curriculum:
    """Pairs from the wide gap (easy) to the narrow one (hard), in buckets of equal size that are shuffled inside.

    gaps: float32 [N], what chosen is ahead of rejected by; none is NaN.
    buckets: how many; with more than N every pair has one of its own.
    later: what epochs after the first are, `random` or `curriculum`.
    """

    gaps: np.ndarray
    buckets: int
    later: str = "random"

    @property
    def edges(self) -> np.ndarray:
        """int64 [buckets + 1]: where each bucket begins in an epoch, and the end; sizes differ by one at most."""
        n = len(self.gaps)
        count = max(1, min(self.buckets, n))
        return np.arange(count + 1) * n // count

    def arrange(self, shuffled: np.ndarray) -> np.ndarray:
        """An epoch's order [N] out of a shuffled one: that order stays inside each bucket, and decides which of equal gaps comes first."""
        ranked = np.argsort(-self.gaps[shuffled], kind="stable")
        edges = self.edges
        return shuffled[np.concatenate([np.sort(ranked[a:b]) for a, b in pairwise(edges)])]

    def ranges(self) -> list[tuple[int, float, float]]:
        """(pairs, widest gap, narrowest gap) of each bucket."""
        gaps, edges = np.sort(self.gaps)[::-1], self.edges.tolist()
        return [(b - a, float(gaps[a]), float(gaps[b - 1])) for a, b in pairwise(edges) if b > a]


@lru_cache(maxsize=4)
def epoch_order(
    n: int, seed: int, epoch: int, strategy: str = "random", curriculum: Curriculum | None = None
) -> np.ndarray:
    """int64 [n], read-only: the rows of epoch `epoch` (from 0) in the order in which they are used.

    strategy: `random` as TRL's default, `sequential`, the data set's own order in every epoch, or `curriculum`, whose shuffles are those
        of `random`: with one bucket it is `random`.
    Raises `ValueError`: another strategy; n of 2^32/20 (214 million) or more, where torch shuffles by other draws; no curriculum of n
        pairs where there must be one.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"train_sampling_strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if strategy == "curriculum":
        if curriculum is None or len(curriculum.gaps) != n:
            raise ValueError(f"a curriculum of {n} pairs needs their gaps")
        shuffled = epoch_order(n, seed, epoch)
        if epoch > 0 and curriculum.later == "random":
            return shuffled
        arranged = curriculum.arrange(shuffled)
        arranged.flags.writeable = False
        return arranged
    if n >= _MOST_ROWS:
        raise ValueError(f"{n} rows cannot be shuffled as torch does: it draws 64 bits from {_MOST_ROWS} rows on")
    order = list(range(n))
    if strategy == "random" and n > 1:
        # torch keeps the low 32 bits of a seed.
        generator = np.random.RandomState((seed + epoch) % 2**32)
        draws = generator.randint(0, 2**32, size=n - 1, dtype=np.uint32).astype(np.int64)
        places = (np.arange(n - 1) + draws % np.arange(n, 1, -1)).tolist()
        for i, j in enumerate(places):
            order[i], order[j] = order[j], order[i]
    result = np.asarray(order, np.int64)
    result.flags.writeable = False
    return result


def steps_per_epoch(n: int, pairs_per_micro_batch: int, accumulation: int, consumed: int = 0) -> int:
    """Optimizer steps that the n - consumed pairs left in an epoch make: ceil(ceil(pairs / micro-batch) / accumulation).

    accumulation: micro-batches of one step over all devices.
    """
    micro_batches = -(-(n - consumed) // pairs_per_micro_batch)
    return -(-micro_batches // accumulation)


def position_after(
    steps: int, n: int, micro_batch: int, micro_batches_per_step: int, start: Position = START
) -> Position:
    """Where the data stands after `steps` optimizer steps from `start`. An epoch that is used up is the next one's start.

    The batch sizes may differ from those that led to `start`: steps count from there with the new ones.
    """
    start = _wrapped(start, n)
    left = steps_per_epoch(n, micro_batch, micro_batches_per_step, start.consumed)
    pairs = micro_batch * micro_batches_per_step
    if steps < left:
        return Position(start.epoch, start.consumed + steps * pairs)
    whole = steps_per_epoch(n, micro_batch, micro_batches_per_step)
    epochs, rest = divmod(steps - left, whole)
    return Position(start.epoch + 1 + epochs, rest * pairs)


def pairs_at(
    position: Position,
    n: int,
    *,
    seed: int,
    strategy: str,
    micro_batch: int,
    micro_batches_per_step: int,
    used: int | None = None,
    curriculum: Curriculum | None = None,
) -> list[np.ndarray]:
    """The micro-batches of the optimizer step that begins at `position`: int64 arrays of rows.

    Each has `micro_batch` rows; the epoch's last may be shorter, and a step at an epoch's end has fewer micro-batches,
    since accumulation never crosses it. `used`: only so many of an epoch's order are used (None: all).
    """
    used = n if used is None else used
    position = _wrapped(position, used)
    end = min(position.consumed + micro_batch * micro_batches_per_step, used)
    rows = epoch_order(n, seed, position.epoch, strategy, curriculum)[position.consumed : end]
    return [rows[k : k + micro_batch] for k in range(0, len(rows), micro_batch)]


def step_pairs(
    n: int,
    *,
    seed: int,
    strategy: str,
    micro_batch: int,
    micro_batches_per_step: int,
    step: int,
    start: Position = START,
    curriculum: Curriculum | None = None,
) -> list[np.ndarray]:
    """The micro-batches of optimizer step `step` (from 0, counted from `start`); see `pairs_at`.

    A function of its arguments alone, so that every host, and a resumed run, finds the same rows.
    """
    position = position_after(step, n, micro_batch, micro_batches_per_step, start)
    return pairs_at(
        position,
        n,
        seed=seed,
        strategy=strategy,
        micro_batch=micro_batch,
        micro_batches_per_step=micro_batches_per_step,
        curriculum=curriculum,
    )


def _wrapped(position: Position, n: int) -> Position:
    if n < 1:
        raise ValueError("there are no pairs to take a step from")
    if not 0 <= position.consumed <= n:
        raise ValueError(f"{position.consumed} pairs of an epoch of {n} cannot be used up")
    return Position(position.epoch + 1, 0) if position.consumed == n else position
