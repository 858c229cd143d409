"""The one decoder: token ids of packed trees -> final hidden states, for every family that `ModelConfig` can describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_dpo.arrays import Tree, flatten, unflatten
from jax_dpo.models.config import ModelConfig, layers_of
from jax_dpo.models.experts import Routing, Run, everywhere
from jax_dpo.models.layers import Block, Embedding, Linear, RMSNorm, dora_factor
from jax_dpo.ops.attention.api import Bounds, attention, tree_bounds


class _Stack(nnx.Module):
    def __init__(self, config: ModelConfig) -> None:
        self.embed_tokens = Embedding(config)
        self.layers = Block(config)
        self.norm = RMSNorm(config, config.hidden_size, stacked=False)


class Decoder(nnx.Module):
    """A causal language model with Hugging Face's parameter names, layers stacked on a leading axis."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.model = _Stack(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config, "lm_head")


@cache
def describe(config: ModelConfig) -> tuple[Any, Tree]:
    """(graph definition, abstract parameter tree of float32 shapes) of a model; no array is made."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config)))
    return graph, nnx.to_pure_dict(state)


@cache
def _block(config: ModelConfig, sparse: bool) -> tuple[Any, tuple[str, ...]]:
    """The graph definition of one block, with experts or without, and the paths of its leaves under `model.layers`."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(config, sparse)))
    return graph, tuple(flatten(nnx.to_pure_dict(state)))


def blocks(config: ModelConfig, params: Mapping[str, Any]) -> Iterator[tuple[Any, Tree, slice]]:
    """Layers of one kind that follow each other, as what a scan runs over: (graph definition of the block, their parameters stacked,
    which layers they are). One piece, but where some layers have experts and others have not."""
    leaves = flatten(params["model"]["layers"])
    dense = set(config.experts.dense_layers) if config.experts is not None else set(range(config.num_layers))
    start = 0
    while start < config.num_layers:
        sparse, stop = start not in dense, start + 1
        while stop < config.num_layers and (stop not in dense) == sparse:
            stop += 1
        graph, paths = _block(config, sparse)
        found = {}
        for path in paths:
            stack = layers_of(config, f"model.layers.{path}")
            first = stack.index(start)
            whole = (first, first + stop - start) == (0, len(stack))
            part = slice(first, first + stop - start)
            found[path] = leaves[path] if whole else leaves[path][part]
            scales = _layer_scales(config, path)
            if scales is not None:
                found[path] = found[path] * jnp.asarray(scales[part], found[path].dtype)[:, None, None]
        yield graph, unflatten(found), slice(start, stop)
        start = stop


def _layer_scales(config: ModelConfig, path: str) -> tuple[float, ...] | None:
    """The adapter's scale in each layer, for the `lora_b` (a path under `model.layers`) of a linear layer whose layers differ."""
    stem, _, which = path.rpartition(".")
    target = config.lora.target(f"model.layers.{stem}") if config.lora is not None and which == "lora_b" else None
    return target.scales if target is not None and target.scale is None else None


def stays_float32(path: str) -> bool:
    """Whether a leaf is used in float32 whatever the model computes in: weights of norms, magnitudes of DoRA."""
    return path.endswith(("norm.weight", ".lora_magnitude"))


def without_adapter(config: ModelConfig) -> ModelConfig:
    return replace(config, lora=None)


def precision(compute_dtype: str) -> AbstractContextManager[Any]:
    """What float32 products are made with while a program is traced: with whole float32, where a TPU would take one pass of bfloat16
    and a GPU TF32 by themselves. `JAX_DEFAULT_MATMUL_PRECISION` wins, and bfloat16 products need nothing."""
    given = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return jax.default_matmul_precision("highest") if compute_dtype == "float32" and given is None else nullcontext()


def cast_for_compute(params: Mapping[str, Any], dtype: jnp.dtype) -> Tree:
    """Matrices in the compute dtype, norm weights as they are.

    Done once, on sharded leaves, before the layers gather them: what travels between devices is the small copy.
    """
    flat = flatten(params)
    return unflatten({p: x if stays_float32(p) else x.astype(dtype) for p, x in flat.items()})


def unembedding(config: ModelConfig, params: Mapping[str, Any]) -> jax.Array:
    """The matrix [V, D] that turns hidden states into logits, with its adapter merged where it has one."""
    if config.tie_word_embeddings:
        return params["model"]["embed_tokens"]["weight"]
    head = params["lm_head"]
    target = config.lora.target("lm_head") if config.lora is not None else None
    if target is None:
        return head["weight"]
    added = jnp.matmul(head["lora_b"], head["lora_a"], preferred_element_type=jnp.float32) * target.scales[0]
    whole = head["weight"].astype(jnp.float32) + added
    if "lora_magnitude" in head:
        factor = dora_factor(head["weight"], head["lora_a"], head["lora_b"], head["lora_magnitude"], target.scales[0])
        whole *= factor[:, None]
    return whole.astype(head["weight"].dtype)


