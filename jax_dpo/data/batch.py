"""Packed pair trees as arrays.

Letters: R rows, T tokens, K scored tokens a row, S pair slots a row, B branches of a pair (0 chosen, 1 rejected).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_dpo.data.pack import RowShape

BRANCHES = 2
# Where a batch has what a column of the data says.
FIELD_OF = {"beta": "beta", "margin": "margin", "label": "label", "weight": "pair_weight"}


class Batch(NamedTuple):
    """Rows of trees; numpy on the host, arrays on the device. A step's batch has a leading axis of micro-batches."""

    tokens: Any
    """[R, T] int32 token ids."""
    positions: Any
    """[R, T] int32 position of each token in its own sequence (prompt + its answer)."""
    pair: Any
    """[R, T] int32 tree number in the row, from 1; 0 is padding."""
    branch: Any
    """[R, T] int32 0 for the prompt, 1 for the chosen and 2 for the rejected answer."""
    source: Any
    """[R, K] int32 place in the row of the hidden state that predicts the scored token."""
    target: Any
    """[R, K] int32 the scored token."""
    slot: Any
    """[R, K] int32 2 * (pair slot) + (0 chosen, 1 rejected); 2 S is padding."""
    weight: Any
    """[R, S] float32 the pair's share of the step's loss; 0 in an empty slot."""
    length: Any
    """[R, S, 2] int32 completion lengths as TRL counts them (with a first token that nothing predicts)."""
    index: Any
    """[R, S] int32 position of the pair in the prepared data; -1 in an empty slot."""
    token_weight: Any = None
    """[R, K] float32 LD-DPO's weight of each scored token, where it is on."""
    sft_weight: Any = None
    """[R, K] float32 the token's share of the `sft` term, where the loss has one."""
    ref_logps: Any = None
    """[R, S, 2] float32 the reference's log-probabilities of both answers, where they were computed before training."""
    beta: Any = None
    """[R, S] float32 the pair's beta, as a multiple of the one in force; this and the next three come from columns of the data."""
    margin: Any = None
    """[R, S] float32 by how much the pair's reward of chosen should exceed that of rejected."""
    label: Any = None
    """[R, S] float32 the probability that chosen is the better answer."""
    pair_weight: Any = None
    """[R, S] float32 how many times the pair's loss counts."""
    owner: Any = None
    """[R, T] int32 the pair slot that each token belongs to, S for padding; where a router's loss is made."""
    copies: Any = None
    """[R, T] int32 in how many of its two padded rows TRL has the token: 2 in a shared prompt; beside `owner`."""
    group: Any = None
    """[R, S, 2] int32 TRL's micro-batch in the step and the pair's place in it, where a loss mixes its pairs; -1 in an empty slot."""


class Tree(NamedTuple):
    """A pair's token ids: prompt and answer of both sides; `shared` if both sides see the same prompt and it is laid out once; which
    tokens of each answer are trained on (None: all)."""

    chosen_prompt: np.ndarray
    chosen: np.ndarray
    rejected_prompt: np.ndarray
    rejected: np.ndarray
    shared: bool
    scored: tuple[np.ndarray, np.ndarray] | None = None


def tree_tokens(tree: Tree) -> int:
    prompts = len(tree.chosen_prompt) + (0 if tree.shared else len(tree.rejected_prompt))
    return prompts + len(tree.chosen) + len(tree.rejected)


def empty_batch(
    rows: int,
    shape: RowShape,
    *,
    token_weight: bool = False,
    sft: bool = False,
    group: bool = False,
    router: bool = False,
) -> Batch:
    """Rows of nothing but padding."""
    R, T, K, S = rows, shape.row_tokens, shape.row_scored, shape.row_pairs
    ints = lambda *axes: np.zeros(axes, np.int32)  # noqa: E731
    return Batch(
        tokens=ints(R, T),
        positions=ints(R, T),
        pair=ints(R, T),
        branch=ints(R, T),
        source=ints(R, K),
        target=ints(R, K),
        slot=np.full((R, K), BRANCHES * S, np.int32),
        weight=np.zeros((R, S), np.float32),
        length=ints(R, S, BRANCHES),
        index=np.full((R, S), -1, np.int32),
        token_weight=np.zeros((R, K), np.float32) if token_weight else None,
        sft_weight=np.zeros((R, K), np.float32) if sft else None,
        owner=np.full((R, T), S, np.int32) if router else None,
        copies=ints(R, T) if router else None,
        group=np.full((R, S, 2), -1, np.int32) if group else None,
    )


