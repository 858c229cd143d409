"""Optimizers and clipping as torch and transformers have them, so that a ported run takes the same steps.

Each optimizer is the direction u of a step p <- p - rate * u. The rate stays outside, so that it can change without a new trace.
Layers are stacked in one array here and are tensors of their own there: what torch does to a whole tensor is done per layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_dpo.arrays import Tree, flatten, unflatten

# transformers' Trainer decays everything but biases and norms, by name.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_STACKED = "model.layers."


def decays(path: str) -> bool:
    """Whether weight decay acts on the parameter with this dotted path (transformers' rule: no bias, no norm)."""
    return _NO_DECAY.search(path.lower()) is None


def decay_mask(params: Tree) -> Tree:
    return unflatten({path: decays(path) for path in flatten(params)})


@dataclass(frozen=True)
class OptimizerOptions:
    """What an optimizer is made of; names and meanings are those of transformers' training arguments.

    `args` is `optim_args`: momentum, dampening and nesterov of sgd.
    """

    name: str = "adamw_torch_fused"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    args: dict[str, Any] = field(default_factory=dict)


def make_optimizer(options: OptimizerOptions, params: Tree) -> optax.GradientTransformation:
    """The optimizer of that name for these parameters (arrays or shapes)."""
    return _MAKERS[options.name](options, params)


def _decay(options: OptimizerOptions, params: Tree) -> optax.GradientTransformation:
    return optax.add_decayed_weights(options.weight_decay, mask=decay_mask(params))


def _adamw(options: OptimizerOptions, params: Tree) -> optax.GradientTransformation:
    """torch's AdamW (arXiv 1711.05101): u = m / (sqrt(v) + eps) + weight_decay * p with bias-corrected moments."""
    return optax.chain(
        _adam(options.b1, options.b2, options.eps),
        _decay(options, params),
    )


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction with the state of `optax.scale_by_adam`, whose own 1 - b2^t is up to 3e-5 off in float32: it is taken from a b2
    that was rounded. All updates then err to the same side, which adds up over a run."""

    def correction(b: float, step: jax.Array) -> jax.Array:
        return -jnp.expm1(step.astype(jnp.float32) * math.log(b)) if b > 0 else jnp.float32(1.0)

    def init(params: Tree) -> optax.ScaleByAdamState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(
        grads: Tree, state: optax.ScaleByAdamState, params: Tree | None = None
    ) -> tuple[Tree, optax.ScaleByAdamState]:
        step = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
        first, second = correction(b1, step), correction(b2, step)
        u = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + eps), mu, nu)
        return u, optax.ScaleByAdamState(step, mu, nu)

    return optax.GradientTransformation(init, update)


def _lion(options: OptimizerOptions, params: Tree) -> optax.GradientTransformation:
    """Lion (arXiv 2302.06675, algorithm 2): u = sign(b1 m + (1 - b1) g) + weight_decay * p, then m <- b2 m + (1 - b2) g."""
    return optax.chain(optax.scale_by_lion(b1=options.b1, b2=options.b2), _decay(options, params))


def _sgd(options: OptimizerOptions, params: Tree) -> optax.GradientTransformation:
    """torch's SGD: the decay is added to the gradient, before the momentum b <- momentum * b + (1 - dampening) * g.

    The first b is the first gradient itself. u = b, or g + momentum * b with nesterov.
    """
    momentum, dampening = options.args.get("momentum", 0.0), options.args.get("dampening", 0.0)
    parts = [_decay(options, params)]
    if momentum and dampening:
        parts.append(_dampen(dampening))
    if momentum:
        parts.append(optax.trace(momentum, nesterov=options.args.get("nesterov", False)))
    return optax.chain(*parts)


class StepCount(NamedTuple):
    """How many steps were taken, int32."""

    step: jax.Array


def _dampen(dampening: float) -> optax.GradientTransformation:
    """All gradients but the first times (1 - dampening)."""

    def init(params: Tree) -> StepCount:
        return StepCount(jnp.zeros((), jnp.int32))

    def update(grads: Tree, state: StepCount, params: Tree | None = None) -> tuple[Tree, StepCount]:
        factor = jnp.where(state.step == 0, 1.0, 1.0 - dampening)
        return jax.tree.map(lambda g: g * factor, grads), StepCount(optax.safe_increment(state.step))

    return optax.GradientTransformation(init, update)


class FactoredState(NamedTuple):
    """Adafactor's second moments. A matrix [.., O, I] has `rows` [.., O] and `columns` [.., I], anything else `whole`."""

    step: jax.Array
    rows: Tree
    columns: Tree
    whole: Tree


# transformers' Trainer takes these and no others: the rate is the schedule's, not the parameters' scale.
_FACTOR_EPS, _FACTOR_CLIP, _FACTOR_DECAY = 1e-30, 1.0, -0.8


def _adafactor(options: OptimizerOptions, params: Tree) -> optax.GradientTransformation:
    return optax.chain(_scale_by_factored_moments(), _decay(options, params))


def _scale_by_factored_moments() -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235, algorithms 4 and 5) as transformers' Trainer runs it.

    In step t (from 1), b = 1 - t^-0.8 and s = g^2 + 1e-30: R <- b R + (1 - b) mean_columns(s), C the same over rows, and
    u = g / sqrt(R / mean(R) * C); tensors of one axis have V <- b V + (1 - b) s and u = g / sqrt(V). Then u is divided by
    max(1, rms(u)), over its tensor.

    optax has the same factors, but it would take the layer axis for one of a matrix where it is the longer one (a LoRA matrix
    [28, 4, 4096] has more layers than rows), and cut by the root mean square of all layers together.
    """

    def init(params: Tree) -> FactoredState:
        flat = flatten(params)
        matrices = {path: p for path, p in flat.items() if _is_matrix(path, p)}
        return FactoredState(
            jnp.zeros((), jnp.int32),
            unflatten({path: jnp.zeros(p.shape[:-1], p.dtype) for path, p in matrices.items()}),
            unflatten({path: jnp.zeros((*p.shape[:-2], p.shape[-1]), p.dtype) for path, p in matrices.items()}),
            unflatten({path: jnp.zeros(p.shape, p.dtype) for path, p in flat.items() if path not in matrices}),
        )

    def update(grads: Tree, state: FactoredState, params: Tree | None = None) -> tuple[Tree, FactoredState]:
        count = optax.safe_increment(state.step)
        keep = 1.0 - count.astype(jnp.float32) ** _FACTOR_DECAY
        mix = lambda old, new: keep * old + (1.0 - keep) * new  # noqa: E731
        rows, columns, whole = (flatten(tree) for tree in state[1:])
        directions = {}
        for path, g in flatten(grads).items():
            square = g * g + _FACTOR_EPS
            if path in rows:
                r = rows[path] = mix(rows[path], square.mean(-1))
                c = columns[path] = mix(columns[path], square.mean(-2))
                u = g * jax.lax.rsqrt(r / r.mean(-1, keepdims=True))[..., None] * jax.lax.rsqrt(c)[..., None, :]
            else:
                v = whole[path] = mix(whole[path], square)
                u = g * jax.lax.rsqrt(v)
            axes = tuple(range(_layer_axes(path), g.ndim))
            rms = jnp.sqrt(jnp.mean(u * u, axis=axes, keepdims=True))
            directions[path] = u / jnp.maximum(1.0, rms / _FACTOR_CLIP)
        return unflatten(directions), FactoredState(count, unflatten(rows), unflatten(columns), unflatten(whole))

    return optax.GradientTransformation(init, update)


def _layer_axes(path: str) -> int:
    """Leading axes over which an array holds tensors of their own: 1 where layers are stacked."""
    return int(path.startswith(_STACKED))


def _is_matrix(path: str, p: Any) -> bool:
    return p.ndim - _layer_axes(path) >= 2


def clip(grads: Any, norm: jax.Array, max_norm: float) -> Any:
    """torch's clip_grad_norm_: g * min(1, max_norm / (norm + 1e-6)); nothing where max_norm is 0."""
    if max_norm <= 0:
        return grads
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads)


_MAKERS: dict[str, Callable[[OptimizerOptions, Tree], optax.GradientTransformation]] = {
    "adamw_torch": _adamw,
    "adamw_torch_fused": _adamw,
    "adafactor": _adafactor,
    "lion_32bit": _lion,
    "sgd": _sgd,
}
OPTIMIZERS = tuple(_MAKERS)
