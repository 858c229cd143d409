"""Rows for added tokens. Oracle: numpy on the whole table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jax_dpo import load_model
from jax_dpo.weights.grow import Grown, grow
from jax_dpo.weights.leaves import Index, InMemory
from jax_dpo.weights.source import open_model

MODELS = Path(__file__).parents[1] / "golden" / "models"
WHOLE = slice(None)


@pytest.mark.parametrize(
    "index",
    [
        (),
        (WHOLE, slice(2, 4)),
        (slice(0, 3),),
        (slice(4, 9), slice(1, None)),
        (slice(6, 8),),
        (slice(7, None), 2),
        (slice(0, 9, 2),),
        (1,),
        (8, slice(0, 2)),
        (-1,),
        (..., 0),
        (slice(3, 3),),
    ],
)
def test_any_part_is_that_part_of_the_whole(index: Index) -> None:
    table = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    whole = np.concatenate([table, np.repeat(table.mean(0, dtype=np.float64).astype(np.float32)[None], 3, 0)])
    leaf = Grown(InMemory(table), 3)
    assert leaf.shape == whole.shape
    np.testing.assert_array_equal(leaf.read(index), whole[tuple(index)])


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_model_grows_in_embedding_and_head(family: str) -> None:
    """An own head (llama) and a tied one (gemma): what was there answers as before, a new token as the mean of all."""
    files = open_model(MODELS / family)
    rows = files.config.vocab_size
    assert grow(files, rows) is files and grow(files, rows - 5) is files
    before = load_model(MODELS / family)
    after = before.with_rows(rows + 3)
    assert after.config.vocab_size == after.files.hf_config["vocab_size"] == rows + 3
    ids = np.arange(12)[None] % rows
    old, new = np.asarray(before(ids)), np.asarray(after(ids))
    np.testing.assert_allclose(new[..., :rows], old, atol=1e-5)
    if before.config.logit_softcap is None:
        np.testing.assert_allclose(new[..., rows:], np.repeat(old.mean(-1, keepdims=True), 3, -1), atol=2e-5)
