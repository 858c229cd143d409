"""The trust region inside the step: the KL of the probe set under parameters as they would be, and the update that it leaves."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_dpo.arrays import Tree, overlay
from jax_dpo.data.batch import Batch
from jax_dpo.models.decoder import cast_for_compute, unembedding
from jax_dpo.train.forward import precise, reference_params, scored_states, stats_of, sums_of_pairs
from jax_dpo.train.state import Facts, Frozen, TrainState
from jax_dpo.train.trust_region import Accepted, along_update, first_share, next_first, next_rate, toward_start

Bounded = Callable[[Tree, Tree], tuple[Tree, Accepted, Tree]]
"""(parameters, what the optimizer would subtract from them) -> new ones, how they were accepted, what the region remembers"""


def bounded_update(facts: Facts, state: TrainState, held: Frozen, mesh: Mesh) -> Bounded | None:
    """The trust region of a step, see `trust_region.py`; None where there is none."""
    probe = held.probe
    if probe is None:
        return None
    kl_of, now, limit = _probe_kl(facts, held, mesh), state.region["kl"], probe.limit
    share, start = state.region["rate"], state.reference or probe.start

    def inside(params: Tree, change: Tree) -> tuple[Tree, Accepted, Tree]:
        change = jax.tree.map(lambda c: share * c, change)

        def along(scale: jax.Array) -> Tree:
            return jax.tree.map(lambda p, c: p - scale * c, params, change)

        def toward(scale: jax.Array) -> Tree:
            # So written that a scale of 1 changes no bit.
            return jax.tree.map(lambda p, c, s: (p - c) + (1 - scale) * (s - (p - c)), params, change, start)

        if start is None:
            at, taken = along, along_update(lambda scale: kl_of(along(scale)), now, limit)
            region = {**state.region, "kl": taken.kl}
        else:
            first = first_share(state.region["first"], now, limit)
            at, taken = toward, toward_start(lambda scale: kl_of(toward(scale)), now, limit, first)
            rate = next_rate(share, taken.scale)
            region = {"kl": taken.kl, "rate": rate, "first": next_first(taken.scale, share, rate)}
        after = jax.tree.map(lambda p, new: jnp.where(taken.taken, new, p), params, at(taken.scale))
        return after, taken, region

    return inside


def _probe_kl(facts: Facts, held: Frozen, mesh: Mesh) -> Callable[[Tree], jax.Array]:
    """The exact KL of the probe set under given trained parameters: all token KLs over all scored tokens, nats; no dropout."""
    probe = held.probe
    assert probe is not None
    dtype = jnp.dtype(facts.compute_dtype)
    base = cast_for_compute(held.base, dtype)
    reference = reference_params(facts, held, base)
    ref_unembed = None if facts.shared_head else unembedding(facts.reference, reference)

    def sums_of(params: Tree, batch: Batch, ref_hidden: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        policy = overlay(base, cast_for_compute(params, dtype))
        hidden, _ = scored_states(facts, facts.policy, policy, batch, mesh)
        if ref_hidden is None:
            ref_hidden, _ = scored_states(facts, facts.reference, reference, batch, mesh)
        stats = stats_of(facts, mesh, batch, hidden, unembedding(facts.policy, policy), ref_hidden, ref_unembed)
        sums = sums_of_pairs(stats, batch)
        return jnp.sum(sums.kl), jnp.sum(sums.tokens)

    def kl_of(params: Tree) -> jax.Array:
        # One micro-batch after the other: they are as large as those of the step.
        kl, tokens = jax.lax.map(lambda x: sums_of(params, *x), (probe.batch, probe.hidden))
        return jnp.maximum(jnp.sum(kl) / jnp.sum(tokens), 0.0)

    return kl_of


def make_probe_states(facts: Facts, mesh: Mesh) -> Callable[[Frozen, Batch], jax.Array]:
    """The jitted pass that makes `Probe.hidden` [A, R, K, D] of micro-batches [A, R, ...]."""

    def run(frozen: Frozen, batch: Batch) -> jax.Array:
        reference = reference_params(facts, frozen, cast_for_compute(frozen.base, jnp.dtype(facts.compute_dtype)))
        return jax.lax.map(lambda one: scored_states(facts, facts.reference, reference, one, mesh)[0], batch)

    return jax.jit(precise(facts, run))
