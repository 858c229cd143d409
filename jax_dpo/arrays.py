"""What several packages of one level share: the parameter tree, and what is known of a scored token.

The tree is nested dicts; its flat form is keyed by dotted paths such as `model.layers.self_attn.q_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import jax

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {dotted path: leaf}, in the tree's own order."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, path + "."))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: Tree = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> Tree:
    """One tree that has the leaves of both; where both have a leaf, `top` wins."""
    tree = dict(base)
    for key, value in top.items():
        below = tree.get(key)
        tree[key] = overlay(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return tree


class TokenStats(NamedTuple):
    """What is known of a scored token under policy and reference: arrays [R, K], float32, natural logarithms.

    `logp` and `kl` carry gradients to the policy; nothing else carries any. `ref_logp` and `kl` are None where the reference is not at
    hand.
    """

    logp: jax.Array
    """log pi(y): log-probability of the target under the policy, nats."""
    ref_logp: jax.Array | None
    """log ref(y)."""
    kl: jax.Array | None
    """sum_v pi(v) (log pi(v) - log ref(v)) over the whole vocabulary, nats; not clamped."""
    entropy: jax.Array
    """-sum_v pi(v) log pi(v), nats."""
    mean_logit: jax.Array
    """mean of the policy's logits over the vocabulary."""
    log_sum_sq: jax.Array
    """log sum_v pi(v)^2 (the weight of WPO, arXiv 2406.11827)."""
    top1: jax.Array
    """1 where the target is the policy's most likely token, the lowest id winning a tie; else 0."""
