"""The losses, one pure function each: scores of pairs in, one value a pair out.

Notation of every formula: a, b are the log-ratios of chosen and rejected, u = phi(a), v = phi(b) their scores after the f-divergence,
s the sigmoid, l = log s, B = beta, e = label_smoothing, n+ and n- the completion lengths as TRL counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_dpo.loss.aot import AOT_TYPES, aot_losses
from jax_dpo.loss.divergence import DIVERGENCES
from jax_dpo.loss.scores import CHOSEN, NOTHING_GIVEN, REJECTED, Given, PairSums

_log_sigmoid = jax.nn.log_sigmoid
_sigmoid = jax.nn.sigmoid


@dataclass(frozen=True)
class LossOptions:
    """What is static about the loss. `types` and `weights` have one entry for each term."""

    types: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    label_smoothing: float = 0.0
    smooth_sigmoid: bool = False
    """whether `sigmoid` and `sigmoid_norm` read label_smoothing (conservative DPO)"""
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    discopop_tau: float = 0.05
    use_weighting: bool = False
    kl_reduction: str = "token"
    columns: tuple[str, ...] = ()
    """what the data say of each pair: of beta, margin, label, weight"""
    beta_alpha: float = 0.0
    """how strongly beta follows the batch (beta-DPO); 0: not at all"""
    beta_momentum: float = 0.9
    router_coef: float = 0.0
    """weight of the router's balancing loss (`loss/router.py`); 0 where there is no router, or it is off"""

    @property
    def doubt(self) -> float:
        """The probability that the labels of `sigmoid` and `sigmoid_norm` are wrong."""
        return self.label_smoothing if self.smooth_sigmoid else 0.0

    @property
    def beta_varies(self) -> bool:
        """Whether the beta of a pair is another than the one in force."""
        return self.beta_alpha > 0 or "beta" in self.columns

    @property
    def mixes_pairs(self) -> bool:
        """Whether a term sorts the pairs of one of TRL's micro-batches."""
        return any(name in AOT_TYPES for name in self.types)

    @property
    def whole_groups(self) -> bool:
        """Whether a term needs all pairs of one of TRL's micro-batches together."""
        return self.mixes_pairs or self.router_coef > 0

    def weight_of(self, name: str) -> float:
        """What the terms of that name weigh together: a list may name a loss twice."""
        return sum(weight for kind, weight in zip(self.types, self.weights) if kind == name)


class Scores(NamedTuple):
    """Arrays [R, S]; `beta` a scalar or [R, S]."""

    u: jax.Array
    v: jax.Array
    a: jax.Array
    b: jax.Array
    n_chosen: jax.Array
    n_rejected: jax.Array
    beta: jax.Array
    margin: jax.Array | None = None
    label: jax.Array | None = None


def _beyond(z: jax.Array, x: Scores) -> jax.Array:
    """z less the pair's margin: the reward of chosen must exceed that of rejected by so much (DPO with an offset, arXiv 2402.10571)."""
    return z if x.margin is None else z - x.margin


def _likelihood(z: jax.Array, x: Scores, doubt: float) -> jax.Array:
    """-l(z), or the cross-entropy of a label that is right with probability p, -p l(z) - (1-p) l(-z).

    p is 1-e with doubt e of all labels (conservative DPO: E. Mitchell, "A note on DPO with noisy preferences", 2023), or the pair's own
    (soft labels: arXiv 2409.06691, its form of conservative DPO).
    """
    z = _beyond(z, x)
    if x.label is not None:
        return -x.label * _log_sigmoid(z) - (1.0 - x.label) * _log_sigmoid(-z)
    if doubt == 0.0:
        return -_log_sigmoid(z)
    return -(1.0 - doubt) * _log_sigmoid(z) - doubt * _log_sigmoid(-z)


def sigmoid(x: Scores, o: LossOptions) -> jax.Array:
    """-l(B (u - v)): DPO, arXiv 2305.18290 eq. 7. As in TRL, label_smoothing is not read unless `smooth_sigmoid` says so."""
    return _likelihood(x.beta * (x.u - x.v), x, o.doubt)


def hinge(x: Scores, o: LossOptions) -> jax.Array:
    """max(0, 1 - B (u - v)): SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657. A pair's margin comes on top of the 1."""
    return jax.nn.relu(1.0 - _beyond(x.beta * (x.u - x.v), x))


