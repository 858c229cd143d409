"""Everything that a run does on the devices, built from its options once: mesh, models, batch shape, step, evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_dpo.config import DPOConfig
from jax_dpo.data.batch import Batch, with_columns, with_ref_logps
from jax_dpo.data.loader import Feed, StepBatch, evaluation_batches, places, step_batch
from jax_dpo.data.order import Curriculum, Position, pairs_at
from jax_dpo.data.pack import RowShape, Sizes, choose_shape, layout, micro_batches
from jax_dpo.errors import UserError
from jax_dpo.loss.family import LossOptions
from jax_dpo.ops.attention.api import choose
from jax_dpo.plan.lowered import abstract_params, abstract_state
from jax_dpo.policy import Policy
from jax_dpo.sharding.mesh import make_mesh, replicated, row_shards
from jax_dpo.sharding.place import batch_to_devices, row_range
from jax_dpo.train.evaluate import EvalSet, evaluate
from jax_dpo.train.flops import attended_of, cost_of, work_of
from jax_dpo.train.optimizer import OptimizerOptions, make_optimizer
from jax_dpo.train.plan import Plan
from jax_dpo.train.probe import make_probe_states
from jax_dpo.train.state import Frozen, Knobs, Probe, TrainState
from jax_dpo.train.step import make_evaluation, make_step, make_sync
from jax_dpo.train.trust_region import REGION_START, spread_over
from jax_dpo.trainer.datasets import PairSet, Sampled, Some
from jax_dpo.trainer.models import (
    Pairing,
    facts_of,
    frozen_of,
    moving_reference,
    place,
    reference_tree,
    router_coef,
    run_start,
    trained_leaves,
)

SAMPLED_STEPS = 32  # steps whose packing decides the batch shape
LOOKED_AT = 512  # pairs that are computed one by one to find those whose numbers are not finite
COUNTED_PAIRS = 400_000  # up to so many pairs every step is packed ahead, to know the most micro-batches of any


def compute_dtype(config: DPOConfig) -> str:
    """bf16 as told; unset, bfloat16 where the hardware multiplies it faster than float32."""
    if config.bf16 is None:
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return "bfloat16" if config.bf16 else "float32"


def granule(multiple: int | str | None) -> int:
    """What the length of a row is a multiple of, `pad_to_multiple_of` included."""
    # Lanes of a TPU and tiles of a GPU want multiples of 128; a CPU does as well with less padding.
    device = 32 if jax.default_backend() == "cpu" else 128
    return math.lcm(device, multiple) if isinstance(multiple, int) else device


def loss_options(config: DPOConfig) -> LossOptions:
    types = tuple(config.loss_type)
    return LossOptions(
        types=types,
        weights=tuple(config.loss_weights or [1.0] * len(types)),
        label_smoothing=config.label_smoothing,
        smooth_sigmoid=bool(config.sigmoid_label_smoothing),
        f_divergence=config.f_divergence_type,
        f_alpha=config.f_alpha_divergence_coef,
        discopop_tau=config.discopop_tau,
        use_weighting=config.use_weighting,
        kl_reduction=config.kl_reduction,
        columns=tuple(config.pair_columns),
        beta_alpha=config.beta_dpo_alpha,
        beta_momentum=config.beta_dpo_momentum,
    )


def optimizer_options(config: DPOConfig) -> OptimizerOptions:
    c = config
    return OptimizerOptions(
        c.optim, c.adam_beta1, c.adam_beta2, c.adam_epsilon, c.weight_decay, dict(c.optim_args or {})
    )


@dataclass
class Engine:
    """Built once a run; its parts are made when they are first asked for."""

    config: DPOConfig
    pairing: Pairing
    train_set: PairSet | None
    eval_sets: dict[str | None, PairSet]
    plan: Plan | None
    ref_logps: np.ndarray | None = None
    """[pairs, 2] the reference's log-probabilities of the training pairs, where they are made before training"""
    curriculum: Curriculum | None = None
    """what a curriculum orders the training pairs by, once it is known"""

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        c = self.config
        return make_mesh(c.mesh_data, c.mesh_fsdp, c.mesh_tensor)

    @cached_property
    def dtype(self) -> str:
        return compute_dtype(self.config)

    @cached_property
    def facts(self) -> Any:
        attention, _ = choose(jax.default_backend(), self.dtype, self.config.kernels)
        return facts_of(
            self.pairing,
            self.mesh,
            compute_dtype=self.dtype,
            remat=self.config.gradient_checkpointing,
            attention=attention,
            token_stats=self.config.kernels,
            dropout=not self.config.disable_dropout,
            precomputed=self.config.precompute_ref_log_probs,
        )

    @cached_property
    def options(self) -> LossOptions:
        coef = router_coef(self.config.router_aux_loss_coef, self.pairing.policy.config)
        return replace(loss_options(self.config), router_coef=coef)

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        return make_optimizer(optimizer_options(self.config), self.abstract_params)

    @cached_property
    def abstract_params(self) -> Any:
        """Shapes of the trained parameters."""
        return abstract_params(self.facts.policy)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the whole train state."""
        return abstract_state(
            self.abstract_params,
            self.tx,
            self.mesh,
            moving_reference=self.config.sync_ref_model,
            dynamic_beta=self.config.beta_dpo_alpha > 0,
            trust_region=self.config.kl_trust_region,
        )

    def fresh_state(self) -> TrainState:
        """The state before step 1, read from the model's files."""
        params = place(trained_leaves(self.pairing.policy), self.mesh, "float32")
        where = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        # Without the shardings every moment would be made on one device.
        opt_state = jax.jit(self.tx.init, out_shardings=where.opt_state)(params)
        step = jax.device_put(np.int32(0), replicated(self.mesh))
        moving = moving_reference(self.pairing, params, self.mesh) if self.config.sync_ref_model else {}
        threshold = jax.tree.map(lambda sharding: jax.device_put(np.float32(0), sharding), where.beta_threshold)
        region = {name: jax.device_put(np.float32(REGION_START[name]), at) for name, at in where.region.items()}
        return TrainState(step, params, opt_state, moving, threshold, region)

    def with_params(self, state: TrainState, policy: Policy) -> TrainState:
        """The state with the trained parameters of another policy of the same shape."""
        return state._replace(params=place(trained_leaves(policy), self.mesh, "float32"))

    def check(self) -> None:
        """Raises UserError where model, adapter, options and mesh do not go together, before anything is read or written."""
        _ = self.facts, self.options
        if self.train_set is None or (self.config.train_sampling_strategy == "curriculum" and self.curriculum is None):
            return  # the batch shape follows from the order, which is still to be computed
        if self.options.whole_groups and self.config.micro_batch_tokens is not None:
            _ = self.feed  # which finds out whether there is room

    def follow(self, curriculum: Curriculum) -> None:
        """Takes the pairs in the order of a curriculum from now on; raises what `check` raises."""
        self.curriculum = curriculum
        self.__dict__.pop("feed", None)  # an evaluation may have asked for it: its shape follows from the order
        self.check()

    def frozen(self, state: TrainState) -> Any:
        """Reference and base; `state` is the fresh one."""
        elsewhere = self.config.sync_ref_model or self.config.precompute_ref_log_probs
        return frozen_of(self.pairing, state.params, self.mesh, self.dtype, reference=not elsewhere)

    def against(self, state: TrainState, frozen: Any) -> Any:
        """`frozen` with the reference that an evaluation needs: the one that moved with the state, or one that is loaded for it."""
        if self.config.precompute_ref_log_probs:
            return frozen._replace(reference=reference_tree(self.pairing, self.mesh, self.dtype))
        return frozen.against(state)

    @cached_property
    def feed(self) -> Feed:
        """The batch shape, and which rows of it this process fills."""
        sets = [s for s in (self.train_set, *self.eval_sets.values()) if s is not None]
        return self._feed(sets, self.train_set, self.plan)

    def feed_of(self, data: PairSet | Sampled, batch: int | None = None) -> Feed:
        """Batches for a forward pass over one set, of the tokens of `batch` padded pairs a device; None: as in training."""
        return self._feed([data], None, None, batch)

    def _feed(
        self, sets: Sequence[PairSet | Sampled], train: PairSet | None, plan: Plan | None, batch: int | None = None
    ) -> Feed:
        c, shards = self.config, row_shards(self.mesh)
        whole = Sizes(*(np.concatenate([getattr(s.sizes, f) for s in sets]) for f in Sizes._fields))
        longest = max(s.longest for s in sets)
        budget = c.micro_batch_tokens or c.per_device_train_batch_size * 2 * longest
        if batch is not None:
            budget = batch * 2 * longest
        if train is not None and plan is not None:
            at = np.unique(np.linspace(0, plan.total - 1, min(SAMPLED_STEPS, plan.total)).astype(int))
            steps = [np.concatenate(self.groups(plan.after(int(k)))) for k in at]
        else:
            size = (batch or c.per_device_eval_batch_size) * shards
            steps = np.array_split(np.arange(len(whole.tokens)), -(-len(whole.tokens) // size))[:SAMPLED_STEPS]
        shape = choose_shape(
            whole,
            steps,
            row_shards=shards,
            micro_batch_tokens=budget,
            cost=cost_of(self.work, jax.default_backend()),
            granule=granule(c.pad_to_multiple_of),
            least_rows=self._least_rows(shards) if train is not None else 1,
            packing=c.packing,
        )
        if train is not None:
            self._check_room(shape)
        rows = shape.rows * shards
        first, last = row_range(self.mesh, rows)
        most = self._most_micro_batches(shape, shards, train, plan)
        o = self.options
        return Feed(shape, shards, first, last, most, c.ld_alpha, "sft" in o.types, o.whole_groups, o.router_coef > 0)

    def _least_rows(self, shards: int) -> int:
        """Rows that hold any one of TRL's micro-batches, a pair to a row at worst, where the loss mixes its pairs."""
        return -(-self.config.per_device_train_batch_size // shards) if self.options.whole_groups else 1

    @property
    def _mixing(self) -> str:
        pairs = f"the {self.config.per_device_train_batch_size} pairs of per_device_train_batch_size"
        if self.options.mixes_pairs:
            return f"loss_type {', '.join(self.config.loss_type)} sorts {pairs}"
        return f"the router's loss (router_aux_loss_coef {self.options.router_coef:g}; 0 switches it off) is made over {pairs}"

    def _check_room(self, shape: RowShape) -> None:
        """Raises UserError where `micro_batch_tokens` leaves no room for one of TRL's micro-batches that a loss needs whole."""
        c, tokens = self.config, shape.rows * shape.row_tokens
        if self.options.whole_groups and c.micro_batch_tokens is not None and tokens > c.micro_batch_tokens:
            raise UserError(
                "micro-batch-tokens-small",
                f"micro_batch_tokens {c.micro_batch_tokens}: {self._mixing} together, which takes up to {tokens} tokens at a time. "
                f"Set it to {tokens}, or lower per_device_train_batch_size.",
            )

    def _most_micro_batches(self, shape: RowShape, shards: int, train: PairSet | None, plan: Plan | None) -> int:
        if train is None or plan is None:
            return 1
        if plan.total * plan.pairs_per_step > COUNTED_PAIRS:
            if self.options.whole_groups:
                return plan.accumulation
            return micro_batches(min(plan.pairs_per_step, len(train)), shape, shards)
        most = 1
        for k in range(plan.total):
            groups = self.groups(plan.after(k))
            pairs = np.concatenate(groups)
            sizes = Sizes(train.sizes.tokens[pairs], train.sizes.scored[pairs])
            most = max(most, len(layout(sizes, shape, shards, places(groups) if self.options.whole_groups else None)))
        return most

    @cached_property
    def work(self) -> Any:
        facts = self.facts
        reference = None if facts.precomputed else facts.reference
        return work_of(facts.policy, adapter=facts.policy.lora is not None, reference=reference)

    def groups(self, position: Position) -> list[np.ndarray]:
        """TRL's micro-batches of the step at a position."""
        assert self.train_set is not None and self.plan is not None
        c = self.config
        return pairs_at(
            position,
            len(self.train_set),
            seed=c.seed if c.data_seed is None else c.data_seed,
            strategy=c.train_sampling_strategy,
            micro_batch=self.plan.micro_batch,
            micro_batches_per_step=self.plan.accumulation,
            used=self.plan.pairs,
            curriculum=self.curriculum,
        )

    def batch_at(self, position: Position) -> StepBatch:
        s = self.train_set
        assert s is not None
        made = step_batch(s, s.sizes, s.trl_tokens, s.chosen_scored, self.groups(position), self.feed)
        batch = with_columns(made.batch, self.train_columns)
        return made._replace(batch=batch if self.ref_logps is None else with_ref_logps(batch, self.ref_logps))

    @cached_property
    def train_columns(self) -> dict[str, np.ndarray]:
        """What the training data say of each pair, by the field of `Batch`."""
        assert self.train_set is not None
        return self.train_set.columns(self.config.beta)

    def to_devices(self, batch: StepBatch) -> Batch:
        return batch_to_devices(batch.batch, self.mesh, self.feed.rows, leading=1)

    def flops(self, batch: StepBatch) -> float:
        """What the step owes on all devices."""
        s = self.train_set
        assert s is not None
        i = batch.pairs
        seen = attended_of(s.pairs.branch_lengths()[i], s.pairs.shared[i] & s.share_prompt)
        w = self.work
        return float(w.token * s.sizes.tokens[i].sum() + w.attention * seen.sum() + w.scored * s.sizes.scored[i].sum())

    def faulty_pairs(self, data: PairSet, positions: np.ndarray, state: TrainState, frozen: Frozen) -> np.ndarray:
        """Those of the pairs whose numbers are not finite under the policy as it stands. Each is computed in a row of its own: what is not
        finite spreads over the row that it lies in. Where they are very many, all of them: then it is no few that spread."""
        if len(positions) > LOOKED_AT:
            return positions
        c = self.config
        found: list[np.ndarray] = []
        knobs = Knobs(*(jnp.float32(x) for x in (0.0, c.beta, c.kl_coef)))
        some = self.held_out(None, Some(data, positions), alone=True)
        evaluate(self.evaluator, some, state.params, frozen, knobs, self.options, found.append)
        return positions[np.concatenate(found)] if found else positions[:0]

    def held_out(self, name: str | None, data: PairSet | Some | Sampled, *, alone: bool = False) -> EvalSet:
        """An evaluation set in batches of the training shape, or of a shape of its own where its pairs do not fit. `alone`: a row holds
        one pair."""
        feed = self._held_out_feed(data)
        if alone:
            feed = replace(feed, shape=replace(feed.shape, row_pairs=1))

        c, columns = self.config, data.columns(self.config.beta)

        def batches() -> Iterator[Batch]:
            for batch in evaluation_batches(data, data.sizes, feed):
                yield batch_to_devices(with_columns(batch, columns), self.mesh, feed.rows, leading=0)

        by_batches = c.eval_weighting == "batches"
        return EvalSet(name, len(data), batches, c.per_device_eval_batch_size, by_batches, columns)

    def _held_out_feed(self, data: PairSet | Some | Sampled) -> Feed:
        shape = self.feed.shape
        if data.sizes.tokens.max() > shape.row_tokens or data.sizes.scored.max() > shape.row_scored:
            return self.feed_of(data.whole if isinstance(data, Some) else data)
        return self.feed

    def probe(self, data: PairSet, frozen: Frozen) -> Probe:
        """What the trust region measures each update on: some pairs of a held-out set, and the reference's states for them."""
        some = Some(data, spread_over(data.sizes.scored, self.config.kl_probe_pairs))
        feed = self._held_out_feed(some)
        parts = list(evaluation_batches(some, some.sizes, feed))
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *parts)
        batch = batch_to_devices(stacked, self.mesh, feed.rows, leading=1)
        # A reference that moves has no states that stay.
        hidden = None if self.config.sync_ref_model else make_probe_states(self.facts, self.mesh)(frozen, batch)
        start = run_start(self.pairing, frozen, self.mesh, self.dtype)
        return Probe(batch, hidden, start, jnp.float32(0))

    @cached_property
    def step(self) -> Callable[..., Any]:
        return make_step(
            self.facts,
            self.options,
            self.tx,
            self.mesh,
            self.abstract_state,
            max_grad_norm=self.config.max_grad_norm,
        )

    @cached_property
    def sync(self) -> Callable[[TrainState], TrainState] | None:
        """Moves the reference toward the policy; None where it stays."""
        c = self.config
        return make_sync(self.mesh, self.abstract_state, c.ref_model_mixup_alpha) if c.sync_ref_model else None

    @cached_property
    def evaluator(self) -> Any:
        return make_evaluation(replace(self.facts, precomputed=False), self.options, self.mesh)
