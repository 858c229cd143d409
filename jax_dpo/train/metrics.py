"""TRL's metrics as sums: added up over micro-batches and devices, divided once at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_dpo.loss.scores import CHOSEN, REJECTED, PairSums
from jax_dpo.train.kl import ResponseKL, Responses


class Sums(NamedTuple):
    """Scalars of a micro-batch or a step. Those of pairs are weighted by the pair's share of the step, the rest count tokens."""

    loss: jax.Array
    reward_chosen: jax.Array
    reward_rejected: jax.Array
    accuracy: jax.Array
    logp_chosen: jax.Array
    logp_rejected: jax.Array
    kl_chosen: jax.Array
    kl_rejected: jax.Array
    tokens_chosen: jax.Array
    tokens_rejected: jax.Array
    entropy: jax.Array
    logit_chosen: jax.Array
    logit_rejected: jax.Array
    top1_chosen: jax.Array
    logratio: jax.Array
    """sum of log pi - log ref over all scored tokens"""
    aux_loss: jax.Array
    """the router's balancing loss, weighted as the loss is; 0 where there is none"""
    beta: jax.Array
    """the pairs' mean beta"""
    kl_tokens: jax.Array
    """scored tokens whose KL was computed: all, or none where the reference is sums made beforehand"""


def step_sums(
    loss: jax.Array, sums: PairSums, weight: jax.Array, beta: jax.Array, aux_loss: jax.Array | None = None
) -> Sums:
    """The sums of one micro-batch; `weight` [R, S] is 0 in empty slots, `beta` a scalar or [R, S], `aux_loss` the router's part of it."""
    still = jax.tree.map(jax.lax.stop_gradient, sums)
    beta = jnp.broadcast_to(jax.lax.stop_gradient(beta), weight.shape)
    reward = beta[..., None] * still.logratio
    share = lambda x: jnp.sum(weight * x)  # noqa: E731
    side = lambda x, b: jnp.sum(x[..., b])  # noqa: E731
    kl = jnp.zeros_like(still.tokens) if still.kl is None else still.kl
    return Sums(
        loss=jax.lax.stop_gradient(loss),
        reward_chosen=share(reward[..., CHOSEN]),
        reward_rejected=share(reward[..., REJECTED]),
        accuracy=share((reward[..., CHOSEN] > reward[..., REJECTED]).astype(jnp.float32)),
        logp_chosen=share(still.logp[..., CHOSEN]),
        logp_rejected=share(still.logp[..., REJECTED]),
        kl_chosen=side(kl, CHOSEN),
        kl_rejected=side(kl, REJECTED),
        tokens_chosen=side(still.tokens, CHOSEN),
        tokens_rejected=side(still.tokens, REJECTED),
        entropy=jnp.sum(still.entropy),
        logit_chosen=side(still.mean_logit, CHOSEN),
        logit_rejected=side(still.mean_logit, REJECTED),
        top1_chosen=side(still.top1, CHOSEN),
        logratio=jnp.sum(still.logratio),
        aux_loss=jnp.zeros((), jnp.float32) if aux_loss is None else jax.lax.stop_gradient(aux_loss),
        beta=share(beta),
        kl_tokens=0.0 * jnp.sum(still.tokens) if still.kl is None else jnp.sum(still.tokens),
    )


def named(sums: Mapping[str, float]) -> dict[str, float]:
    """TRL's names: pair metrics are means over pairs, token metrics means over tokens; rewards in nats times beta, the rest in nats.

    `kl_divergence` is all token KLs over all scored tokens, clamped at 0: rounding can leave -1e-7 where nothing differs. Where no KL was
    computed, `kl_estimate` stands in: the mean of log pi(y_t) - log ref(y_t) over the answers of the data. That estimates the KL for
    answers drawn from the policy (estimator k1 of joschu.net/blog/kl-approx.html); these are not, so it may be negative and bounds
    nothing.
    """
    s = sums
    chosen, rejected = max(s["tokens_chosen"], 1.0), max(s["tokens_rejected"], 1.0)
    tokens = max(s["tokens_chosen"] + s["tokens_rejected"], 1.0)
    return {
        "loss": s["loss"],
        **({"aux_loss": s["aux_loss"]} if s["aux_loss"] != 0 else {}),  # never 0 where there is a router
        "rewards/chosen": s["reward_chosen"],
        "rewards/rejected": s["reward_rejected"],
        "rewards/accuracies": s["accuracy"],
        "rewards/margins": s["reward_chosen"] - s["reward_rejected"],
        "logps/chosen": s["logp_chosen"],
        "logps/rejected": s["logp_rejected"],
        "logits/chosen": s["logit_chosen"] / chosen,
        "logits/rejected": s["logit_rejected"] / rejected,
        "entropy": s["entropy"] / tokens,
        "mean_token_accuracy": s["top1_chosen"] / chosen,
        **(_exact_kl(s, chosen, rejected) if s["kl_tokens"] > 0 else {"kl_estimate": s["logratio"] / tokens}),
    }


