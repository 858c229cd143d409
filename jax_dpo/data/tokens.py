"""Tokenized pairs as flat arrays: `TokenTable` (everything that text and tokenizer decide) and `TokenizedPairs` (a view of it
with rows left out and lengths cut as a run asks)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_dpo.data.batch import Tree
from jax_dpo.data.pairs import NUMBER_COLUMNS

EMPTY_CHOSEN, EMPTY_REJECTED, IDENTICAL, MOVED, TORN = 1, 2, 4, 8, 16


@dataclass(frozen=True)
class Facts:
    """What else is known of a tokenized data set, besides its arrays.

    `invalid` holds (row index, file index, row number, what is wrong) of every row that could not be tokenized.
    `unread_columns` are columns that nothing here uses, `absent_columns` those that should be read and that no row has.
    `read_as` are the changes by which rows became TRL's (`formats`), `hints` what may have been meant otherwise.
    `moved_end` is the end of the first prompt that the common-prefix rule took off, as text.
    """

    rows_read: int
    explicit: bool
    chat: bool
    invalid: list[tuple[int, int, int, str]] = field(default_factory=list)
    unread_columns: list[str] = field(default_factory=list)
    moved_end: str = ""
    absent_columns: list[str] = field(default_factory=list)
    read_as: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TokenTable:
    """All rows that can be tokenized, as TRL prepares them before any filter or truncation; N rows.

    ids: int32 [total tokens], prompt, chosen, rejected of row 0, then of row 1, ..
    bounds: int64 [3N+1], where each of these 3N pieces begins in `ids`
    row: int64 [N], index in the source; number: int64 [N], the number people find it by; file_of: int32 [N]
    twin: int64 [N], the first row of this table with the same texts (its own place where it is the first)
    gap: float64 [N], score of chosen minus score of rejected, NaN without scores
    given: float64 [N,6], what the columns of `pairs.NUMBER_COLUMNS` say, NaN where they are not read
    scored: uint8 [total tokens], 1 where a token of an answer is trained on (`turns`); [0] where all of them are
    flags: uint8 [N], bits EMPTY_CHOSEN, EMPTY_REJECTED, IDENTICAL, MOVED (the boundary is left of the prompt's end), TORN
        (`pairs.torn`)
    """

    ids: np.ndarray
    bounds: np.ndarray
    row: np.ndarray
    number: np.ndarray
    file_of: np.ndarray
    twin: np.ndarray
    gap: np.ndarray
    given: np.ndarray
    scored: np.ndarray
    flags: np.ndarray
    facts: Facts

    def __len__(self) -> int:
        return len(self.row)


class TokenizedPairs:
    """The pairs of a run: rows of a `TokenTable` in order, each side cut to the run's lengths. N pairs.

    table, kept: the rows `kept` [N] of `table`.
    max_length: each sequence (prompt and one answer) has at most so many tokens; None cuts nothing.
    truncation_mode: `keep_start` cuts at the end, `keep_end` at the beginning, chosen and rejected each on its own (TRL).
    max_prompt_length: before that, prompts lose what they have more, from the left (TRL before 0.29); None cuts nothing.
    """

    def __init__(
        self,
        table: TokenTable,
        kept: np.ndarray,
        *,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        max_prompt_length: int | None = None,
    ) -> None:
        self.table = table
        self._cuts: Any = {
            "max_length": max_length,
            "truncation_mode": truncation_mode,
            "max_prompt_length": max_prompt_length,
        }
        self.kept = np.asarray(kept, np.int64)
        self._whole = whole_lengths(table)[self.kept]
        prompt, answers = self._whole[:, :1], self._whole[:, 1:]
        if max_prompt_length is not None:
            prompt = np.minimum(prompt, max_prompt_length)
        self._prompt = prompt[:, 0]
        over = np.maximum(prompt + answers - max_length, 0) if max_length is not None else np.zeros_like(answers)
        self._over = over
        # Tokens that go from the prompt and from the answer of each side, [N,2].
        if truncation_mode == "keep_start":
            from_answer = np.minimum(over, answers)
            from_prompt = over - from_answer
            self._keep_start = True
        elif truncation_mode == "keep_end":
            from_prompt = np.minimum(over, prompt)
            from_answer = over - from_prompt
            self._keep_start = False
        else:
            raise ValueError(f"truncation_mode is {truncation_mode!r}, expected 'keep_start' or 'keep_end'")
        self._prompts = prompt - from_prompt
        self._answers = answers - from_answer
        self._scored = (
            self._answers - ((self._prompts == 0) & (self._answers > 0)) if not len(table.scored) else self._marked()
        )

    def _marked(self) -> np.ndarray:
        """int64 [N,2]: tokens of each answer that are left, marked in the table, and predicted by some token before them."""
        counted = np.concatenate([[0], np.cumsum(self.table.scored, dtype=np.int64)])
        begin, end = (self.table.bounds[3 * self.kept[:, None] + np.array(piece)] for piece in ([1, 2], [2, 3]))
        if self._keep_start:
            end = begin + self._answers
        else:
            begin = end - self._answers
        begin = begin + ((self._prompts == 0) & (self._answers > 0))
        return np.asarray(counted[end] - counted[begin])

    def without(self, positions: Sequence[int]) -> TokenizedPairs:
        """The pairs but for those at these positions."""
        return TokenizedPairs(self.table, np.delete(self.kept, np.asarray(positions, np.int64)), **self._cuts)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def index(self) -> np.ndarray:
        """int64 [N]: the row of the source that each pair is."""
        return self.table.row[self.kept]

    @property
    def gap(self) -> np.ndarray:
        """float64 [N]: score of chosen minus score of rejected, NaN where the row has none."""
        return self.table.gap[self.kept]

    def given(self, column: str) -> np.ndarray | None:
        """float32 [N]: the numbers of one of `NUMBER_COLUMNS`; None where they were not read, or the data have none."""
        values = self.table.given[self.kept, NUMBER_COLUMNS.index(column)]
        return None if np.isnan(values).all() else values.astype(np.float32)

    @property
    def shared(self) -> np.ndarray:
        """bool [N]: both answers see the same prompt. Always so under keep_start."""
        return np.asarray(self._prompts[:, 0] == self._prompts[:, 1])

    @property
    def cut(self) -> np.ndarray:
        """bool [N]: `max_length` cut one of the two sequences or both."""
        return np.asarray(self._over.any(1))

    @property
    def prompt_cut(self) -> np.ndarray:
        """bool [N]: `max_prompt_length` cut the prompt."""
        return np.asarray(self._prompt < self._whole[:, 0])

    def lengths(self) -> np.ndarray:
        """int32 [N,3]: tokens of prompt, chosen and rejected after truncation.

        Where the two sides see different prompts (`shared` is false), the prompt counted is the longer one. The answers'
        counts are what TRL's ipo and sigmoid_norm divide by: the sum of its completion mask before the shift.
        """
        return np.concatenate([self._prompts.max(1, keepdims=True), self._answers], 1).astype(np.int32)

    def branch_lengths(self) -> np.ndarray:
        """int32 [N,4]: tokens of the prompt that chosen sees, chosen, the prompt that rejected sees, rejected."""
        p, a = self._prompts, self._answers
        return np.stack([p[:, 0], a[:, 0], p[:, 1], a[:, 1]], 1).astype(np.int32)

    def tree_lengths(self, share_prompt: bool = True) -> np.ndarray:
        """int32 [N]: tokens that a pair takes in a packed row, the prompt counted once where it is shared."""
        total = self.branch_lengths().sum(1)
        return total - np.where(self.shared & share_prompt, self._prompts[:, 0], 0).astype(np.int32)

    def scored_lengths(self) -> np.ndarray:
        """int32 [N,2]: answer tokens that are trained on and that some token before them predicts: not the first where the prompt is
        empty."""
        return self._scored.astype(np.int32)

    def sequence_lengths(self) -> np.ndarray:
        """int32 [N,2]: tokens of prompt and answer together, as TRL's rows have them."""
        return (self._prompts + self._answers).astype(np.int32)

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(prompt, chosen, rejected) ids of pair `i` after truncation, int32.

        Raises `ValueError` where the two sides see different prompts; `tree` gives those.
        """
        prompt, chosen, other, rejected, shared, _ = self.tree(i)
        if not shared:
            raise ValueError(f"pair {i} has two prompts of {len(prompt)} and {len(other)} tokens: use tree()")
        return prompt, chosen, rejected

    def tree(self, i: int) -> Tree:
        """Pair `i` after truncation: the prompt that chosen sees, chosen, the prompt that rejected sees, rejected, shared."""
        prompt, *answers = self.prepared(i)
        (p, q), lengths = self._prompts[i].tolist(), self._answers[i].tolist()
        if self._keep_start:
            left = [slice(n) for n in lengths]
            prompts = prompt[:p], prompt[:q]
        else:
            left = [slice(len(answer) - n, None) for answer, n in zip(answers, lengths)]
            prompts = prompt[len(prompt) - p :], prompt[len(prompt) - q :]
        chosen, rejected = (answer[part] for answer, part in zip(answers, left))
        tree = Tree(prompts[0], chosen, prompts[1], rejected, p == q)
        if not len(self.table.scored):
            return tree
        _, b, c, d = self._bounds(i)
        marks = (self.table.scored[x:y][part].astype(bool) for x, y, part in zip((b, c), (c, d), left))
        return tree._replace(scored=(next(marks), next(marks)))

    def prepared(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(prompt, chosen, rejected) ids of pair `i` before `max_length`: TRL's prompt_ids, chosen_ids, rejected_ids."""
        ids = self.table.ids
        _, b, c, d = self._bounds(i)
        return ids[b - int(self._prompt[i]) : b], ids[b:c], ids[c:d]

    def _bounds(self, i: int) -> list[int]:
        """Where prompt, chosen and rejected of pair `i` begin in the table's ids, and where the last ends."""
        k = int(self.kept[i])
        return [int(x) for x in self.table.bounds[3 * k : 3 * k + 4]]

    def content_hash(self) -> str:
        """A hash of the token ids of all pairs after truncation, in order."""
        t = self.table
        which_end = self._keep_start if self.cut.any() else None
        found = hashlib.blake2b(f"{len(self)} {which_end}".encode(), digest_size=20)
        for part in (t.ids, t.bounds, self.kept, self._prompt, self.branch_lengths(), t.scored):
            found.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        return found.hexdigest()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The pairs as TRL's data set has them after preparation: prompt_ids, chosen_ids, rejected_ids as lists."""
        for i in range(len(self)):
            yield dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (part.tolist() for part in self.prepared(i))))


def whole_lengths(table: TokenTable) -> np.ndarray:
    """int64 [N,3]: tokens of prompt, chosen and rejected of every row of a table, uncut."""
    return np.diff(table.bounds).reshape(-1, 3)