def shaped_logits(config: ModelConfig, hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of final hidden states [..., D], capped where the family does so; `head` is the unembedding."""
    z = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    cap = config.logit_softcap
    return z if cap is None else cap * jnp.tanh(z / cap)


def embed(config: ModelConfig, found: jax.Array) -> jax.Array:
    """Rows of the embedding as the first block takes them; the factor is rounded to their dtype, as transformers rounds it."""
    return found if config.embedding_scale == 1.0 else found * jnp.asarray(config.embedding_scale, found.dtype)


def _kinds(values: tuple) -> tuple[list, np.ndarray]:
    """Distinct values in order of appearance, and for every layer the number of its own."""
    distinct = list(dict.fromkeys(values))
    return distinct, np.array([distinct.index(v) for v in values], np.int32)


def rotary_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """cos and sin [kinds, R, T, H/2] float32 of the distinct rotary embeddings, and which one each layer uses [L]."""
    ropes, rope_of_layer = _kinds(config.layer_ropes)
    frequencies = jnp.asarray(np.stack([r.inverse_frequencies(config.head_dim) for r in ropes]))
    factor = jnp.asarray([r.attention_factor for r in ropes], jnp.float32)[:, None, None, None]
    angle = positions.astype(jnp.float32)[None, :, :, None] * frequencies[:, None, None, :]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor, rope_of_layer


def _same(x: jax.Array) -> jax.Array:
    return x


def _look(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return table[tokens]


def hidden_states(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    pair: jax.Array,
    branch: jax.Array,
    **options: Any,
) -> jax.Array:
    """Final hidden states (after the last norm) of packed trees, [R, T, D]; see `forward`."""
    return forward(config, params, tokens, positions, pair, branch, **options)[0]


def forward(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    pair: jax.Array,
    branch: jax.Array,
    *,
    remat: bool = False,
    dropout_key: jax.Array | None = None,
    constrain: Callable[[jax.Array], jax.Array] = _same,
    lookup: Callable[[jax.Array, jax.Array], jax.Array] = _look,
    experts: Run = everywhere,
    watch: Callable[[Routing], Any] | None = None,
    implementation: str = "chunked",
) -> tuple[jax.Array, list[Any]]:
    """Final hidden states (after the last norm) of packed trees, and what was watched of the routers.

    Args:
      params: the parameter tree in the compute dtype (`cast_for_compute`).
      tokens, positions, pair, branch: [R, T] int32, see `data.batch.Batch`.
      remat: keep only the attention's output between forward and backward and run the rest of each block again; else the products
        of the linear layers are kept too.
      dropout_key: turns the adapter's dropout on.
      constrain: puts the sharding of activations [R, T, D] where automatic partitioning would guess.
      lookup: table [V, D] and ids [R, T] -> [R, T, D], where the table is cut over devices.
      experts: runs a mixture of experts where rows and matrices are cut over devices.
      watch: called with the routing of each layer that has experts; what it gives back (arrays) is returned.
    Returns:
      [R, T, D] in the dtype of the embeddings, and for each run of such layers what `watch` gave, stacked over its layers.
    """
    windows, window_of_layer = _kinds(config.layer_windows)
    bounds = Bounds(*(jnp.stack(x) for x in zip(*(tree_bounds(pair, branch, w) for w in windows))))
    cos, sin, rope_of_layer = rotary_tables(config, positions)
    real = pair > 0

    def body(graph: Any, x: jax.Array, layer: tuple) -> tuple[jax.Array, Any]:
        weights, window, rope, index = layer
        block = nnx.merge(graph, weights)
        mine = Bounds(*(b[window] for b in bounds))
        mix = partial(
            attention,
            bounds=mine,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            implementation=implementation,
        )
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        x, routing = block(x, cos[rope], sin[rope], mix, key, real=real, experts=experts)
        return constrain(x), None if watch is None or routing is None else watch(routing)

    x = embed(config, constrain(lookup(params["model"]["embed_tokens"]["weight"], tokens)))
    index = jnp.arange(config.num_layers, dtype=jnp.int32)
    per_layer = jnp.asarray(window_of_layer), jnp.asarray(rope_of_layer), index
    watched = []
    for graph, weights, layers in blocks(config, params):
        run = jax.checkpoint(partial(body, graph), policy=_kept(remat), prevent_cse=False)
        x, seen = jax.lax.scan(run, x, (weights, *(a[layers] for a in per_layer)))
        watched += [] if seen is None else [seen]
    return last_norm(config, params, x), watched


def _kept(remat: bool) -> Any:
    """What is kept between forward and backward: with `remat` the attention alone, else the products of the linear layers too. What
    lies between them (norms, activations, rotations) costs less to make again than to write and read."""
    return jax.checkpoint_policies.save_only_these_names(
        "attention_out", "attention_lse", *(() if remat else ("linear_out",))
    )


def last_norm(config: ModelConfig, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """The norm behind the last block: [..., D] -> [..., D]."""
    graph, _ = describe(config)
    return nnx.merge(graph, params).model.norm(x)


def logits(config: ModelConfig, params: Mapping[str, Any], input_ids: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, T, V] float32 logits of ordinary padded sequences; `mask` [B, T] is 1 on real tokens, padding left or right.

    A plain sequence is a tree without branches. Positions count from the first real token.
    """
    pair = mask.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(pair, axis=1) - 1, 0)
    hidden = hidden_states(config, params, input_ids, positions, pair, jnp.zeros_like(pair))
    return shaped_logits(config, hidden, unembedding(config, params))
