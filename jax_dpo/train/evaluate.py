"""Held-out pairs through the training step's own forward pass, every pair counted once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_dpo.arrays import Tree
from jax_dpo.data.batch import Batch
from jax_dpo.loss.family import LossOptions, mixed_loss
from jax_dpo.loss.router import RouterSums, balance
from jax_dpo.loss.scores import CHOSEN, PairSums
from jax_dpo.train import metrics
from jax_dpo.train.kl import ON_POLICY, ResponseKL, responses_of
from jax_dpo.train.length import length_effect
from jax_dpo.train.state import Frozen, Knobs

Evaluator = Callable[[Tree, Frozen, Batch, Knobs], tuple[Any, PairSums, RouterSums | None]]


class OwnAnswers(NamedTuple):
    """What the policy answered to some of the prompts of a set, and the KL along it."""

    metrics: dict[str, float]
    answers: list[dict[str, Any]]
    """one a prompt: `prompt` and `answer` (text), `kl` (sum over the answer, nats) and `tokens`"""


OnPolicy = Callable[[Tree, Frozen, Knobs, int], OwnAnswers]
"""(trained parameters, what stays, knobs, step) -> what was sampled; the step chooses the random numbers"""


@dataclass(frozen=True)
class EvalSet:
    """A held-out set: its name (None where it is the only one), its pairs' number and its batches on the devices, anew each time.

    `group` pairs are one of TRL's evaluation batches, over which the `sft` term is a mean, in which `aot*` sorts and
    for which the router's loss is made. `by_batches`: metrics are means of the means of such batches, as TRL's are; else every
    pair counts once.
    """

    name: str | None
    pairs: int
    batches: Callable[[], Iterator[Batch]]
    group: int
    by_batches: bool = False
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """{field of `Batch`: [N]} what the data say of each pair"""
    on_policy: OnPolicy | None = None
    """samples answers to some of its prompts and measures the KL along them"""

    @property
    def prefix(self) -> str:
        """What stands before the names of its metrics."""
        return "eval_" if self.name is None else f"eval_{self.name}_"


class Measured(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, float]
    """under `eval_` (and the set's name), with `runtime` and speed"""
    kl_profile: dict[str, Any]
    """see `kl.ResponseKL.profile`"""
    sampled: list[dict[str, Any]]
    """see `OwnAnswers.answers`; empty where nothing was sampled"""


def evaluate(*arguments: Any) -> dict[str, float]:
    """The metrics of `measure`."""
    return measure(*arguments).metrics


def measure(
    run: Evaluator,
    held_out: EvalSet,
    params: Tree,
    frozen: Frozen,
    knobs: Knobs,
    options: LossOptions,
    faulty: Callable[[np.ndarray], None] | None = None,
    step: int | None = None,
) -> Measured:
    """Metrics of a held-out set.

    `faulty` is told the positions of the pairs whose loss or log-ratio is not finite, if there are any. `step` is that of the policy;
    without it nothing is sampled.

    The loss is the mean over pairs; the `sft` term of a pair is the mean over the chosen tokens of its evaluation batch, `aot*`
    sorts within that batch, and the router's loss of a pair is that of the batch.
    """
    began = time.perf_counter()
    loss, sums, routers = of_pairs(run, held_out, params, frozen, knobs)
    loss = loss + _of_several(sums, held_out, knobs, options)
    aux = None
    if routers is not None:
        aux = _of_routers(routers, held_out.group)
        loss = loss + options.router_coef * aux
    bad = np.flatnonzero(~(np.isfinite(loss) & np.isfinite(np.asarray(sums.logratio)).all(-1)))
    if faulty is not None and len(bad):
        faulty(bad)
    loss = loss.astype(np.float64)
    beta = float(knobs.beta) * held_out.columns.get("beta", np.float64(1))
    if held_out.by_batches:
        found = metrics.evaluation_by_batches(loss, sums, beta, held_out.group, aux)
    else:
        found = metrics.evaluation(loss, sums, beta, aux)
    found |= length_effect(sums, beta)
    responses = ResponseKL()
    if (each := responses_of(sums)) is not None:
        responses.add(each)
    found |= responses.metrics()
    seconds = time.perf_counter() - began
    found |= {"runtime": seconds, "samples_per_second": held_out.pairs / seconds}
    found["steps_per_second"] = math.ceil(held_out.pairs / held_out.group) / seconds
    sampled: list[dict[str, Any]] = []
    if held_out.on_policy is not None and step is not None:
        began = time.perf_counter()
        own, sampled = held_out.on_policy(params, frozen, knobs, step)
        found |= own
        found[f"{ON_POLICY}/runtime"] = time.perf_counter() - began
    return Measured({held_out.prefix + name: value for name, value in found.items()}, responses.profile(), sampled)


def of_pairs(
    run: Evaluator, held_out: EvalSet, params: Tree, frozen: Frozen, knobs: Knobs
) -> tuple[np.ndarray, PairSums, RouterSums | None]:
    """What the evaluator says of each pair, [N, ...], in the order of the set: sums do not depend on the packing."""
    seen: list[tuple[np.ndarray, Any]] = []
    for batch in held_out.batches():
        results = run(params, frozen, batch, knobs)
        seen.append((_whole(batch.index), jax.tree.map(np.asarray, results)))
    index = np.concatenate([i.reshape(-1) for i, _ in seen])
    order = np.argsort(index)[np.sum(index < 0) :]
    join = lambda *xs: np.concatenate([x.reshape(-1, *x.shape[2:]) for x in xs])[order]  # noqa: E731
    return jax.tree.map(join, *(results for _, results in seen))


def _of_several(sums: PairSums, held_out: EvalSet, knobs: Knobs, options: LossOptions) -> np.ndarray:
    """What the terms of several pairs add to the loss of each, [N]: `sft` and `aot*`, within `group` pairs after each other."""
    place, group = np.arange(len(sums.tokens)), held_out.group
    which = place // group
    added = np.zeros(len(place))
    if "sft" in options.types:
        counted = held_out.columns.get("pair_weight", np.float64(1)) * sums.logp[:, CHOSEN].astype(np.float64)
        logp, tokens = (np.bincount(which, x) for x in (counted, sums.tokens[:, CHOSEN].astype(np.float64)))
        added -= options.weight_of("sft") * (logp / np.maximum(tokens, 1.0))[which]
    if options.mixes_pairs:
        groups = np.stack([which, place % group], axis=-1)
        one_row = PairSums(*(None if x is None else jnp.asarray(x)[None] for x in sums))
        total = mixed_loss(one_row, jnp.asarray(groups)[None], jnp.ones((1, len(place))), knobs.beta, options)
        added += float(total) / len(place)
    return added


def _of_routers(sums: RouterSums, group: int) -> np.ndarray:
    """The router's loss of each pair's evaluation batch, [N]."""
    which = np.arange(len(sums.tokens)) // group

    def of_batches(x: np.ndarray) -> np.ndarray:
        total = np.zeros((which[-1] + 1, *x.shape[1:]))
        np.add.at(total, which, x)
        return total

    return np.asarray(balance(RouterSums(*(of_batches(x) for x in sums))))[which]


def _whole(x: Any) -> np.ndarray:
    """An array that is sharded over rows as numpy, on every process."""
    from jax_dpo.sharding.place import fetch

    return fetch(x)
