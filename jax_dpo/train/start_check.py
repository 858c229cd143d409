"""Before anything has moved, policy and reference are one: what the first numbers of a fresh run must be."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.loss.family import LossOptions, mixed_loss, pair_loss
from jax_dpo.loss.scores import PairSums

# Nats a token that rounding may leave on any device.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}


def loss_at_start(options: LossOptions, beta: float) -> float | None:
    """The loss where every log-ratio is 0; None where it depends on more than that (sft, pair weights, columns of the data)."""
    if options.columns or "sft" in options.types or options.use_weighting:
        return None
    nothing = PairSums(*(jnp.zeros((1, 1, 2)) for _ in PairSums._fields))
    value = pair_loss(nothing, jnp.ones((1, 1, 2), jnp.int32), jnp.float32(beta), jnp.float32(0), options)
    if options.mixes_pairs:  # a pair that is sorted alone
        value = value + mixed_loss(
            nothing, jnp.zeros((1, 1, 2), jnp.int32), jnp.ones((1, 1)), jnp.float32(beta), options
        )
    return float(value[0, 0])


def check_start(
    found: dict[str, float], *, options: LossOptions, beta: float, tokens_per_pair: float, dtype: str
) -> None:
    """Raises UserError where loss, margin or KL of untouched weights are not those of two equal models.

    Args:
      found: metrics without prefix, of a step or an evaluation in which nothing has been trained yet.
      tokens_per_pair: scored tokens of a pair, by which rounding adds up in a margin.
    """
    allowed = TOLERANCE[dtype]
    margin, kl = (
        found["rewards/margins"],
        found.get("kl_divergence", 0.0),
    )  # no KL in a step without the reference's distribution
    wrong = []
    if not abs(margin) <= beta * allowed * tokens_per_pair:
        wrong.append(f"the reward margin is {margin:.3g}, expected 0")
    if not kl <= allowed:
        wrong.append(f"the KL is {kl:.3g} nats per token, expected 0")
    expected = loss_at_start(options, beta)
    if expected is not None:
        # A loss moves with the margin at most as fast as here: sppo and ipo have the steepest slopes, 1/beta.
        slack = allowed * tokens_per_pair * max(beta, 2.0 / beta) + 1e-6
        loss = found["loss"] - options.router_coef * found.get(
            "aux_loss", 0.0
        )  # the router's loss is not about the reference
        if not abs(loss - expected) <= slack:
            wrong.append(f"the loss is {loss:.7g}, expected {expected:.7g}")
    if wrong:
        raise UserError(
            "start-check",
            f"Policy and reference are the same weights, but {'; '.join(wrong)}. Nothing was trained. "
            "Either this device computes the two differently, or the weights hold values that are not numbers: "
            "run `jax-dpo doctor`, and try bf16 false.",
        )
    if not np.isfinite(math.fsum(v for v in (margin, kl, found["loss"]))):
        raise UserError("start-not-finite", f"The first numbers of the run are not finite: {found}.")
