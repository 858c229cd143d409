"""Answers to prompts: a cached decode, one compiled program for a whole answer.

Prompts are padded on the left, so that every answer begins at the same place; keys and values of padding are never seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_dpo.models.config import ModelConfig
from jax_dpo.models.decoder import blocks, embed, last_norm, rotary_tables, shaped_logits, unembedding
from jax_dpo.sharding.mesh import row_shards
from jax_dpo.sharding.place import fetch, rows_to_devices


class Sampling(NamedTuple):
    """How the next token is drawn: the likeliest for temperature 0, else from the likeliest tokens with total probability `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0


class _Cache(NamedTuple):
    """Keys and values of all layers, [L, B, S, G, H]."""

    k: jax.Array
    v: jax.Array


def _mix(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of q [B, C, N, H] over cached keys [B, S, G, H] where mask [B, C, S] allows."""
    B, C, N, H = q.shape
    G = k.shape[2]
    scores = jnp.einsum("bcgnh,bsgh->bgncs", q.reshape(B, C, G, N // G, H), k, preferred_element_type=jnp.float32)
    scores, cap = scores * config.attention_scale, config.attention_softcap
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    p = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1).astype(v.dtype)
    return jnp.einsum("bgncs,bsgh->bcgnh", p, v).reshape(B, C, N, H)


def _forward(
    config: ModelConfig, params: Mapping[str, Any], tokens: jax.Array, start: jax.Array, pad: jax.Array, cache: _Cache
) -> tuple[jax.Array, _Cache]:
    """Tokens [B, C] at places start .. start + C of the cache -> hidden state of the last one [B, D], and the cache with them."""
    C, S = tokens.shape[1], cache.k.shape[2]
    place = start + jnp.arange(C, dtype=jnp.int32)
    positions = jnp.maximum(place[None, :] - pad[:, None], 0)
    cos, sin, rope_of_layer = rotary_tables(config, positions)
    keys = jnp.arange(S, dtype=jnp.int32)
    seen = (keys[None, None, :] <= place[None, :, None]) & (keys[None, None, :] >= pad[:, None, None])
    far = [S if w is None else w for w in config.layer_windows]
    real = place[None, :] >= pad[:, None]

    def body(graph: Any, x: jax.Array, layer: tuple) -> tuple[jax.Array, _Cache]:
        weights, rope, window, k_old, v_old = layer
        block = nnx.merge(graph, weights)
        stored = []

        def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            k_all = jax.lax.dynamic_update_slice_in_dim(k_old, k, start, axis=1)
            v_all = jax.lax.dynamic_update_slice_in_dim(v_old, v, start, axis=1)
            stored.append(_Cache(k_all, v_all))
            near = place[None, :, None] - keys[None, None, :] < window
            return _mix(config, q, k_all, v_all, seen & near)

        return block(x, cos[rope], sin[rope], mix, real=real)[0], stored[0]

    x = embed(config, params["model"]["embed_tokens"]["weight"][tokens])
    per_layer = (jnp.asarray(rope_of_layer), jnp.asarray(far, jnp.int32), cache.k, cache.v)
    parts = []
    for graph, weights, layers in blocks(config, params):
        x, part = jax.lax.scan(partial(body, graph), x, (weights, *(a[layers] for a in per_layer)))
        parts.append(part)
    cache = parts[0] if len(parts) == 1 else _Cache(*(jnp.concatenate(xs) for xs in zip(*parts)))
    return last_norm(config, params, x[:, -1]), cache


def _next_token(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """logits [B, V] -> token ids [B]."""
    if sampling.temperature <= 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        # The likeliest token always stays; the cut is the smallest logit whose predecessors have less than top_p.
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 4, 6))
def _decode(
    config: ModelConfig,
    params: Mapping[str, Any],
    prompts: jax.Array,
    pad: jax.Array,
    new_tokens: int,
    stop: jax.Array,
    sampling: Sampling,
    key: jax.Array,
) -> jax.Array:
    """[B, P] prompts -> [B, new_tokens] answers; after a stop token an answer is filled with the first stop token."""
    B, P = prompts.shape
    dtype = unembedding(config, params).dtype
    shape = (config.num_layers, B, P + new_tokens, config.num_kv_heads, config.head_dim)
    cache = _Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    head = unembedding(config, params)

    def draw(hidden: jax.Array, i: jax.Array | int) -> jax.Array:
        return _next_token(shaped_logits(config, hidden, head), jax.random.fold_in(key, i), sampling)

    def is_stop(token: jax.Array) -> jax.Array:
        return jnp.any(token[:, None] == stop[None, :], axis=-1)

    hidden, cache = _forward(config, params, prompts, jnp.int32(0), pad, cache)
    first = draw(hidden, 0)
    out = jnp.full((B, new_tokens), stop[0], jnp.int32).at[:, 0].set(first)

    def going(carry: tuple) -> jax.Array:
        i, _, _, _, done = carry
        return (i < new_tokens) & ~jnp.all(done)

    def one(carry: tuple) -> tuple:
        i, token, cache, out, done = carry
        hidden, cache = _forward(config, params, token[:, None], P + i - 1, pad, cache)
        token = jnp.where(done, stop[0], draw(hidden, i))
        return i + 1, token, cache, out.at[:, i].set(token), done | is_stop(token)

    carry = (jnp.int32(1), first, cache, out, is_stop(first))
    return jax.lax.while_loop(going, one, carry)[3]


def generate(
    config: ModelConfig,
    params: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 42,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Token ids of an answer to each prompt, the stop token that ended it included.

    Args:
      params: the parameter tree in the compute dtype.
      stop_ids: tokens that end an answer; where there are none, every answer has `max_new_tokens` tokens.
      mesh: spreads the prompts over the devices of its rows; `params` are whole on each of them. The answers are the same.
    """
    wanted = len(prompts)
    if mesh is not None:  # devices that would have nothing to do answer the first prompt once more
        prompts = [*prompts, *[prompts[0]] * (-wanted % row_shards(mesh))]
    longest = -(-max(len(p) for p in prompts) // 32) * 32
    pad = np.array([longest - len(p) for p in prompts], np.int32)
    ids = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(ids, prompts):
        row[longest - len(prompt) :] = prompt
    stop = jnp.asarray(list(stop_ids) or [-1], jnp.int32)
    sampling, key = Sampling(temperature, top_p), jax.random.key(seed)
    if mesh is None:
        answers = _decode(config, params, jnp.asarray(ids), jnp.asarray(pad), max_new_tokens, stop, sampling, key)
    else:
        placed, pads = (rows_to_devices(x, mesh) for x in (ids, pad))
        answers = fetch(_decode(config, params, placed, pads, max_new_tokens, stop, sampling, key))
    return [_until_stop(row, set(stop_ids)) for row in np.asarray(answers)[:wanted].tolist()]


def _until_stop(ids: list[int], stop: set[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in stop:
            return ids[: i + 1]
    return ids
