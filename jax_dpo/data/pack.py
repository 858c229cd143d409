"""Pair trees into rows of one shape: how large the rows are, and which trees lie in which row.

Pure functions of lengths, so that every host computes the same.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Sizes(NamedTuple):
    """What a pair takes up in a row, int64 [N] each."""

    tokens: np.ndarray
    """tokens of the tree: the prompt (once where it is shared) and both answers."""
    scored: np.ndarray
    """scored tokens of both answers."""


@dataclass(frozen=True)
class RowShape:
    """The one shape of all micro-batches: `rows` rows for each row shard, each of T tokens, K scored tokens and S pairs."""

    row_tokens: int
    row_scored: int
    row_pairs: int
    rows: int


class Cost(NamedTuple):
    """What a row costs, in any unit: per token, per pair of tokens that attend each other, per scored token; and what each
    micro-batch costs on top."""

    token: float
    attention: float
    scored: float
    micro_batch: float

    def of(self, shape: RowShape, micro_batches: float) -> float:
        T = shape.row_tokens
        row = T * self.token + 0.5 * T * T * self.attention + shape.row_scored * self.scored
        return micro_batches * (shape.rows * row + self.micro_batch)


def pack(sizes: Sizes, shape: RowShape) -> list[list[int]]:
    """Trees into as few rows as best-fit decreasing finds: lists of positions in `sizes`, one list a row.

    Raises:
      ValueError: a tree that no row can hold.
    """
    T, K, S = shape.row_tokens, shape.row_scored, shape.row_pairs
    order = np.argsort(-sizes.tokens, kind="stable")
    rows: list[list[int]] = []
    scored_left: list[int] = []
    open_rows: list[tuple[int, int]] = []  # (tokens left, row), sorted: the first that fits is the tightest
    for i in order.tolist():
        need, marks = int(sizes.tokens[i]), int(sizes.scored[i])
        if need > T or marks > K:
            raise ValueError(f"a tree of {need} tokens ({marks} scored) does not fit a row of {T} ({K})")
        at = bisect.bisect_left(open_rows, (need, -1))
        while at < len(open_rows) and scored_left[open_rows[at][1]] < marks:
            at += 1
        if at < len(open_rows):
            left, row = open_rows.pop(at)
        else:
            left, row = T, len(rows)
            rows.append([])
            scored_left.append(K)
        rows[row].append(i)
        scored_left[row] -= marks
        if len(rows[row]) < S:
            bisect.insort(open_rows, (left - need, row))
    return rows


Rows = list[list[int]]


def layout(sizes: Sizes, shape: RowShape, row_shards: int, groups: Sequence[np.ndarray] | None = None) -> list[Rows]:
    """The rows of each micro-batch: as few as the trees need, and at least one.

    Args:
      groups: positions in `sizes` that must lie in one and the same micro-batch; None where any may lie anywhere.

    Raises:
      ValueError: a tree that no row can hold, or a group that no micro-batch can hold.
    """
    room = shape.rows * row_shards
    if groups is None:
        rows = pack(sizes, shape)
        return [rows[at : at + room] for at in range(0, max(len(rows), 1), room)]
    found: list[Rows] = []
    held: list[int] = []
    for group in groups:
        together = [*held, *group.tolist()]
        rows = _pack_some(sizes, together, shape)
        if held and len(rows) > room:
            together = group.tolist()
            rows = _pack_some(sizes, together, shape)
            found.append(rows)
        elif found:
            found[-1] = rows
        else:
            found.append(rows)
        if len(rows) > room:
            raise ValueError(f"a group of {len(group)} trees takes {len(rows)} rows, and a micro-batch has {room}")
        held = together
    return found or [[]]


def _pack_some(sizes: Sizes, which: list[int], shape: RowShape) -> Rows:
    rows = pack(Sizes(sizes.tokens[which], sizes.scored[which]), shape)
    return [[which[i] for i in row] for row in rows]


def micro_batches(rows: int, shape: RowShape, row_shards: int) -> int:
    """How many micro-batches `rows` packed rows need (at least one)."""
    return max(1, -(-rows // (shape.rows * row_shards)))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _mean_micro_batches(samples: Sequence[Sizes], shape: RowShape, row_shards: int) -> float:
    return float(np.mean([micro_batches(len(pack(s, shape)), shape, row_shards) for s in samples]))


def _best_scored(samples: Sequence[Sizes], whole: Sizes, T: int) -> tuple[int, int]:
    """K and S that the packing of the samples uses when only T binds."""
    free = RowShape(T, int(whole.scored.sum()) + 1, 1 << 30, 1)
    scored, pairs = int(whole.scored.max(initial=1)), 1
    for s in samples:
        for row in pack(s, free):
            scored = max(scored, int(s.scored[row].sum()))
            pairs = max(pairs, len(row))
    return _round_up(scored, 8), pairs


def choose_shape(
    whole: Sizes,
    steps: Sequence[np.ndarray],
    *,
    row_shards: int,
    micro_batch_tokens: int,
    cost: Cost,
    granule: int = 128,
    least_rows: int = 1,
    packing: bool = True,
) -> RowShape:
    """The cheapest shape for the given steps of a run.

    T is a multiple of `granule` that holds the longest tree of the data, so no pair is ever cut to fit; longer rows are tried too,
    since they leave less room unused where trees are few to a row. All candidates are packed and their cost compared.

    Args:
      whole: sizes of all pairs, evaluation included.
      steps: for some optimizer steps, the pairs of each (positions in `whole`).
      row_shards: number of data-parallel devices.
      micro_batch_tokens: how many tokens a micro-batch may hold on one device (`least_rows` rows always may).
      least_rows: fewest rows of a micro-batch on one device.
      packing: several pairs may share a row; else each has its own, of the length of the longest.
    """
    shortest = _round_up(max(int(whole.tokens.max(initial=1)), 1), granule)
    samples = [Sizes(whole.tokens[s], whole.scored[s]) for s in steps]
    least = int(whole.scored.max(initial=1))
    if not packing:
        most = -(-max((len(s) for s in steps), default=1) // row_shards)
        rows = min(most, max(least_rows, micro_batch_tokens // shortest, 1))
        return RowShape(shortest, least, 1, rows)
    best: tuple[float, RowShape] | None = None
    for T in range(shortest, max(4 * shortest, 1024) + 1, granule):
        if shortest < T and micro_batch_tokens < T * least_rows:
            break
        K, S = _best_scored(samples, whole, T)
        for scored in sorted({max(least, _round_up(int(K * share), 8)) for share in (1.0, 0.9, 0.8)}):
            most = max(
                1, -(-len(pack(max(samples, key=lambda s: s.tokens.sum()), RowShape(T, scored, S, 1))) // row_shards)
            )
            for rows in _row_counts(most, max(least_rows, micro_batch_tokens // T), least_rows):
                shape = RowShape(T, scored, S, rows)
                price = cost.of(shape, _mean_micro_batches(samples, shape, row_shards))
                if best is None or price < best[0] * 0.999:
                    best = (price, shape)
        if 8 * shortest <= T or len(samples) == 0:
            break
    assert best is not None
    return best[1]


def _row_counts(needed: int, allowed: int, least: int) -> list[int]:
    """Row counts worth trying: what a whole step needs, and its parts."""
    counts = {min(allowed, max(least, -(-needed // parts))) for parts in range(1, 9)} | {least}
    return sorted(counts, reverse=True)


def row_fill(tokens: int, micro_batches: int, shape: RowShape, row_shards: int) -> float:
    """Share of the computed tokens that are real."""
    return tokens / (micro_batches * shape.rows * row_shards * shape.row_tokens)
