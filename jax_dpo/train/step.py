"""The step: policy and reference forward, loss, gradient and update in one compiled program, for one shape of batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jax_dpo.arrays import Tree
from jax_dpo.data.batch import Batch
from jax_dpo.loss.dynamic_beta import batch_beta, next_threshold
from jax_dpo.loss.family import LossOptions, mixed_loss, pair_loss
from jax_dpo.loss.router import RouterSums, balance, of_group
from jax_dpo.loss.scores import CHOSEN, REJECTED, Given, PairSums
from jax_dpo.models.decoder import cast_for_compute, unembedding
from jax_dpo.sharding.mesh import replicated
from jax_dpo.sharding.rules import like_params, shardings
from jax_dpo.train.forward import (
    precise,
    reference_params,
    scored_states,
    statistics,
    stats_of,
    sums_of_pairs,
    watched_statistics,
)
from jax_dpo.train.kl import Responses, no_responses, responses_of
from jax_dpo.train.metrics import Sums, step_sums
from jax_dpo.train.optimizer import clip
from jax_dpo.train.probe import Bounded, bounded_update
from jax_dpo.train.state import Facts, Frozen, Knobs, TrainState
from jax_dpo.train.trust_region import UNKNOWN, Accepted


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
) -> tuple[jax.Array, tuple[Sums, Responses | None]]:
    """A micro-batch's part of the step's loss, its sums and the KL of its responses: the loss of a step is the plain sum of its parts.

    `knobs.beta` is that of the whole step: where beta follows the batch, the batch is the step.
    """
    stats, routers = watched_statistics(facts, params, frozen, batch, mesh, key)
    sums = sums_of_pairs(stats, batch)
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
    return loss, (step_sums(loss, sums, batch.weight, given.beta_of(knobs.beta), aux), responses_of(sums))


def _accumulated(
    grad_fn: Callable[..., tuple[tuple[jax.Array, tuple[Sums, Responses | None]], Tree]],
    params: Tree,
    batch: Batch,
    count: jax.Array,
    place: Tree,
    responses: Responses | None,
) -> tuple[Tree, Sums, Responses | None]:
    """Gradients, sums and responses [A, R, S, ...] over the first `count` micro-batches of `batch` [A, ...].

    `responses` is what the latter begin with: none in any micro-batch.
    """
    most = batch.tokens.shape[0]
    pin = partial(jax.tree.map, jax.lax.with_sharding_constraint)
    if most == 1:
        (_, (sums, found)), grads = grad_fn(params, jax.tree.map(lambda x: x[0], batch), 0)
        return pin(grads, place), sums, jax.tree.map(lambda x: x[None], found)

    def body(carry: tuple[jax.Array, Tree, Sums, Responses | None]) -> tuple[jax.Array, Tree, Sums, Responses | None]:
        i, grads, sums, found = carry
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
        (_, (more_sums, here)), more = grad_fn(params, part, i)
        add = lambda x, y: jax.tree.map(jnp.add, x, y)  # noqa: E731
        found = jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), found, here)
        return i + 1, pin(add(grads, more), place), add(sums, more_sums), found

    zeros = pin(jax.tree.map(jnp.zeros_like, params), place)
    nothing = Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))
    start = (jnp.zeros((), jnp.int32), zeros, nothing, responses)
    return jax.lax.while_loop(lambda carry: carry[0] < count, body, start)[1:]


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Parameters by the rules, optimizer moments as their parameters, the rest replicated. `state` may be abstract."""
    opt_state = like_params(state.opt_state, state.params, mesh)
    threshold, region = (jax.tree.map(lambda _: replicated(mesh), x) for x in (state.beta_threshold, state.region))
    return TrainState(
        replicated(mesh),
        shardings(state.params, mesh),
        opt_state,
        shardings(state.reference, mesh),
        threshold,
        region,
    )


def _updated(
    tx: optax.GradientTransformation,
    state: TrainState,
    grads: Tree,
    rate: jax.Array,
    finite: jax.Array,
    changed: dict[str, Any],
    bounded: Bounded | None,
) -> tuple[TrainState, Accepted | None]:
    """The state after an optimizer step with what else it has `changed`; only counted, where the step is not finite.

    `bounded` is the trust region, where there is one.
    """

    def new() -> tuple[Tree, Any, dict[str, Any], Accepted | None]:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        change = jax.tree.map(lambda u: rate * u, updates)
        if bounded is None:
            return jax.tree.map(jnp.subtract, state.params, change), opt_state, changed, None
        params, taken, region = bounded(state.params, change)
        return params, opt_state, {**changed, "region": region}, taken

    def old() -> tuple[Tree, Any, dict[str, Any], Accepted | None]:
        same = {name: getattr(state, name) for name in changed}
        if bounded is None:
            return state.params, state.opt_state, same, None
        nothing = Accepted(jnp.float32(0), state.region["kl"], jnp.int32(0), jnp.bool_(False))
        return state.params, state.opt_state, {**same, "region": state.region}, nothing

    params, opt_state, changed, taken = jax.lax.cond(finite, new, old)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state, **changed), taken


