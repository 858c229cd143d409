"""The KL of single responses: quantiles over them and by position in them, from what a step or an evaluation brings back."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_dpo.data.batch import BRANCHES, Batch
from jax_dpo.loss.positions import buckets
from jax_dpo.loss.scores import CHOSEN, REJECTED, PairSums

QUANTILES = {"p50": 0.5, "p90": 0.9, "max": 1.0}
SIDES = {"chosen": CHOSEN, "rejected": REJECTED}
# Names of `ResponseKL.metrics`, beside the `kl_divergence` of `metrics.named`.
NAMES = (
    *(f"kl_divergence/{q}" for q in QUANTILES),
    "kl_sequence",
    *(f"kl_sequence/{side}" for side in SIDES),
    *(f"kl_sequence/{q}" for q in QUANTILES),
)

ON_POLICY = "kl_on_policy"


class Responses(NamedTuple):
    """The KL of the responses of a step, without gradient; arrays on the device or numpy."""

    kl: Any
    """[..., S, 2] sum of exact token KLs, nats"""
    tokens: Any
    """[..., S, 2] scored tokens; 0 in empty slots"""
    kl_at: Any
    """[..., S, 2, P] `kl` by position in the response (`positions.buckets`)"""


def responses_of(sums: PairSums) -> Responses | None:
    """What a micro-batch's sums say of each response; None where no KL was computed."""
    if sums.kl is None or sums.kl_at is None:
        return None
    return jax.tree.map(jax.lax.stop_gradient, Responses(sums.kl, sums.tokens, sums.kl_at))


def no_responses(batch: Batch) -> Responses:
    """Of the shape that the micro-batches of `batch` [A, R, ...] will bring."""
    wide = (*batch.weight.shape, BRANCHES)
    places = len(buckets(batch.slot.shape[-1]))
    return Responses(jnp.zeros(wide), jnp.zeros(wide), jnp.zeros((*wide, places)))


class ResponseKL:
    """The responses of some steps, or of an evaluation set: every one counts once.

    KL is in nats. Quantiles are numpy's, linear between neighbours. What rounding leaves below 0 is shown as 0; what is not finite
    stays so.
    """

    def __init__(self) -> None:
        self.kl = np.zeros((0, BRANCHES), np.float32)
        self.tokens = np.zeros((0, BRANCHES), np.float32)
        self.at = np.zeros((BRANCHES, 1))
        """[2, P] sums of token KLs by position, float64"""

    def add(self, more: Responses) -> None:
        """More responses, in slots of any shape of which some may be empty."""
        tokens = np.asarray(more.tokens, np.float32).reshape(-1, BRANCHES)
        there = tokens.sum(-1) > 0
        kl = np.asarray(more.kl, np.float32).reshape(-1, BRANCHES)
        at = np.asarray(more.kl_at, np.float64).reshape(len(tokens), BRANCHES, -1)[there].sum(0)
        self.kl, self.tokens = np.concatenate([self.kl, kl[there]]), np.concatenate([self.tokens, tokens[there]])
        width = max(at.shape[1], self.at.shape[1])
        wide = lambda x: np.pad(x, ((0, 0), (0, width - x.shape[1])))  # noqa: E731
        self.at = wide(self.at) + wide(at)

    def __len__(self) -> int:
        return len(self.tokens)

    def metrics(self) -> dict[str, float]:
        """`NAMES`: nats per token under `kl_divergence`, nats per response under `kl_sequence`. Empty where there is no response."""
        if not len(self):
            return {}
        each, per_token = self._each(slice(None))
        found = {f"kl_divergence/{q}": x for q, x in _quantiles(per_token).items()}
        found["kl_sequence"] = _shown(each.mean())
        for name, side in SIDES.items():
            of_side, _ = self._each([side])
            found[f"kl_sequence/{name}"] = _shown(of_side.mean()) if len(of_side) else 0.0
        return found | {f"kl_sequence/{q}": x for q, x in _quantiles(each).items()}

    def profile(self) -> dict[str, Any]:
        """Chosen and rejected apart: their quantiles, and the KL per token by position. Plain data; null for what is not finite.

        `positions` are (first, last) of each bucket up to the longest response; `kl_at` the nats per token in each, null where the side
        has no token there, `tokens_at` how many it has.
        """
        if not len(self):
            return {}
        bounds = buckets(int(self.tokens.max()))
        found: dict[str, Any] = {"positions": [list(ends) for ends in bounds]}
        for name, side in SIDES.items():
            each, per_token = self._each([side])
            counts = [
                int(np.clip(self.tokens[:, side] - first + 1, 0, last - first + 1).sum()) for first, last in bounds
            ]
            found[name] = {
                "responses": len(each),
                "kl_divergence": _plain(_quantiles(per_token)),
                "kl_sequence": _plain(_quantiles(each)),
                "kl_at": [_finite(_shown(kl / n)) if n else None for kl, n in zip(self.at[side], counts)],
                "tokens_at": counts,
            }
        return found

    def _each(self, sides: Any) -> tuple[np.ndarray, np.ndarray]:
        """KL of each response that has tokens, in all and per token, float64."""
        kl, tokens = (x[:, sides].astype(np.float64).reshape(-1) for x in (self.kl, self.tokens))
        there = tokens > 0
        return kl[there], kl[there] / tokens[there]

    def meta(self) -> dict[str, Any]:
        """Plain data for JSON, to the bit."""
        packed = (base64.b64encode(x.tobytes()).decode() for x in (self.kl, self.tokens))
        return {"responses": list(packed), "at": self.at.tolist()}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> ResponseKL:
        found = cls()
        unpacked = (np.frombuffer(base64.b64decode(x), np.float32).reshape(-1, BRANCHES) for x in meta["responses"])
        found.kl, found.tokens = unpacked
        found.at = np.asarray(meta["at"], np.float64)
        return found


def on_policy(kl: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """What answers sampled from the policy say of its KL: metrics under `kl_on_policy`.

    Args:
      kl: [n] sum of exact token KLs of the answer to each prompt, nats.
      tokens: [n] its tokens.

    Returns:
      Per token r = sum kl / sum tokens, with its standard error over prompts as that of a ratio of two means (to first order:
      sqrt(n / (n - 1) sum (kl - r tokens)^2) / sum tokens; Cochran, Sampling Techniques, 6.4); per answer the mean and its standard
      error; the mean length. No standard error of a single prompt.
    """
    kl, tokens = np.asarray(kl, np.float64), np.asarray(tokens, np.float64)
    n, total = len(kl), tokens.sum()
    ratio, mean = kl.sum() / total, kl.mean()
    found = {"": _shown(ratio), "/sequence": _shown(mean), "/length": total / n}
    if n > 1:
        found["/se"] = math.sqrt(n / (n - 1) * ((kl - ratio * tokens) ** 2).sum()) / total
        found["/sequence_se"] = kl.std(ddof=1) / math.sqrt(n)
    return {ON_POLICY + name: float(x) for name, x in found.items()}


def _quantiles(x: np.ndarray) -> dict[str, float]:
    if not len(x):
        return {}
    with np.errstate(invalid="ignore"):  # between two infinities
        return {name: _shown(np.quantile(x, share)) for name, share in QUANTILES.items()}


def _shown(x: Any) -> float:
    # Written so that NaN stays NaN.
    return 0.0 if x < 0 else float(x)


def _plain(named: dict[str, float]) -> dict[str, float | None]:
    return {name: _finite(x) for name, x in named.items()}


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None
