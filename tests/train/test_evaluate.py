"""Terms of the loss that join the pairs of an evaluation batch. Oracle: the formulas batch by batch, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_dpo.data.batch import Batch, empty_batch
from jax_dpo.data.pack import RowShape
from jax_dpo.loss.family import LossOptions, pair_loss
from jax_dpo.loss.scores import PairSums
from jax_dpo.train.evaluate import EvalSet, evaluate
from jax_dpo.train.state import Frozen, Knobs

PAIRS, GROUP, BETA = 10, 4, 0.25  # batches of 4, 4 and 2 pairs
RNG = np.random.default_rng(5)
LOGP, REF = RNG.normal(-20, 3, (2, PAIRS, 2))
TOKENS = RNG.integers(3, 12, (PAIRS, 2))
ORDER = RNG.permutation(PAIRS)  # packing puts pairs anywhere


def held_out(by_batches: bool = False) -> EvalSet:
    def batches() -> Iterator[Batch]:
        for start in range(0, PAIRS, 6):
            index = np.full((2, 3), -1, np.int32)
            here = ORDER[start : start + 6]
            index.reshape(-1)[: len(here)] = here
            yield empty_batch(2, RowShape(4, 4, 3, 2))._replace(index=index)

    return EvalSet(None, PAIRS, batches, GROUP, by_batches)


def evaluated(options: LossOptions, by_batches: bool = False) -> dict[str, float]:
    def run(params: Any, frozen: Any, batch: Batch, knobs: Knobs) -> tuple[Any, PairSums, None]:
        real = batch.index[..., None] >= 0
        of = lambda x: jnp.asarray(np.where(real, x[batch.index], 0), jnp.float32)  # noqa: E731
        zero = jnp.zeros((2, 3, 2))
        sums = PairSums(of(LOGP), of(REF), zero, of(TOKENS), zero, zero, zero, zero)
        return pair_loss(sums, of(TOKENS), knobs.beta, knobs.kl_coef, options), sums, None

    knobs = Knobs(jnp.float32(0), jnp.float32(BETA), jnp.float32(0))
    return evaluate(run, held_out(by_batches), {}, Frozen({}, {}), knobs, options)


def transported(name: str, e: float) -> float:
    total = 0.0
    for start in range(0, PAIRS, GROUP):
        pi, ref = LOGP[start : start + GROUP], REF[start : start + GROUP]
        x, y = (pi[:, 0] - pi[:, 1], ref[:, 0] - ref[:, 1]) if name == "aot" else (pi - ref).T
        z = BETA * (np.sort(x) - np.sort(y))
        total += float(((1 - e) * np.logaddexp(0, -z) + e * np.logaddexp(0, z)).sum())
    return total / PAIRS


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted_losses_are_those_of_evaluation_batches(name: str) -> None:
    found = evaluated(LossOptions(types=(name,), label_smoothing=0.1))
    assert found["eval_loss"] == pytest.approx(transported(name, 0.1), rel=1e-6)
    assert found["eval_rewards/margins"] == pytest.approx(BETA * np.mean((LOGP - REF) @ [1, -1]), rel=1e-5)


def test_terms_of_all_kinds_are_added_with_their_weights() -> None:
    """`sft` twice, as a list may have it."""
    options = LossOptions(types=("sft", "sigmoid", "aot", "sft"), weights=(0.5, 2.0, 0.25, 0.125))
    sft = 0.0
    for start in range(0, PAIRS, GROUP):
        chosen = LOGP[start : start + GROUP, 0]
        sft -= len(chosen) * chosen.sum() / TOKENS[start : start + GROUP, 0].sum()
    sigmoid = np.logaddexp(0, -BETA * ((LOGP - REF) @ [1, -1])).mean()
    want = 0.625 * sft / PAIRS + 2.0 * sigmoid + 0.25 * transported("aot", 0.0)
    assert evaluated(options)["eval_loss"] == pytest.approx(want, rel=1e-6)


def test_trls_mean_of_batch_means() -> None:
    """The last batch is short: its pairs weigh more. The loss is TRL's mean over pairs either way."""
    margins = BETA * ((LOGP - REF) @ [1, -1])
    found, plain = (evaluated(LossOptions(), by_batches) for by_batches in (True, False))
    batches = [margins[start : start + GROUP] for start in range(0, PAIRS, GROUP)]
    assert len(batches[-1]) < GROUP
    assert found["eval_rewards/margins"] == pytest.approx(np.mean([b.mean() for b in batches]), rel=1e-5)
    assert found["eval_rewards/accuracies"] == pytest.approx(np.mean([(b > 0).mean() for b in batches]))
    assert plain["eval_rewards/margins"] == pytest.approx(margins.mean(), rel=1e-5)
    assert found["eval_rewards/margins"] != pytest.approx(plain["eval_rewards/margins"], rel=1e-3)
    assert found["eval_loss"] == plain["eval_loss"] == pytest.approx(np.logaddexp(0, -margins).mean(), rel=1e-6)