def _exact_kl(s: Mapping[str, float], chosen: float, rejected: float) -> dict[str, float]:
    # Written so that NaN stays NaN.
    return {
        "kl_divergence": _not_negative((s["kl_chosen"] + s["kl_rejected"]) / s["kl_tokens"]),
        "kl_divergence/chosen": _not_negative(s["kl_chosen"] / chosen),
        "kl_divergence/rejected": _not_negative(s["kl_rejected"] / rejected),
    }


def _not_negative(x: float) -> float:
    return 0.0 if x < 0 else x


class Window:
    """Steps since the last log, averaged as TRL does: the loss over the steps, metrics of pairs over TRL's micro-batches, of which
    a step at the end of an epoch may have fewer; token sums add up."""

    _OVER_GROUPS = ("reward_chosen", "reward_rejected", "accuracy", "logp_chosen", "logp_rejected", "aux_loss", "beta")

    def __init__(self) -> None:
        self.steps = 0
        self.total: dict[str, float] = dict.fromkeys((*Sums._fields, "groups"), 0.0)
        self.responses = ResponseKL()

    def add(self, sums: Sums, groups: int, responses: Responses | None = None) -> None:
        """One more step, of `groups` of TRL's micro-batches (over all devices), with the KL of its responses where it was computed."""
        self.steps += 1
        if responses is not None:
            self.responses.add(responses)
        self.total["groups"] += groups
        for name, value in zip(Sums._fields, sums):
            self.total[name] += float(value) * (groups if name in self._OVER_GROUPS else 1)

    def metrics(self) -> dict[str, float]:
        n = {"loss": max(self.steps, 1), **dict.fromkeys(self._OVER_GROUPS, max(self.total["groups"], 1.0))}
        return named({k: v / n.get(k, 1) for k, v in self.total.items()}) | self.responses.metrics()

    def meta(self) -> dict[str, Any]:
        """Plain data for JSON, to the bit."""
        return {"steps": self.steps, "total": self.total, **self.responses.meta()}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Window:
        found = cls()
        found.steps, found.total = meta["steps"], found.total | meta["total"]
        found.responses = ResponseKL.from_meta(meta)
        return found

    @property
    def beta(self) -> float:
        """Mean beta of the pairs."""
        return self.total["beta"] / max(self.total["groups"], 1.0)


def evaluation(
    loss: np.ndarray, sums: PairSums, beta: float | np.ndarray, aux_loss: np.ndarray | None = None
) -> dict[str, float]:
    """Metrics over an evaluation set, every pair counted once.

    Args:
      loss: [N] loss of each pair.
      sums: arrays [N, 2].
      beta: of all pairs, or [N] of each.
      aux_loss: [N] the router's loss of each pair's evaluation batch, where there is one.
    """
    wide = PairSums(*(None if x is None else np.asarray(x, np.float64) for x in sums))
    reward = np.reshape(beta, (-1, 1)) * np.asarray(wide.logratio)
    col = lambda x, b: float(np.asarray(x)[:, b].sum())  # noqa: E731
    return named(
        {
            "loss": float(np.mean(loss)),
            "reward_chosen": float(reward[:, CHOSEN].mean()),
            "reward_rejected": float(reward[:, REJECTED].mean()),
            "accuracy": float((reward[:, CHOSEN] > reward[:, REJECTED]).mean()),
            "logp_chosen": float(np.asarray(wide.logp)[:, CHOSEN].mean()),
            "logp_rejected": float(np.asarray(wide.logp)[:, REJECTED].mean()),
            "kl_chosen": col(wide.kl, CHOSEN),
            "kl_rejected": col(wide.kl, REJECTED),
            "tokens_chosen": col(wide.tokens, CHOSEN),
            "tokens_rejected": col(wide.tokens, REJECTED),
            "entropy": float(np.asarray(wide.entropy).sum()),
            "logit_chosen": col(wide.mean_logit, CHOSEN),
            "logit_rejected": col(wide.mean_logit, REJECTED),
            "top1_chosen": col(wide.top1, CHOSEN),
            "logratio": float(np.asarray(wide.logratio).sum()),
            "aux_loss": 0.0 if aux_loss is None else float(aux_loss.mean()),
            "beta": float(np.mean(beta)),
            "kl_tokens": float(np.asarray(wide.tokens).sum()),
        }
    )


def evaluation_by_batches(
    loss: np.ndarray, sums: PairSums, beta: float | np.ndarray, group: int, aux_loss: np.ndarray | None = None
) -> dict[str, float]:
    """As `evaluation`, but each metric is the plain mean of the values of TRL's evaluation batches of `group` pairs.

    So a last batch that is short weighs as much as a full one, and a token of a batch with few tokens more than others. Two are not so:
    the loss, which TRL weighs by pairs as well, and the KL, which TRL does not have.
    """
    whole = evaluation(loss, sums, beta, aux_loss)
    parts = []
    for start in range(0, len(loss), group):
        here = slice(start, start + group)
        some = PairSums(*(None if x is None else x[here] for x in sums))
        of = beta if np.ndim(beta) == 0 else np.asarray(beta)[here]
        parts.append(evaluation(loss[here], some, of, None if aux_loss is None else aux_loss[here]))
    pooled = lambda name: name == "loss" or name.startswith("kl_")  # noqa: E731
    return {name: x if pooled(name) else sum(p[name] for p in parts) / len(parts) for name, x in whole.items()}