class _Row:
    """Fills one row of a batch, tree after tree."""

    def __init__(self, batch: Batch, row: int) -> None:
        self.batch, self.row = batch, row
        self.at = self.scored = self.trees = self.slots = 0

    def _tokens(self, ids: np.ndarray, branch: int, first_position: int, copies: int = 1) -> int:
        """Writes ids at the end of the row; returns where they begin."""
        b, r, start = self.batch, self.row, self.at
        stop = start + len(ids)
        b.tokens[r, start:stop] = ids
        b.positions[r, start:stop] = np.arange(first_position, first_position + len(ids))
        b.pair[r, start:stop] = self.trees
        b.branch[r, start:stop] = branch
        if b.owner is not None:
            b.owner[r, start:stop] = self.slots
            b.copies[r, start:stop] = copies
        self.at = stop
        return start

    def _score(
        self, ids: np.ndarray, start: int, before: int, side: int, marked: np.ndarray | None
    ) -> tuple[slice, np.ndarray]:
        """Marks the answer `ids` at `start` as scored, or those of its tokens that are `marked`; `before` is the place of the token before
        it, -1 if there is none. Returns where they lie among the row's scored tokens, and their places in the answer."""
        b, r = self.batch, self.row
        source = np.arange(start - 1, start + len(ids) - 1)
        source[:1] = before
        place = np.arange(len(ids)) if marked is None else np.flatnonzero(marked)
        if before < 0:
            place = place[place > 0]
        here = slice(self.scored, self.scored + len(place))
        b.source[r, here], b.target[r, here] = source[place], ids[place]
        b.slot[r, here] = BRANCHES * self.slots + side
        self.scored += len(place)
        return here, place

    def add(self, tree: Tree, placed: Placed, ld_alpha: float | None) -> None:
        """Lays out one pair; with prompts of their own, both sides are trees of one branch and share only the slot."""
        b, r = self.batch, self.row
        shorter = min(len(tree.chosen), len(tree.rejected))
        before = -1
        for side, (prompt, answer) in enumerate(
            ((tree.chosen_prompt, tree.chosen), (tree.rejected_prompt, tree.rejected))
        ):
            if side == 0 or not tree.shared:
                self.trees += 1
                start = self._tokens(prompt, 0, 0, 2 if tree.shared else 1)
                before = start + len(prompt) - 1 if len(prompt) else -1
            start = self._tokens(answer, side + 1, len(prompt))
            marked = None if tree.scored is None else tree.scored[side]
            here, place = self._score(answer, start, before, side, marked)
            b.length[r, self.slots, side] = len(answer) if marked is None else marked.sum()
            if b.token_weight is not None:
                b.token_weight[r, here] = np.where(place < shorter, 1.0, ld_alpha if ld_alpha is not None else 1.0)
            if b.sft_weight is not None and side == 0:
                b.sft_weight[r, here] = placed.sft_weight
        b.weight[r, self.slots] = placed.weight
        b.index[r, self.slots] = placed.pair
        if b.group is not None:
            b.group[r, self.slots] = placed.group, placed.place
        self.slots += 1


def with_ref_logps(batch: Batch, logps: np.ndarray) -> Batch:
    """The batch with the reference's log-probabilities [N, 2] of its pairs; 0 in empty slots."""
    real = batch.index >= 0
    return batch._replace(ref_logps=np.where(real[..., None], logps[np.where(real, batch.index, 0)], np.float32(0)))


def with_columns(batch: Batch, columns: Mapping[str, np.ndarray]) -> Batch:
    """The batch with what columns say of its pairs: {field of `Batch`: [N]}; 0 in empty slots.

    A pair's weight counts for its tokens in the `sft` term too.
    """
    real = batch.index >= 0
    found = {
        name: np.where(real, values[np.where(real, batch.index, 0)], np.float32(0)) for name, values in columns.items()
    }
    if batch.sft_weight is not None and "pair_weight" in found:
        weight = np.concatenate([found["pair_weight"], np.zeros_like(found["pair_weight"][..., :1])], axis=-1)
        of_token = np.take_along_axis(weight, batch.slot // BRANCHES, axis=-1)
        found["sft_weight"] = batch.sft_weight * of_token
    return batch._replace(**found)


class Placed(NamedTuple):
    """A pair, its shares of the step (of the loss, and of the `sft` term for each of its chosen tokens), and its place in TRL's
    micro-batches of the step."""

    pair: int
    weight: float
    sft_weight: float = 0.0
    group: int = 0
    place: int = 0


def fill_rows(
    batch: Batch, first_row: int, rows: Sequence[Sequence[Placed]], trees: Any, ld_alpha: float | None = None
) -> None:
    """Writes packed rows into `batch` from `first_row` on; `trees(index) -> Tree`."""
    for r, placed in enumerate(rows):
        row = _Row(batch, first_row + r)
        for p in placed:
            row.add(trees(p.pair), p, ld_alpha)
