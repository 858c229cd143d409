"""The step: policy and reference forward, loss, gradient and update in one compiled program, for one shape of batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jax_dpo.arrays import Tree, overlay
from jax_dpo.data.batch import BRANCHES, Batch
from jax_dpo.loss.dynamic_beta import batch_beta, next_threshold
from jax_dpo.loss.family import LossOptions, mixed_loss, pair_loss
from jax_dpo.loss.router import RouterSums, balance, of_group, router_sums, router_watch
from jax_dpo.loss.scores import CHOSEN, REJECTED, Given, PairSums, pair_sums
from jax_dpo.models.config import ModelConfig
from jax_dpo.models.decoder import cast_for_compute, forward, precision, unembedding
from jax_dpo.models.experts import everywhere
from jax_dpo.ops.token_stats.api import TokenStats, token_stats
from jax_dpo.sharding.experts import spread_experts
from jax_dpo.sharding.mesh import replicated
from jax_dpo.sharding.rules import activations, like_params, shardings
from jax_dpo.sharding.tables import lookup, parts_of
from jax_dpo.train.metrics import Sums, step_sums
from jax_dpo.train.optimizer import clip
from jax_dpo.train.state import Facts, Frozen, Knobs, TrainState
from jax_dpo.train.trust_region import UNKNOWN, Accepted, along_update, toward_start


def _scored(
    facts: Facts, config: ModelConfig, params: Tree, batch: Batch, mesh: Mesh, **options: Any
) -> tuple[jax.Array, list[Any]]:
    """Hidden states [R, K, D] where the scored tokens are predicted, and what was watched of the routers."""
    constrain = partial(jax.lax.with_sharding_constraint, shardings=activations(mesh))
    hidden, watched = forward(
        config,
        params,
        batch.tokens,
        batch.positions,
        batch.pair,
        batch.branch,
        constrain=constrain,
        lookup=lookup(mesh),
        experts=spread_experts(mesh, everywhere),
        implementation=facts.attention,
        **options,
    )
    return constrain(jnp.take_along_axis(hidden, batch.source[..., None], axis=1)), watched


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
    hidden, watched = _scored(facts, facts.policy, policy, batch, mesh, **options)
    routers = router_sums(watched, batch.owner, batch.copies, slots) if watched else None
    ref_hidden = ref_unembed = None
    if not facts.precomputed:
        reference = _reference(facts, frozen, base)
        ref_hidden = jax.lax.stop_gradient(_scored(facts, facts.reference, reference, batch, mesh)[0])
        ref_unembed = None if facts.shared_head else unembedding(facts.reference, reference)
    head = unembedding(facts.policy, policy)
    return _token_stats(facts, mesh, batch, hidden, head, ref_hidden, ref_unembed), routers


def _reference(facts: Facts, frozen: Frozen, base: Tree) -> Tree:
    """The reference's parameters in the compute dtype; `base` is there already."""
    own = jax.tree.map(jax.lax.stop_gradient, cast_for_compute(frozen.reference, jnp.dtype(facts.compute_dtype)))
    return overlay(base, own) if facts.reference_on_base else own


