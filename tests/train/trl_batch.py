"""TRL's fixed batches and their models (tests/golden/losses), laid out as packed pair trees on one device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jax_dpo.arrays import Tree as Params
from jax_dpo.arrays import flatten, unflatten
from jax_dpo.data.batch import Batch, Tree, empty_batch, fill_rows, tree_tokens
from jax_dpo.data.loader import shares
from jax_dpo.data.pack import RowShape
from jax_dpo.loss.family import LossOptions
from jax_dpo.models.config import ModelConfig
from jax_dpo.sharding.mesh import make_mesh
from jax_dpo.train.state import Facts, Frozen, Knobs
from jax_dpo.weights.source import open_model

GOLDEN = Path(__file__).parents[1] / "golden"
LOSSES = json.loads((GOLDEN / "losses" / "losses.json").read_text(encoding="utf-8"))
ARRAYS = load_file(GOLDEN / "losses" / "batch.safetensors")


@lru_cache(maxsize=2)
def model(name: str) -> tuple[ModelConfig, Params]:
    """Shape and float32 weights of the model in a directory of tests/golden."""
    files = open_model(GOLDEN / name)
    return files.config, unflatten({path: leaf.read() for path, leaf in files.leaves.items()})


def policy() -> Params:
    return model("losses/policy")[1]


def frozen() -> Frozen:
    return Frozen({}, model("training/start/llama")[1])


def facts(**changes: Any) -> Facts:
    config = model("losses/policy")[0]
    return Facts(config, config, False, False, "float32", **{"remat": False, **changes})


def one_device() -> jax.sharding.Mesh:
    return make_mesh(1, -1, 1, devices=jax.devices()[:1])


def trees(name: str, share_prompt: bool = True) -> list[Tree]:
    """The pairs of TRL's padded rows: all chosen first, then all rejected."""
    ids, real, answer = (ARRAYS[f"{name}.{k}"] for k in ("input_ids", "attention_mask", "completion_mask"))
    n = len(ids) // 2

    def side(row: int) -> tuple[np.ndarray, np.ndarray]:
        return ids[row][(real[row] == 1) & (answer[row] == 0)], ids[row][answer[row] == 1]

    found = []
    for i in range(n):
        (prompt, chosen), (other, rejected) = side(i), side(i + n)
        found.append(Tree(prompt, chosen, other, rejected, share_prompt and np.array_equal(prompt, other)))
    return found


def laid_out(pairs: Sequence[Tree], *, ld_alpha: float | None = None, sft: bool = False, group: bool = False) -> Batch:
    """One of TRL's micro-batches as one row."""
    tokens = sum(tree_tokens(tree) for tree in pairs)
    shape = RowShape(-(-tokens // 64) * 64, -(-tokens // 8) * 8, len(pairs), 1)
    batch = empty_batch(1, shape, token_weight=ld_alpha is not None, sft=sft, group=group)
    scored = lambda i: len(pairs[i].chosen) - (len(pairs[i].chosen_prompt) == 0)  # noqa: E731
    fill_rows(batch, 0, [shares([np.arange(len(pairs))], scored if sft else None)], pairs.__getitem__, ld_alpha)
    return Batch(*(None if x is None else jnp.asarray(x) for x in batch))


def options_of(given: dict[str, Any]) -> LossOptions:
    """A case's options of TRL as ours."""
    types = [given["loss_type"]] if isinstance(given["loss_type"], str) else given["loss_type"]
    return LossOptions(
        types=tuple(types),
        weights=tuple(given.get("loss_weights") or [1.0] * len(types)),
        label_smoothing=given.get("label_smoothing", 0.0),
        f_divergence=given.get("f_divergence_type", "reverse_kl"),
        f_alpha=given.get("f_alpha_divergence_coef", 0.5),
        discopop_tau=given.get("discopop_tau", 0.05),
        use_weighting=given.get("use_weighting", False),
    )


def knobs(beta: float, kl_coef: float = 0.0) -> Knobs:
    return Knobs(jnp.float32(0), jnp.float32(beta), jnp.float32(kl_coef))


def norm(gradient: Params) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(gradient))))


def layer(gradient: Params, name: str) -> np.ndarray:
    """The gradient of a parameter by its Hugging Face name, out of the stacked tree."""
    flat = flatten(gradient)
    if not name.startswith("model.layers."):
        return np.asarray(flat[name])
    _, _, number, rest = name.split(".", 3)
    return np.asarray(flat[f"model.layers.{rest}"][int(number)])


def per_answer(batch: Batch, values: Any, answer: int) -> np.ndarray:
    """A token result [1, K] of the scored tokens of one answer: 2 * pair for chosen, one more for rejected."""
    return np.asarray(values)[np.asarray(batch.slot) == answer]
