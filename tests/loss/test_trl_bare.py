"""The losses on eleven given pairs whose log-ratios go out to hundreds. Oracle: TRL 1.16's loss code (tests/golden/losses/bare.*)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_dpo.config.rules import LOSS_TYPES
from jax_dpo.loss.aot import AOT_TYPES
from jax_dpo.loss.family import FAMILIES, LossOptions, mixed_loss, pair_loss
from jax_dpo.loss.scores import PairSums

GOLDEN = Path(__file__).parents[1] / "golden" / "losses"
BARE = json.loads((GOLDEN / "bare.json").read_text(encoding="utf-8"))
ARRAYS = load_file(GOLDEN / "bare.safetensors")


def types_of(given: dict[str, Any]) -> tuple[str, ...]:
    kind = given["loss_type"]
    return (kind,) if isinstance(kind, str) else tuple(kind)


# Where every pair stands alone, and where all eleven are one of TRL's micro-batches: aot sorts them. sft pools tokens, which are not here.
CASES = [c for c in BARE["cases"] if c["key"].startswith("single|") and set(types_of(c["options"])) <= set(FAMILIES)]

TOGETHER = [
    c for c in BARE["cases"] if c["key"].startswith("together|") and set(types_of(c["options"])) <= set(AOT_TYPES)
]


def options_of(given: dict[str, Any]) -> LossOptions:
    return LossOptions(
        types=types_of(given),
        weights=tuple(given.get("loss_weights") or [1.0] * len(types_of(given))),
        label_smoothing=given.get("label_smoothing", 0.0),
        f_divergence=given.get("f_divergence_type", "reverse_kl"),
        f_alpha=given.get("f_alpha_divergence_coef", 0.5),
        discopop_tau=given.get("discopop_tau", 0.05),
    )


def sides(*names: str) -> jax.Array:
    """[1, 11, 2] of chosen and rejected."""
    return jnp.stack([jnp.asarray(ARRAYS[name]) for name in names], -1)[None]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["key"].removeprefix("single|loss_type="))
def test_losses_and_their_derivatives_are_trls(case: dict[str, Any]) -> None:
    given = case["options"]
    lengths = sides("chosen_lengths", "rejected_lengths").astype(jnp.int32)
    logp = sides("policy_chosen_logps", "policy_rejected_logps")
    zero = jnp.zeros(logp.shape)
    ref = sides("ref_chosen_logps", "ref_rejected_logps")

    def each(logp: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums = PairSums(logp, ref, zero, lengths.astype(jnp.float32), zero, zero, zero, zero)
        found = pair_loss(sums, lengths, jnp.float32(given.get("beta", 0.1)), jnp.float32(0), options_of(given))
        return jnp.sum(found), found

    by_logp, loss = jax.grad(each, has_aux=True)(logp)
    for name, found in (("loss", loss[0]), ("d_chosen", by_logp[0, :, 0]), ("d_rejected", by_logp[0, :, 1])):
        want = ARRAYS[f"{case['key']}|{name}"]
        finite = np.isfinite(want)
        assert finite.all() or f"{case['key']}|{name}" in BARE["not_finite"]
        far = np.abs(np.asarray(found)[finite] - want[finite]) / np.maximum(1, np.abs(want[finite]))
        assert far.max() < 1e-4, (name, far)


@pytest.mark.parametrize("case", TOGETHER, ids=lambda c: c["key"].removeprefix("together|loss_type="))
def test_sorted_losses_and_their_derivatives_are_trls(case: dict[str, Any]) -> None:
    given = case["options"]
    logp, ref = sides("policy_chosen_logps", "policy_rejected_logps"), sides("ref_chosen_logps", "ref_rejected_logps")
    n = logp.shape[1]
    # Laid out in another order than TRL's, with an empty slot and a second group of the same pairs between them.
    slots = np.random.default_rng(0).permutation(2 * n + 1)
    pair, which = slots % n, np.where(slots == 2 * n, -1, slots // n)
    group = jnp.asarray(np.stack([which, pair], -1)[None])
    weight = jnp.asarray(np.where(which >= 0, 0.5 / n, 0.0)[None], jnp.float32)
    beta = jnp.float32(given.get("beta", 0.1))

    def of(logp: jax.Array) -> jax.Array:
        zero = jnp.zeros((1, 2 * n + 1, 2))
        sums = PairSums(logp[:, pair], ref[:, pair], zero, zero, zero, zero, zero, zero)
        return mixed_loss(sums, group, weight, beta, options_of(given))

    loss, by_logp = jax.value_and_grad(of)(logp)
    found = {"loss": loss, "d_chosen": by_logp[0, :, 0], "d_rejected": by_logp[0, :, 1]}
    for name, value in found.items():
        want = np.asarray(ARRAYS[f"{case['key']}|{name}"]).squeeze()
        assert np.isfinite(want).all()
        far = np.abs(np.asarray(value) - want) / np.maximum(1, np.abs(want))
        assert far.max() < 1e-4, (name, far)


def test_every_loss_of_trl_is_held() -> None:
    assert len(TOGETHER) >= 4
    assert {*FAMILIES, *AOT_TYPES, "sft"} == set(LOSS_TYPES)