def _token_stats(
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


def _pairs(stats: TokenStats, batch: Batch) -> PairSums:
    return pair_sums(stats, batch.slot, batch.weight.shape[1], BRANCHES, batch.token_weight, batch.ref_logps)


def _given(batch: Batch) -> Given:
    return Given(batch.beta, batch.margin, batch.label, batch.pair_weight)


def _margin(sums: PairSums, batch: Batch) -> jax.Array:
    """The micro-batch's part of the step's mean of a - b."""
    ratio = sums.logratio
    return jnp.sum(batch.weight * (ratio[..., CHOSEN] - ratio[..., REJECTED]))


def micro_batch_loss(
    facts: Facts,
    options: LossOptions,
    params: Tree,
    frozen: Frozen,
    batch: Batch,
    knobs: Knobs,
    mesh: Mesh,
    key: jax.Array | None,
) -> tuple[jax.Array, Sums]:
    """A micro-batch's part of the step's loss, and its sums: the loss of a step is the plain sum of its parts.

    `knobs.beta` is that of the whole step: where beta follows the batch, the batch is the step.
    """
    stats, routers = watched_statistics(facts, params, frozen, batch, mesh, key)
    sums = _pairs(stats, batch)
    given = _given(batch)
    each = pair_loss(sums, batch.length, knobs.beta, knobs.kl_coef, options, given)
    loss = jnp.sum(jnp.where(batch.weight > 0, batch.weight * each, 0.0))
    if batch.sft_weight is not None:
        loss = loss - options.weight_of("sft") * jnp.sum(batch.sft_weight * stats.logp)
    if options.mixes_pairs:
        loss = loss + mixed_loss(sums, batch.group, batch.weight, knobs.beta, options)
    aux = None
    if routers is not None:
        aux = jnp.sum(batch.weight * balance(of_group(routers, batch.group)))
        loss = loss + options.router_coef * aux
    return loss, step_sums(loss, sums, batch.weight, given.beta_of(knobs.beta), aux)


def _accumulated(
    grad_fn: Callable[..., tuple[tuple[jax.Array, Sums], Tree]],
    params: Tree,
    batch: Batch,
    count: jax.Array,
    place: Tree,
) -> tuple[Tree, Sums]:
    """Gradients and sums over the first `count` micro-batches of `batch` [A, ...]."""
    most = batch.tokens.shape[0]
    pin = partial(jax.tree.map, jax.lax.with_sharding_constraint)
    if most == 1:
        (_, sums), grads = grad_fn(params, jax.tree.map(lambda x: x[0], batch), 0)
        return pin(grads, place), sums

    def body(carry: tuple[jax.Array, Tree, Sums]) -> tuple[jax.Array, Tree, Sums]:
        i, grads, sums = carry
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
        (_, more_sums), more = grad_fn(params, part, i)
        add = lambda x, y: jax.tree.map(jnp.add, x, y)  # noqa: E731
        return i + 1, pin(add(grads, more), place), add(sums, more_sums)

    zeros = pin(jax.tree.map(jnp.zeros_like, params), place)
    nothing = Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))
    start = (jnp.zeros((), jnp.int32), zeros, nothing)
    _, grads, sums = jax.lax.while_loop(lambda carry: carry[0] < count, body, start)
    return grads, sums


def _precise(facts: Facts, traced: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, traced with the products that its compute dtype promises."""

    @wraps(traced)
    def inside(*arguments: Any) -> Any:
        with precision(facts.compute_dtype):
            return traced(*arguments)

    return inside


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Parameters by the rules, optimizer moments as their parameters, the rest replicated. `state` may be abstract."""
    opt_state = like_params(state.opt_state, state.params, mesh)
    threshold, probe_kl = (jax.tree.map(lambda _: replicated(mesh), x) for x in (state.beta_threshold, state.probe_kl))
    return TrainState(
        replicated(mesh),
        shardings(state.params, mesh),
        opt_state,
        shardings(state.reference, mesh),
        threshold,
        probe_kl,
    )


def _updated(
    tx: optax.GradientTransformation,
    state: TrainState,
    grads: Tree,
    rate: jax.Array,
    finite: jax.Array,
    changed: dict[str, Any],
    region: Callable[[Tree, Tree], tuple[Tree, Accepted]] | None,
) -> tuple[TrainState, Accepted | None]:
    """The state after an optimizer step with what else it has `changed`; only counted, where the step is not finite.

    `region` says how far it goes: (old parameters, what the update is subtracted from them) -> the new ones.
    """

    def new() -> tuple[Tree, Any, dict[str, Any], Accepted | None]:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        change = jax.tree.map(lambda u: rate * u, updates)
        if region is None:
            return jax.tree.map(jnp.subtract, state.params, change), opt_state, changed, None
        params, taken = region(state.params, change)
        return params, opt_state, {**changed, "probe_kl": {"kl": taken.kl}}, taken

    def old() -> tuple[Tree, Any, dict[str, Any], Accepted | None]:
        same = {name: getattr(state, name) for name in changed}
        if region is None:
            return state.params, state.opt_state, same, None
        nothing = Accepted(jnp.float32(0), state.probe_kl["kl"], jnp.int32(0), jnp.bool_(False))
        return state.params, state.opt_state, {**same, "probe_kl": state.probe_kl}, nothing

    params, opt_state, changed, taken = jax.lax.cond(finite, new, old)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state, **changed), taken