def ipo(x: Scores, o: LossOptions) -> jax.Array:
    """(u/n+ - v/n- - 1/(2B))^2: IPO, arXiv 2310.12036 eq. 17, averaged per token."""
    return jnp.square(x.u / x.n_chosen - x.v / x.n_rejected - 1.0 / (2.0 * x.beta))


def exo_pair(x: Scores, o: LossOptions) -> jax.Array:
    """q (l(Bd) - ln(1-e)) + (1-q)(l(-Bd) - ln e), q = s(Bd), d = u - v: EXO, arXiv 2402.00856 eq. 16."""
    # The loss is flat far out on both sides; an infinite z would be 0 times infinity there.
    z = jnp.clip(x.beta * (x.u - x.v), -1e30, 1e30)
    e = o.label_smoothing
    likely = _sigmoid(z) * (_log_sigmoid(z) - jnp.log1p(-e))
    return likely + _sigmoid(-z) * (_log_sigmoid(-z) - jnp.log(e))


def nca_pair(x: Scores, o: LossOptions) -> jax.Array:
    """-l(Ba) - l(-Ba)/2 - l(-Bb)/2: NCA, arXiv 2402.05369."""
    a, b = x.beta * x.a, x.beta * x.b
    return -_log_sigmoid(a) - 0.5 * _log_sigmoid(-a) - 0.5 * _log_sigmoid(-b)


def robust(x: Scores, o: LossOptions) -> jax.Array:
    """(-(1-e) l(Bd) + e l(-Bd)) / (1 - 2e), d = u - v: robust DPO, arXiv 2403.00409."""
    z, e = x.beta * (x.u - x.v), o.label_smoothing
    return (-(1.0 - e) * _log_sigmoid(z) + e * _log_sigmoid(-z)) / (1.0 - 2.0 * e)


def bco_pair(x: Scores, o: LossOptions) -> jax.Array:
    """-l(Ba) - l(-Bb): BCO, arXiv 2404.04656, with a shift of 0."""
    return -_log_sigmoid(x.beta * x.a) - _log_sigmoid(-x.beta * x.b)


def sppo_hard(x: Scores, o: LossOptions) -> jax.Array:
    """(a - 1/(2B))^2 + (b + 1/(2B))^2: SPPO, arXiv 2405.00675, with hard labels."""
    half = 0.5 / x.beta
    return jnp.square(x.a - half) + jnp.square(x.b + half)


def apo_zero(x: Scores, o: LossOptions) -> jax.Array:
    """1 - s(Ba) + s(Bb): APO-zero, arXiv 2408.06266 eq. 7."""
    return 1.0 - _sigmoid(x.beta * x.a) + _sigmoid(x.beta * x.b)


def apo_down(x: Scores, o: LossOptions) -> jax.Array:
    """s(Ba) + 1 - s(B (a - b)): APO-down, arXiv 2408.06266 eq. 8."""
    return _sigmoid(x.beta * x.a) + 1.0 - _sigmoid(x.beta * (x.a - x.b))


def discopop(x: Scores, o: LossOptions) -> jax.Array:
    """-l(z)(1 - m) + e^-z m, z = B (u - v), m = s(z/tau): DiscoPOP, arXiv 2406.08414 eq. 5."""
    z = x.beta * (x.u - x.v)
    w = z / o.discopop_tau
    # e^-z m in one exponential: apart they are infinity times 0 where z is far below 0.
    return -_log_sigmoid(z) * _sigmoid(-w) + jnp.exp(_log_sigmoid(w) - z)


def sigmoid_norm(x: Scores, o: LossOptions) -> jax.Array:
    """-l(B (u/n+ - v/n-)): length-normalised DPO (Tulu 3, arXiv 2411.15124); label_smoothing as in `sigmoid`."""
    return _likelihood(x.beta * (x.u / x.n_chosen - x.v / x.n_rejected), x, o.doubt)


class Family(NamedTuple):
    """A loss, and where the KL penalty goes: into the scores, or beside the loss."""

    loss: Callable[[Scores, LossOptions], jax.Array]
    kl_inside: bool


# Inside where the loss falls with the first score and rises with the second everywhere; the others turn back somewhere, so that a
# penalty inside could reward divergence. With a doubt about the labels, or soft ones, sigmoid and sigmoid_norm turn back too.
FAMILIES: dict[str, Family] = {
    "sigmoid": Family(sigmoid, True),
    "hinge": Family(hinge, True),
    "ipo": Family(ipo, False),
    "exo_pair": Family(exo_pair, False),
    "nca_pair": Family(nca_pair, False),
    "robust": Family(robust, False),
    "bco_pair": Family(bco_pair, True),
    "sppo_hard": Family(sppo_hard, False),
    "apo_zero": Family(apo_zero, True),
    "apo_down": Family(apo_down, False),
    "discopop": Family(discopop, False),
    "sigmoid_norm": Family(sigmoid_norm, True),
}


