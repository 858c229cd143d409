"""Packed pair trees against TRL's padded rows: tests/golden/losses has TRL 1.16's numbers on two batches, tests/golden/kl those of
a plain float64 program from whole logits. Tolerances are those that two correct float32 programs need."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trl_batch as trl
from safetensors.numpy import load_file

from jax_dpo.arrays import TokenStats
from jax_dpo.arrays import Tree as Params
from jax_dpo.data.batch import Batch
from jax_dpo.loss.family import LossOptions
from jax_dpo.loss.scores import pair_sums
from jax_dpo.train import step
from jax_dpo.train.metrics import named
from jax_dpo.train.state import Knobs

KL = json.loads((trl.GOLDEN / "kl" / "kl.json").read_text(encoding="utf-8"))
KL_ARRAYS = load_file(trl.GOLDEN / "kl" / "kl.safetensors")
BATCHES = ("batch", "edge")


CASES = [
    pytest.param(
        name, key, marks=() if key in ("loss_type=sigmoid", "loss_type=sigmoid;ld_alpha=0.5") else pytest.mark.slow
    )
    for name, group in zip(BATCHES, ("cases", "edge_cases"))
    for key in trl.LOSSES[group]
]


@lru_cache(maxsize=2)
def statistics(name: str) -> tuple[Batch, TokenStats, Callable[[jax.Array, jax.Array], Params]]:
    """A batch, its token statistics, and what makes cotangents of `logp` and `kl` the gradient by the policy's weights."""
    batch, mesh = trl.laid_out(trl.trees(name)), trl.one_device()
    made = lambda params: step.statistics(trl.facts(), params, trl.frozen(), batch, mesh, None)  # noqa: E731

    def weighed(params: Params, by_logp: jax.Array, by_kl: jax.Array) -> jax.Array:
        stats = made(params)
        return jnp.sum(stats.logp * by_logp) + jnp.sum(stats.kl * by_kl)

    backward = jax.jit(jax.grad(weighed))
    return batch, jax.jit(made)(trl.policy()), lambda by_logp, by_kl: backward(trl.policy(), by_logp, by_kl)


def loss_and_gradient(
    name: str, options: LossOptions, knobs: Knobs, ld_alpha: float | None = None
) -> tuple[float, dict[str, float], Params]:
    """`micro_batch_loss` on given statistics, its gradient carried on to the weights: the model is compiled once for all losses."""
    _, stats, backward = statistics(name)
    batch = trl.laid_out(trl.trees(name), ld_alpha=ld_alpha, sft="sft" in options.types, group=options.mixes_pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "watched_statistics", lambda facts, given, *_: (given, None))
        of = lambda s: step.micro_batch_loss(trl.facts(), options, s, trl.frozen(), batch, knobs, None, None)  # type: ignore[arg-type] # noqa: E731
        (loss, (sums, _)), by = jax.jit(jax.value_and_grad(of, has_aux=True))(stats)
    return float(loss), named({k: float(x) for k, x in sums._asdict().items()}), backward(by.logp, by.kl)


def check(case: dict[str, Any], loss: float, metrics: dict[str, float], gradient: Params) -> None:
    np.testing.assert_allclose(loss, case["loss"], rtol=5e-5, atol=5e-5)
    np.testing.assert_allclose(trl.norm(gradient), case["grad_norm"], rtol=3e-4)
    for name, value in case["metrics"].items():
        if name != "num_tokens":  # counted on the host
            near = {"logps": 5e-4, "rewards": 5e-4 * case["options"]["beta"]}.get(name.partition("/")[0], 5e-5)
            np.testing.assert_allclose(metrics[name], value, rtol=0, atol=near, err_msg=name)


def weighted_hinge(name: str, beta: float) -> float:
    """The formula, from TRL's log-probabilities of tokens."""
    of = lambda key: trl.ARRAYS[f"{name}.{key}"].astype(np.float64)  # noqa: E731
    tokens = of("completion_mask")[:, 1:].sum(1)
    ratio = (of("policy.log_probs") - of("reference.log_probs")).sum(1)
    weight = np.exp((of("policy.log_probs") - of("policy.log_sum_sq_probs")).sum(1) / tokens)
    n = len(ratio) // 2
    return float((np.maximum(1 - beta * (ratio[:n] - ratio[n:]), 0) * weight[:n] * weight[n:]).mean())