def _region(
    facts: Facts, state: TrainState, held: Frozen, mesh: Mesh
) -> Callable[[Tree, Tree], tuple[Tree, Accepted]] | None:
    """The trust region of a step, see `trust_region`; None where there is none."""
    probe = held.probe
    if probe is None:
        return None
    kl_of, now, limit = _probe_kl(facts, held, mesh), state.probe_kl["kl"], probe.limit
    start = state.reference or probe.start

    def inside(params: Tree, change: Tree) -> tuple[Tree, Accepted]:
        def along(scale: jax.Array) -> Tree:
            return jax.tree.map(lambda p, c: p - scale * c, params, change)

        def toward(scale: jax.Array) -> Tree:
            # So written that a scale of 1 changes no bit.
            return jax.tree.map(lambda p, c, s: (p - c) + (1 - scale) * (s - (p - c)), params, change, start)

        go, at = (along_update, along) if start is None else (toward_start, toward)
        taken = go(lambda scale: kl_of(at(scale)), now, limit)
        chosen = at(taken.scale)
        return jax.tree.map(lambda p, new: jnp.where(taken.taken, new, p), params, chosen), taken

    return inside


def _probe_kl(facts: Facts, held: Frozen, mesh: Mesh) -> Callable[[Tree], jax.Array]:
    """The exact KL of the probe set under given trained parameters: all token KLs over all scored tokens, nats; no dropout."""
    probe = held.probe
    assert probe is not None
    dtype = jnp.dtype(facts.compute_dtype)
    base = cast_for_compute(held.base, dtype)
    reference = _reference(facts, held, base)
    ref_unembed = None if facts.shared_head else unembedding(facts.reference, reference)

    def sums_of(params: Tree, batch: Batch, ref_hidden: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        policy = overlay(base, cast_for_compute(params, dtype))
        hidden, _ = _scored(facts, facts.policy, policy, batch, mesh)
        if ref_hidden is None:
            ref_hidden, _ = _scored(facts, facts.reference, reference, batch, mesh)
        stats = _token_stats(facts, mesh, batch, hidden, unembedding(facts.policy, policy), ref_hidden, ref_unembed)
        sums = _pairs(stats, batch)
        return jnp.sum(sums.kl), jnp.sum(sums.tokens)

    def kl_of(params: Tree) -> jax.Array:
        # One micro-batch after the other: they are as large as those of the step.
        kl, tokens = jax.lax.map(lambda x: sums_of(params, *x), (probe.batch, probe.hidden))
        return jnp.maximum(jnp.sum(kl) / jnp.sum(tokens), 0.0)

    return kl_of


def make_probe_states(facts: Facts, mesh: Mesh) -> Callable[[Frozen, Batch], jax.Array]:
    """The jitted pass that makes `Probe.hidden` [A, R, K, D] of micro-batches [A, R, ...]."""

    def run(frozen: Frozen, batch: Batch) -> jax.Array:
        reference = _reference(facts, frozen, cast_for_compute(frozen.base, jnp.dtype(facts.compute_dtype)))
        return jax.lax.map(lambda one: _scored(facts, facts.reference, reference, one, mesh)[0], batch)

    return jax.jit(_precise(facts, run))


def make_step(
    facts: Facts,
    options: LossOptions,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    abstract: TrainState,
    *,
    max_grad_norm: float,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The jitted train step `(state, frozen, batch, count, knobs, key) -> (state, results)`; `state` is donated.

    `batch` has arrays [A, R, ...] of which the first `count` micro-batches hold something. Results: `sums` (`metrics.Sums`),
    `grad_norm` (before clipping), `finite` and, with a probe set in `frozen`, `accepted` (`trust_region.Accepted`). A step that is not
    finite leaves parameters and moments as they were, to the bit. That takes no second copy: the choice is made element by element in
    the update, after the gradients are all there. Nor does the trust region: while it tries, the update lies where the gradients did.
    """
    place = state_shardings(abstract, mesh)

    def follow_batch(
        state: TrainState, held: Frozen, batch: Batch, count: jax.Array, knobs: Knobs, key: jax.Array
    ) -> tuple[Knobs, dict[str, Any]]:
        """The step's own beta, and what it leaves in the state. Every pair of the step has a say, so this is a forward pass before it."""

        def part(i: jax.Array) -> jax.Array:
            one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
            mine = jax.random.fold_in(key, i) if facts.dropout else None
            return _margin(_pairs(statistics(facts, state.params, held, one, mesh, mine), one), one)

        zero = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))
        _, margin = jax.lax.while_loop(lambda c: c[0] < count, lambda c: (c[0] + 1, c[1] + part(c[0])), zero)
        threshold = state.beta_threshold["threshold"]
        after = next_threshold(threshold, knobs.beta, margin, options.beta_momentum)
        beta = batch_beta(knobs.beta, margin, threshold, options.beta_alpha)
        return knobs._replace(beta=beta), {"beta_threshold": {"threshold": after}}

    def step(
        state: TrainState, frozen: Frozen, batch: Batch, count: jax.Array, knobs: Knobs, key: jax.Array
    ) -> tuple[TrainState, dict[str, Any]]:
        held = frozen.against(state)
        changed: dict[str, Any] = {}
        if options.beta_alpha > 0:
            knobs, changed = follow_batch(state, held, batch, count, knobs, key)

        def loss_fn(params: Tree, part: Batch, i: jax.Array | int) -> tuple[jax.Array, Sums]:
            mine = jax.random.fold_in(key, i) if facts.dropout else None
            return micro_batch_loss(facts, options, params, held, part, knobs, mesh, mine)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        grads, sums = _accumulated(grad_fn, state.params, batch, count, place.params)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
        clipped, region = clip(grads, norm, max_grad_norm), _region(facts, state, held, mesh)
        after, taken = _updated(tx, state, clipped, knobs.learning_rate, finite, changed, region)
        return after, {"sums": sums, "grad_norm": norm, "finite": finite, "accepted": taken}

    return jax.jit(_precise(facts, step), donate_argnums=0, out_shardings=(place, replicated(mesh)))


