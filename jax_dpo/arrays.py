"""The parameter tree as nested dicts, and its flat form keyed by dotted paths such as `model.layers.self_attn.q_proj.weight`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