@pytest.mark.parametrize(("name", "key"), CASES)
def test_loss_metrics_and_gradient_are_trls(name: str, key: str) -> None:
    case = trl.LOSSES["cases" if name == "batch" else "edge_cases"][key]
    given = case["options"]
    options, beta = trl.options_of(given), given.get("beta", 0.1)
    loss, metrics, gradient = loss_and_gradient(name, options, trl.knobs(beta), given.get("ld_alpha"))
    if "error" in case:  # hinge with use_weighting, which TRL cannot differentiate
        np.testing.assert_allclose(loss, weighted_hinge(name, beta), rtol=5e-5)
        assert 0 < trl.norm(gradient) < np.inf
        return
    check(case, loss, metrics, gradient)
    for path, value in case["grad_norms"].items():
        found = float(np.linalg.norm(trl.layer(gradient, path)))
        np.testing.assert_allclose(found, value, rtol=1e-3, atol=3e-4 * case["grad_norm"], err_msg=path)


@pytest.mark.parametrize(
    ("key", "share_prompt", "remat"),
    [
        ("loss_type=sigmoid+bco_pair+sft;loss_weights=0.8+0.2+1.0", True, True),
        pytest.param("loss_type=sigmoid;use_weighting=True;ld_alpha=0.5", False, False, marks=pytest.mark.slow),
    ],
)
def test_the_whole_micro_batch_in_one_program(key: str, share_prompt: bool, remat: bool) -> None:
    case = trl.LOSSES["cases"][key]
    given = case["options"]
    options = trl.options_of(given)
    batch = trl.laid_out(trl.trees("batch", share_prompt), ld_alpha=given["ld_alpha"], sft="sft" in options.types)
    facts, mesh = trl.facts(remat=remat), trl.one_device()

    def of(params: Params) -> tuple[jax.Array, Any]:
        return step.micro_batch_loss(facts, options, params, trl.frozen(), batch, trl.knobs(given["beta"]), mesh, None)

    (loss, (sums, _)), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(trl.policy())
    check(case, float(loss), named({k: float(x) for k, x in sums._asdict().items()}), gradient)


@pytest.mark.parametrize("name", BATCHES)
def test_token_statistics_are_those_of_padded_rows(name: str) -> None:
    batch, stats, _ = statistics(name)
    scored = trl.ARRAYS[f"{name}.completion_mask"][:, 1:] == 1
    n = len(scored) // 2
    arrays = {field: trl.ARRAYS[f"{name}.policy.{key}"] for field, key in TRLS.items()}
    arrays |= {"ref_logp": trl.ARRAYS[f"{name}.reference.log_probs"], "kl": KL_ARRAYS[f"{name}|token_kl|float64"]}
    for field, want in arrays.items():
        for row in range(2 * n):
            answer = 2 * (row % n) + row // n
            found = trl.per_answer(batch, getattr(stats, field), answer)
            near = 2e-5 if field == "kl" else 5e-5
            np.testing.assert_allclose(
                found, want[row][scored[row]], rtol=0, atol=near, err_msg=f"{field} of row {row}"
            )


# Ours -> the name in the golden file.
TRLS = {
    "logp": "log_probs",
    "entropy": "entropy",
    "mean_logit": "mean_logits",
    "log_sum_sq": "log_sum_sq_probs",
    "top1": "is_top1",
}


@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=pytest.mark.slow if case["beta"] == 0.5 else ()) for key, case in KL["cases"].items()],
)
def test_the_penalised_loss_and_its_gradients(key: str) -> None:
    case = KL["cases"][key]
    want, name = case["float64"], case["batch"]
    options = LossOptions(kl_reduction=case["kl_reduction"])
    loss, metrics, gradient = loss_and_gradient(name, options, trl.knobs(case["beta"], case["kl_coef"]))
    np.testing.assert_allclose(loss, want["loss"], rtol=2e-5)
    np.testing.assert_allclose(trl.norm(gradient), want["grad_norm"], rtol=5e-5)
    np.testing.assert_allclose(metrics["kl_divergence"], want["kl_divergence"], rtol=1e-5)
    for path in KL["named_parameters"]:
        expected = KL_ARRAYS[f"{key}|{path}"]
        difference = np.linalg.norm(trl.layer(gradient, path) - expected)
        assert difference <= 2e-4 * np.linalg.norm(expected), path


@pytest.mark.parametrize("name", BATCHES)
def test_kl_and_log_ratios_of_pairs(name: str) -> None:
    batch, stats, _ = statistics(name)
    n = batch.weight.shape[1]
    sums = pair_sums(stats, batch.slot, n, 2, None)
    for reduction in ("token", "sequence"):
        want = KL["cases"][f"{name}|beta=0.1;kl_coef=1.0;kl_reduction={reduction}"]["float64"]
        whole = np.asarray(sums.kl).sum(-1)[0] / (np.asarray(sums.tokens).sum(-1)[0] if reduction == "token" else 1)
        np.testing.assert_allclose(whole, want["kl_pair"], rtol=2e-5)
        np.testing.assert_allclose(np.asarray(sums.logratio)[0].T.reshape(-1), want["logratio"], atol=1e-4)
