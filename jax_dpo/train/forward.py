"""Policy and reference on one micro-batch: from tokens to per-token statistics and sums of pairs. Traced inside the jitted functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_dpo.arrays import Tree, overlay
from jax_dpo.data.batch import BRANCHES, Batch
from jax_dpo.loss.router import RouterSums, router_sums, router_watch
from jax_dpo.loss.scores import PairSums, pair_sums
from jax_dpo.models.config import ModelConfig
from jax_dpo.models.decoder import cast_for_compute, forward, precision, unembedding
from jax_dpo.models.experts import everywhere
from jax_dpo.ops.token_stats.api import TokenStats, token_stats
from jax_dpo.sharding.experts import spread_experts
from jax_dpo.sharding.rules import activations
from jax_dpo.sharding.tables import lookup, parts_of
from jax_dpo.train.state import Facts, Frozen


def states(
    config: ModelConfig, params: Tree, batch: Batch, mesh: Mesh, attention: str, **options: Any
) -> tuple[jax.Array, list[Any]]:
    """Hidden states [R, T, D] of a packed batch, laid out over the mesh, and what was watched of the routers."""
    return forward(
        config,
        params,
        batch.tokens,
        batch.positions,
        batch.pair,
        batch.branch,
        constrain=_constrained(mesh),
        lookup=lookup(mesh),
        experts=spread_experts(mesh, everywhere),
        implementation=attention,
        **options,
    )


def _constrained(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return partial(jax.lax.with_sharding_constraint, shardings=activations(mesh))


def scored_states(
    facts: Facts, config: ModelConfig, params: Tree, batch: Batch, mesh: Mesh, **options: Any
) -> tuple[jax.Array, list[Any]]:
    """Hidden states [R, K, D] where the scored tokens are predicted, and what was watched of the routers."""
    hidden, watched = states(config, params, batch, mesh, facts.attention, **options)
    return _constrained(mesh)(jnp.take_along_axis(hidden, batch.source[..., None], axis=1)), watched


def statistics(
    facts: Facts, params: Tree, frozen: Frozen, batch: Batch, mesh: Mesh, key: jax.Array | None
) -> TokenStats:
    """Policy and reference on one micro-batch, without the routers: see `watched_statistics`."""
    return watched_statistics(facts, params, frozen, batch, mesh, key)[0]


def watched_statistics(
    facts: Facts, params: Tree, frozen: Frozen, batch: Batch, mesh: Mesh, key: jax.Array | None
) -> tuple[TokenStats, RouterSums | None]:
    """Policy and reference on one micro-batch: per-token statistics [R, K]. Gradients flow into `params` alone.

    Where the reference's sums were made beforehand, it is not run, and what only it could tell is None. The sums of the policy's
    routers are made where the batch says whose its tokens are (`Batch.owner`).
    """
    dtype = jnp.dtype(facts.compute_dtype)
    base = jax.tree.map(jax.lax.stop_gradient, cast_for_compute(frozen.base, dtype))
    policy = overlay(base, cast_for_compute(params, dtype))
    slots = batch.weight.shape[1]
    watch = None if batch.owner is None else router_watch(batch.owner, batch.copies, slots)
    options: dict[str, Any] = {"remat": facts.remat, "dropout_key": key, "watch": watch}
    hidden, watched = scored_states(facts, facts.policy, policy, batch, mesh, **options)
    routers = router_sums(watched, batch.owner, batch.copies, slots) if watched else None
    ref_hidden = ref_unembed = None
    if not facts.precomputed:
        reference = reference_params(facts, frozen, base)
        ref_hidden = jax.lax.stop_gradient(scored_states(facts, facts.reference, reference, batch, mesh)[0])
        ref_unembed = None if facts.shared_head else unembedding(facts.reference, reference)
    head = unembedding(facts.policy, policy)
    return stats_of(facts, mesh, batch, hidden, head, ref_hidden, ref_unembed), routers


def reference_params(facts: Facts, frozen: Frozen, base: Tree) -> Tree:
    """The reference's parameters in the compute dtype; `base` is there already."""
    own = jax.tree.map(jax.lax.stop_gradient, cast_for_compute(frozen.reference, jnp.dtype(facts.compute_dtype)))
    return overlay(base, own) if facts.reference_on_base else own


def stats_of(
    facts: Facts,
    mesh: Mesh,
    batch: Batch,
    hidden: jax.Array,
    unembed: jax.Array,
    ref_hidden: jax.Array | None = None,
    ref_unembed: jax.Array | None = None,
) -> TokenStats:
    gather, spread = parts_of(mesh, vocabulary_shards=facts.vocabulary_shards)
    return token_stats(
        hidden,
        ref_hidden,
        unembed,
        ref_unembed,
        batch.target,
        softcap=facts.policy.logit_softcap,
        row_shards=facts.row_shards,
        vocabulary_shards=facts.vocabulary_shards,
        gather=gather,
        spread=spread,
        implementation=facts.token_stats,
    )


def sums_of_pairs(stats: TokenStats, batch: Batch) -> PairSums:
    return pair_sums(stats, batch.slot, batch.weight.shape[1], BRANCHES, batch.token_weight, batch.ref_logps)


def precise(facts: Facts, traced: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, traced with the products that its compute dtype promises."""

    @wraps(traced)
    def inside(*arguments: Any) -> Any:
        with precision(facts.compute_dtype):
            return traced(*arguments)

    return inside
