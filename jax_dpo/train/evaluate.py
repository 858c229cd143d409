"""Held-out pairs through the training step's own forward pass, every pair counted once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_dpo.arrays import Tree
from jax_dpo.data.batch import Batch
from jax_dpo.loss.family import LossOptions, mixed_loss
from jax_dpo.loss.scores import CHOSEN, PairSums
from jax_dpo.train import metrics
from jax_dpo.train.state import Frozen, Knobs

Evaluator = Callable[[Tree, Frozen, Batch, Knobs], tuple[Any, PairSums]]


@dataclass(frozen=True)
class EvalSet:
    """A held-out set: its name (None where it is the only one), its pairs' number and its batches on the devices, anew each time.

    `group` pairs are one of TRL's evaluation batches, over which the `sft` term is a mean and in which `aot*` sorts.
    """

    name: str | None
    pairs: int
    batches: Callable[[], Iterator[Batch]]
    group: int

    @property
    def prefix(self) -> str:
        """What stands before the names of its metrics."""
        return "eval_" if self.name is None else f"eval_{self.name}_"


def evaluate(
    run: Evaluator, held_out: EvalSet, params: Tree, frozen: Frozen, knobs: Knobs, options: LossOptions
) -> dict[str, float]:
    """Metrics of a held-out set under `eval_` (and the set's name), with `runtime` and speed.

    The loss is the mean over pairs; the `sft` term of a pair is the mean over the chosen tokens of its evaluation batch, and `aot*`
    sorts within that batch.
    """
    began = time.perf_counter()
    seen: list[tuple[np.ndarray, np.ndarray, PairSums]] = []
    for batch in held_out.batches():
        loss, sums = run(params, frozen, batch, knobs)
        seen.append((_whole(batch.index), np.asarray(loss), PairSums(*(np.asarray(x) for x in sums))))
    index = np.concatenate([i.reshape(-1) for i, _, _ in seen])
    order = np.argsort(index)[np.sum(index < 0) :]  # in the order of the set: sums do not depend on the packing
    loss = np.concatenate([x.reshape(-1) for _, x, _ in seen])[order]
    sums = PairSums(*(np.concatenate([x.reshape(-1, 2) for x in xs])[order] for xs in zip(*(s for _, _, s in seen))))
    if "sft" in options.types:
        share = dict(zip(options.types, options.weights))["sft"]
        which = np.arange(len(loss)) // held_out.group
        logp, tokens = (np.bincount(which, x[:, CHOSEN].astype(np.float64)) for x in (sums.logp, sums.tokens))
        loss = loss - share * (logp / np.maximum(tokens, 1.0))[which]
    if options.mixes_pairs:
        place = np.arange(len(loss))
        group = np.stack([place // held_out.group, place % held_out.group], axis=-1)
        one_row = PairSums(*(None if x is None else jnp.asarray(x)[None] for x in sums))
        total = mixed_loss(one_row, jnp.asarray(group)[None], jnp.ones((1, len(loss))), knobs.beta, options)
        loss = loss + float(total) / len(loss)
    found = metrics.evaluation(loss.astype(np.float64), sums, float(knobs.beta))
    seconds = time.perf_counter() - began
    found |= {"runtime": seconds, "samples_per_second": held_out.pairs / seconds}
    found["steps_per_second"] = math.ceil(held_out.pairs / held_out.group) / seconds
    return {held_out.prefix + name: value for name, value in found.items()}


def _whole(x: Any) -> np.ndarray:
    """An array that is sharded over rows as numpy, on every process."""
    from jax_dpo.sharding.place import fetch

    return fetch(x)
