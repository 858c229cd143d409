"""Rows for tokens that a model does not have: embedding and head made longer, without a copy of what is there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from jax_dpo.weights.leaves import Index, Leaf, full_index
from jax_dpo.weights.model_files import ModelFiles

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_ROWS = 4096  # rows that are read at a time for the mean


@dataclass(frozen=True)
class Grown:
    """A table [V, D] with `extra` rows more, each the mean of those that are there.

    transformers' `resize_token_embeddings` draws new rows around the same mean, with 1e-9 of the table's covariance; these have no
    noise, so that two runs, and a run and what it is held against, begin alike.
    """

    table: Leaf
    extra: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.table.shape[0] + self.extra, *self.table.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.table.dtype

    @cached_property
    def row(self) -> np.ndarray:
        """[D]: the mean, summed in float64."""
        count = self.table.shape[0]
        total = np.zeros(self.table.shape[1:], np.float64)
        for start in range(0, count, _ROWS):
            total += self.table.read((slice(start, start + _ROWS),)).astype(np.float64).sum(0)
        return (total / count).astype(np.float32).astype(self.dtype)

    def read(self, index: Index = ()) -> np.ndarray:
        first, columns = full_index(index, 2)
        count = self.table.shape[0]
        chosen = range(count + self.extra)[first]
        if isinstance(chosen, int):
            return self.table.read((chosen, columns)) if chosen < count else np.array(self.row[columns])
        old = range(chosen.start, min(chosen.stop, count), chosen.step)
        new = np.repeat(self.row[columns][None], len(chosen) - len(old), axis=0)
        if not old:
            return new
        there = self.table.read((slice(old.start, old.stop, old.step), columns))
        return np.concatenate([there, new]) if len(new) else there


def grow(files: ModelFiles, rows: int) -> ModelFiles:
    """The model with at least `rows` rows for tokens; the same where it has them, spare ones of a padded table among them."""
    extra = rows - files.config.vocab_size
    if extra <= 0:
        return files
    tables = {path: Grown(files.leaves[path], extra) for path in TABLES if path in files.leaves}
    return replace(
        files,
        hf_config={**files.hf_config, "vocab_size": rows},
        config=replace(files.config, vocab_size=rows),
        leaves={**files.leaves, **tables},
        altered=True,
    )
