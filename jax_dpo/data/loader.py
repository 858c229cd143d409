"""From the pairs of a step to its packed batch, made ahead of time by a thread.

What a step holds is a pure function of (lengths, seed, step); a process fills only the rows that its own devices take.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from jax_dpo.data.batch import Batch, Placed, Tree, empty_batch, fill_rows
from jax_dpo.data.pack import Rows, RowShape, Sizes, layout, pack, row_fill


class PairSource(Protocol):
    """Tokenized pairs, as `tokenize.TokenizedPairs` has them."""

    def __len__(self) -> int: ...
    def tree(self, i: int) -> Tree: ...


@dataclass(frozen=True)
class Feed:
    """What is fixed about the batches of a run.

    `first_row` and `last_row` are the rows of a micro-batch (of `shape.rows * row_shards` in all) that this process fills;
    `most` is the number of micro-batches that every step's arrays have room for. `whole_groups`: the pairs of each of TRL's
    micro-batches lie in one micro-batch here, for losses that mix them. `router`: tokens say whose they are.
    """

    shape: RowShape
    row_shards: int
    first_row: int
    last_row: int
    most: int
    ld_alpha: float | None = None
    sft: bool = False
    whole_groups: bool = False
    router: bool = False

    @property
    def rows(self) -> int:
        return self.shape.rows * self.row_shards


class StepBatch(NamedTuple):
    """One optimizer step's data on the host."""

    batch: Batch
    """arrays [A, rows of this process, ...]"""
    micro_batches: int
    """how many of the A micro-batches hold anything"""
    pairs: np.ndarray
    """the pairs of the step, in order"""
    groups: int
    """how many of TRL's micro-batches they are"""
    tokens: int
    """real tokens laid out in rows (a shared prompt once)"""
    trl_tokens: int
    """tokens as TRL's num_tokens counts them (the prompt in both sequences)"""
    fill: float
    """share of the computed tokens that are real"""


def shares(groups: Sequence[np.ndarray], chosen_scored: Callable[[int], int] | None) -> list[Placed]:
    """Every pair's share of its step: TRL means over the pairs of a micro-batch, then over the micro-batches of the step.

    The `sft` term is a mean over the chosen tokens of the micro-batch in place of its pairs.
    """
    placed: list[Placed] = []
    for number, group in enumerate(groups):
        share = 1.0 / (len(groups) * len(group))
        sft = 0.0
        if chosen_scored is not None:
            sft = 1.0 / (len(groups) * max(sum(chosen_scored(int(i)) for i in group), 1))
        placed += [Placed(int(i), share, sft, number, place) for place, i in enumerate(group)]
    return placed


def _arrays(source: PairSource, placed: Sequence[Placed], parts: list[Rows], feed: Feed, most: int) -> Batch:
    """The rows of each micro-batch as [most, this process's rows, ...] arrays."""
    mine = feed.last_row - feed.first_row
    kinds = {"token_weight": feed.ld_alpha is not None, "sft": feed.sft, "group": feed.whole_groups}
    kinds["router"] = feed.router
    filled = []
    for a in range(most):
        part = empty_batch(mine, feed.shape, **kinds)
        these = parts[a][feed.first_row : feed.last_row] if a < len(parts) else []
        fill_rows(part, 0, [[placed[i] for i in row] for row in these], source.tree, feed.ld_alpha)
        filled.append(part)
    stacked = (None if xs[0] is None else np.stack(xs) for xs in zip(*filled, strict=True))
    return Batch(*stacked)


def places(groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Positions of each group's pairs in the step."""
    ends = np.cumsum([len(group) for group in groups])
    return [np.arange(end - len(group), end) for end, group in zip(ends, groups)]


def step_batch(
    source: PairSource,
    sizes: Sizes,
    trl_tokens: np.ndarray,
    chosen_scored: np.ndarray,
    groups: Sequence[np.ndarray],
    feed: Feed,
) -> StepBatch:
    """The batch of one optimizer step.

    Args:
      groups: TRL's micro-batches, arrays of pair indices.
      trl_tokens, chosen_scored: [N] per pair, tokens as TRL counts them and scored tokens of the chosen answer.
    """
    placed = shares(groups, (lambda i: int(chosen_scored[i])) if feed.sft else None)
    pairs = np.array([p.pair for p in placed])
    together = places(groups) if feed.whole_groups else None
    parts = layout(Sizes(sizes.tokens[pairs], sizes.scored[pairs]), feed.shape, feed.row_shards, together)
    tokens = int(sizes.tokens[pairs].sum())
    return StepBatch(
        batch=_arrays(source, placed, parts, feed, feed.most),
        micro_batches=len(parts),
        pairs=pairs,
        groups=len(groups),
        tokens=tokens,
        trl_tokens=int(trl_tokens[pairs].sum()),
        fill=row_fill(tokens, len(parts), feed.shape, feed.row_shards),
    )


def evaluation_batches(source: PairSource, sizes: Sizes, feed: Feed) -> Iterator[Batch]:
    """Every pair once, in batches [rows of this process, ...] of the training shape; weight 1 each, without what only a step needs."""
    feed = replace(feed, sft=False, whole_groups=False)
    rows = pack(sizes, feed.shape)
    placed = [Placed(i, 1.0) for i in range(len(sizes.tokens))]
    for start in range(0, len(rows), feed.rows):
        batch = _arrays(source, placed, [rows[start : start + feed.rows]], feed, 1)
        yield Batch(*(None if x is None else x[0] for x in batch))


T = TypeVar("T")
_END: Any = object()


def prefetch(items: Iterable[T], depth: int = 2) -> Generator[T]:
    """The items, made by a thread up to `depth` ahead; an exception there is raised here, and leaving the loop ends the thread."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(x: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(x, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as e:
            put(e)

    thread = threading.Thread(target=work, name="jax-dpo-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(timeout=5)