def _following(
    facts: Facts,
    options: LossOptions,
    mesh: Mesh,
    state: TrainState,
    held: Frozen,
    batch: Batch,
    count: jax.Array,
    knobs: Knobs,
    key: jax.Array,
) -> tuple[Knobs, dict[str, Any]]:
    """beta-DPO: the step's own beta, and what it leaves in the state. Every pair has a say, so this is a forward pass before the step."""

    def part(i: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
        mine = jax.random.fold_in(key, i) if facts.dropout else None
        return _margin(sums_of_pairs(statistics(facts, state.params, held, one, mesh, mine), one), one)

    zero = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))
    _, margin = jax.lax.while_loop(lambda c: c[0] < count, lambda c: (c[0] + 1, c[1] + part(c[0])), zero)
    threshold = state.beta_threshold["threshold"]
    after = next_threshold(threshold, knobs.beta, margin, options.beta_momentum)
    beta = batch_beta(knobs.beta, margin, threshold, options.beta_alpha)
    return knobs._replace(beta=beta), {"beta_threshold": {"threshold": after}}


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

    `batch` has arrays [A, R, ...] of which the first `count` micro-batches hold something. Results: `sums` (`metrics.Sums`), `responses`
    (`kl.Responses` of arrays [A, R, ...]; None without the reference), `grad_norm` (before clipping), `finite` and, with a probe set in
    `frozen`, `accepted` (`trust_region.Accepted`) and the `rate_share` of the learning rate that was in force. A step that is not
    finite leaves parameters and moments as they were, to the bit. That takes no second copy: the choice is made element by element in
    the update, after the gradients are all there. Nor does the trust region: while it tries, the update lies where the gradients did.
    """
    place = state_shardings(abstract, mesh)

    def step(
        state: TrainState, frozen: Frozen, batch: Batch, count: jax.Array, knobs: Knobs, key: jax.Array
    ) -> tuple[TrainState, dict[str, Any]]:
        held = frozen.against(state)
        changed: dict[str, Any] = {}
        if options.beta_alpha > 0:
            knobs, changed = _following(facts, options, mesh, state, held, batch, count, knobs, key)

        def loss_fn(params: Tree, part: Batch, i: jax.Array | int) -> tuple[jax.Array, tuple[Sums, Responses | None]]:
            mine = jax.random.fold_in(key, i) if facts.dropout else None
            return micro_batch_loss(facts, options, params, held, part, knobs, mesh, mine)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        none_yet = None if facts.precomputed else no_responses(batch)
        grads, sums, responses = _accumulated(grad_fn, state.params, batch, count, place.params, none_yet)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
        clipped, bounded = clip(grads, norm, max_grad_norm), bounded_update(facts, state, held, mesh)
        after, taken = _updated(tx, state, clipped, knobs.learning_rate, finite, changed, bounded)
        return after, {
            "sums": sums,
            "responses": responses,
            "grad_norm": norm,
            "finite": finite,
            "accepted": taken,
            "rate_share": state.region.get("rate"),
        }

    return jax.jit(precise(facts, step), donate_argnums=0, out_shardings=(place, replicated(mesh)))


def make_sync(mesh: Mesh, abstract: TrainState, mixup: float) -> Callable[[TrainState], TrainState]:
    """The jitted `reference <- mixup * policy + (1 - mixup) * reference` (the soft update of TR-DPO,
    arXiv 2404.09656); `state` is donated."""

    def sync(state: TrainState) -> TrainState:
        moved = jax.tree.map(lambda r, p: (1.0 - mixup) * r + mixup * p, state.reference, state.params)
        region = {**state.region, "kl": jnp.float32(UNKNOWN)} if state.region else {}
        return state._replace(reference=moved, region=region)

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
        sums = sums_of_pairs(stats, batch)
        return pair_loss(sums, batch.length, knobs.beta, knobs.kl_coef, options, _given(batch)), sums, routers

    return jax.jit(precise(facts, evaluate), out_shardings=replicated(mesh))


def make_reference_pass(facts: Facts, mesh: Mesh) -> Callable[[Frozen, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted forward pass of the reference alone on one batch [R, ...]: which pairs [R, S] and their sums [R, S, 2], on every process.

    The sums are `PairSums.ref_logp` of the step: log ref(y) over the scored tokens, nats, with LD-DPO's weights where they are set.
    """

    def run(frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        reference = reference_params(facts, frozen, cast_for_compute(frozen.base, jnp.dtype(facts.compute_dtype)))
        hidden, _ = scored_states(facts, facts.reference, reference, batch, mesh)
        stats = stats_of(facts, mesh, batch, hidden, unembedding(facts.reference, reference))
        return batch.index, sums_of_pairs(stats, batch).logp

    return jax.jit(precise(facts, run), out_shardings=replicated(mesh))