# Losses that are the likelihood of a label, and those that take a margin.
LIKELIHOODS = ("sigmoid", "sigmoid_norm")
WITH_MARGIN = ("sigmoid", "sigmoid_norm", "hinge")


def kl_terms(sums: PairSums, reduction: str) -> tuple[jax.Array, jax.Array]:
    """K of chosen and rejected [R, S]: sums of token KLs ("sequence"), or those over the tokens of both responses ("token").

    0 where no KL is known: whoever has a penalty sees to it that it is.
    """
    if sums.kl is None:
        nothing = jnp.zeros_like(sums.logp[..., CHOSEN])
        return nothing, nothing
    chosen, rejected = sums.kl[..., CHOSEN], sums.kl[..., REJECTED]
    if reduction == "sequence":
        return chosen, rejected
    tokens = jnp.maximum(jnp.sum(sums.tokens, axis=-1), 1.0)
    return chosen / tokens, rejected / tokens


def pair_loss(
    sums: PairSums,
    length: jax.Array,
    beta: jax.Array,
    kl_coef: jax.Array,
    options: LossOptions,
    given: Given = NOTHING_GIVEN,
) -> jax.Array:
    """The loss of each pair, [R, S]: the weighted terms with their KL penalty.

    `sft` and `aot*` are no losses of a pair but of a micro-batch: only their penalty is here, `mixed_loss` and the step add the rest.

    Args:
      sums: see `scores.pair_sums`.
      length: [R, S, B] completion lengths as TRL counts them; clamped to at least 1.
      beta, kl_coef: scalars (arrays, so that they change without a new trace).
      given: what the data say of each pair: a beta of its own, a margin, a soft label, a weight.
    """
    beta = given.beta_of(beta)
    a, b = sums.logratio[..., CHOSEN], sums.logratio[..., REJECTED]
    phi = DIVERGENCES[options.f_divergence]
    n = jnp.maximum(length.astype(jnp.float32), 1.0)
    k_chosen, k_rejected = kl_terms(sums, options.kl_reduction)
    down, up = kl_coef * k_chosen, kl_coef * k_rejected
    u, v = phi(a, options.f_alpha), phi(b, options.f_alpha)
    plain = Scores(u, v, a, b, n[..., CHOSEN], n[..., REJECTED], beta, given.margin, given.label)
    # sigmoid_norm divides by the length first: the penalty lowers its margin by c K all the same.
    inside = plain._replace(u=u - down, v=v + up, a=a - down, b=b + up)
    total = jnp.zeros_like(a)
    for name, weight in zip(options.types, options.weights):
        if name == "sft" or name in AOT_TYPES:
            total = total + weight * beta * (down + up)
            continue
        family = FAMILIES[name]
        sure = options.doubt == 0 and given.label is None
        inner = family.kl_inside and (sure or name not in LIKELIHOODS)
        if inner and name == "sigmoid_norm":
            lowered = plain._replace(u=u - down * plain.n_chosen, v=v + up * plain.n_rejected)
            value = family.loss(lowered, options)
        elif inner:
            value = family.loss(inside, options)
        else:
            value = family.loss(plain, options) + beta * (down + up)
        total = total + weight * value
    if options.use_weighting:
        mean = jax.lax.stop_gradient(sums.wpo / jnp.maximum(sums.tokens, 1.0))
        total = total * jnp.exp(mean[..., CHOSEN] + mean[..., REJECTED])
    return total if given.weight is None else total * given.weight


def mixed_loss(sums: PairSums, group: jax.Array, weight: jax.Array, beta: jax.Array, options: LossOptions) -> jax.Array:
    """What the `aot*` terms add to the loss: a scalar, each group's mean with its share.

    Args:
      sums, group, weight: see `aot.aot_losses`; `weight` is each pair's share of the loss.
    """
    total = jnp.zeros((), jnp.float32)
    for name, share in zip(options.types, options.weights):
        if name in AOT_TYPES:
            losses, weights = aot_losses(name, sums, group, weight, beta, options.label_smoothing)
            total = total + share * jnp.sum(jnp.where(weights > 0, weights * losses, 0.0))
    return total