def make_sync(mesh: Mesh, abstract: TrainState, mixup: float) -> Callable[[TrainState], TrainState]:
    """The jitted `reference <- mixup * policy + (1 - mixup) * reference` (the soft update of TR-DPO,
    arXiv 2404.09656); `state` is donated."""

    def sync(state: TrainState) -> TrainState:
        moved = jax.tree.map(lambda r, p: (1.0 - mixup) * r + mixup * p, state.reference, state.params)
        probe_kl = jax.tree.map(lambda kl: jnp.full_like(kl, UNKNOWN), state.probe_kl)
        return state._replace(reference=moved, probe_kl=probe_kl)

    return jax.jit(sync, donate_argnums=0, out_shardings=state_shardings(abstract, mesh))


def make_evaluation(
    facts: Facts, options: LossOptions, mesh: Mesh
) -> Callable[[Tree, Frozen, Batch, Knobs], tuple[jax.Array, PairSums, RouterSums | None]]:
    """The jitted evaluation of one batch [R, ...]: loss of each pair [R, S], its sums [R, S, 2] and those of its tokens' routers, on
    every process.

    Without the terms of `sft` and `aot*` and the router's loss, which are of several pairs: `evaluate` adds them.
    """

    def evaluate(
        params: Tree, frozen: Frozen, batch: Batch, knobs: Knobs
    ) -> tuple[jax.Array, PairSums, RouterSums | None]:
        stats, routers = watched_statistics(facts, params, frozen, batch, mesh, None)
        sums = _pairs(stats, batch)
        return pair_loss(sums, batch.length, knobs.beta, knobs.kl_coef, options, _given(batch)), sums, routers

    return jax.jit(_precise(facts, evaluate), out_shardings=replicated(mesh))


def make_reference_pass(facts: Facts, mesh: Mesh) -> Callable[[Frozen, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted forward pass of the reference alone on one batch [R, ...]: which pairs [R, S] and their sums [R, S, 2], on every process.

    The sums are `PairSums.ref_logp` of the step: log ref(y) over the scored tokens, nats, with LD-DPO's weights where they are set.
    """

    def run(frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        reference = _reference(facts, frozen, cast_for_compute(frozen.base, jnp.dtype(facts.compute_dtype)))
        hidden, _ = _scored(facts, facts.reference, reference, batch, mesh)
        stats = _token_stats(facts, mesh, batch, hidden, unembedding(facts.reference, reference))
        return batch.index, _pairs(stats, batch).logp

    return jax.jit(_precise(facts, run), out_shardings=replicated(mesh))
