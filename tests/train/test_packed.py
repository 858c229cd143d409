"""Packed pair trees against two padded rows a pair, token by token. Oracle: `decoder.logits` of the padded rows and automatic
differentiation of plain log-probabilities and KL from whole logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_engine as tiny

from jax_dpo.arrays import Tree, flatten, unflatten
from jax_dpo.data.batch import Batch
from jax_dpo.models.config import ModelConfig
from jax_dpo.models.decoder import logits
from jax_dpo.train.forward import statistics
from jax_dpo.train.state import Frozen
from jax_dpo.trainer.engine import Engine

PAIRS = 8


def windowed() -> ModelConfig:
    """A window of 5 tokens in every other layer: shorter than most prompts, so that answers look past each other's tokens."""
    return replace(tiny.shape_of(num_hidden_layers=3), layer_windows=(5, None, 5))


SHAPES = {
    "llama": tiny.shape_of(num_hidden_layers=2),
    "windows": windowed(),
    "gemma2": tiny.gemma2(),
    "mixtral": tiny.mixtral(),
    "norms of q and k, tied": replace(tiny.shape_of(num_hidden_layers=2, tie_word_embeddings=True), qk_norm=True),
}


def weights(config: ModelConfig, seed: int) -> Tree:
    return unflatten({path: jnp.asarray(x) for path, x in tiny.weights_of(config, seed).items()})


def answers(engine: Engine, pair: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, answer) of both sides."""
    assert engine.train_set is not None
    tree = engine.train_set.tree(pair)
    return [(tree.chosen_prompt, tree.chosen), (tree.rejected_prompt, tree.rejected)]


def weight_of(pair: int, side: int, tokens: int) -> np.ndarray:
    """[2, tokens]: what the test multiplies log-probabilities and KLs of an answer with."""
    return np.random.default_rng([pair, side]).standard_normal((2, tokens)).astype(np.float32)


def padded(
    engine: Engine, pairs: list[int], params: Tree, ref: Tree
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """The weighed sum over all answers, and (log-probabilities, KLs) of each: pair by pair, chosen before rejected."""
    config = engine.facts.policy
    rows = [np.concatenate(x) for pair in pairs for x in answers(engine, pair)]
    ids = np.stack([np.pad(row, (0, 64 - len(row))) for row in rows])
    mask = np.stack([np.arange(64) < len(row) for row in rows]).astype(np.int32)
    log_pi, log_ref = (
        jax.nn.log_softmax(logits(config, p, jnp.asarray(ids), jnp.asarray(mask))) for p in (params, ref)
    )
    kl = jnp.sum(jnp.exp(log_pi) * (log_pi - log_ref), -1)
    total, found = jnp.float32(0), []
    for row, (pair, side) in enumerate((p, s) for p in pairs for s in (0, 1)):
        prompt, answer = answers(engine, pair)[side]
        before = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logp = log_pi[row, before][np.arange(len(answer)), answer]
        by_logp, by_kl = weight_of(pair, side, len(answer))
        total += jnp.sum(logp * by_logp) + jnp.sum(kl[row, before] * by_kl)
        found.append((logp, kl[row, before]))
    return total, found


def token_weights(batch: Batch, pairs: list[int], engine: Engine) -> tuple[np.ndarray, list[np.ndarray]]:
    """[2, R, K] of the weights where the packed batch has each token, and the place of each answer as a mask [R, K]."""
    places = []
    found = np.zeros((2, *batch.slot.shape), np.float32)
    for pair in pairs:
        row, slot = np.argwhere(np.asarray(batch.index) == pair)[0]
        for side in (0, 1):
            here = np.zeros(batch.slot.shape, bool)
            here[row] = np.asarray(batch.slot[row]) == 2 * slot + side
            found[:, here] = weight_of(pair, side, len(answers(engine, pair)[side][1]))
            places.append(here)
    return found, places


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("llama", {}, marks=pytest.mark.slow),
        pytest.param("windows", {"gradient_checkpointing": False}, marks=pytest.mark.slow),
        pytest.param("norms of q and k, tied", {}, marks=pytest.mark.slow),
        ("gemma2", {}),
        pytest.param("mixtral", {}, marks=pytest.mark.slow),
        pytest.param("mixtral", {"gradient_checkpointing": False}, marks=pytest.mark.slow),
        pytest.param("windows", {"share_prompt": False}, marks=pytest.mark.slow),
    ],
)
def test_trees_are_padded_rows(name: str, options: dict[str, Any]) -> None:
    config = SHAPES[name]
    engine = tiny.engine_on((1, 1, 1), pairs_per_step=PAIRS, shape=config, **options)
    if not options.get("share_prompt", True):
        engine.train_set = replace(engine.train_set, share_prompt=False)
    made = engine.batch_at(engine.plan.after(0))
    batch = Batch(*(None if x is None else jnp.asarray(x[0]) for x in made.batch))
    pairs = sorted(int(i) for i in made.pairs)
    assert made.micro_batches == 1 and len(pairs) == PAIRS and max(np.asarray(batch.pair).max(1)) > 1
    by, places = token_weights(batch, pairs, engine)
    params, ref = weights(config, 0), weights(config, 1)

    def packed(params: Tree) -> tuple[jax.Array, Any]:
        stats = statistics(engine.facts, params, Frozen({}, ref), batch, engine.mesh, None)
        return jnp.sum(stats.logp * by[0]) + jnp.sum(stats.kl * by[1]), stats

    (_, stats), gradient = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    (_, wanted), expected = jax.jit(jax.value_and_grad(lambda p: padded(engine, pairs, p, ref), has_aux=True))(params)
    assert len(places) == len(wanted) == 2 * PAIRS
    for place, (logp, kl) in zip(places, wanted):
        np.testing.assert_allclose(np.asarray(stats.logp)[place], logp, atol=2e-5)
        np.testing.assert_allclose(np.asarray(stats.kl)[place], kl, atol=2e-5, rtol=1e-4)
    for path, want in flatten(expected).items():
        difference = float(jnp.linalg.norm(flatten(gradient)[path] - want))
        assert difference < 2e-5 * float(jnp.linalg.norm(want)), path
