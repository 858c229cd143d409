"""`jax-dpo tune`: short trials on the run's own model, data and compiled step, which propose a learning rate and a beta.

The parts are built once; a trial starts from the start again with other numbers in the step's knobs, so nothing is compiled anew. No state
is kept, nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from jax_dpo.config import DPOConfig
from jax_dpo.data.loader import StepBatch
from jax_dpo.errors import Stopped, UserError, named
from jax_dpo.report.records import Record
from jax_dpo.sharding.mesh import row_shards
from jax_dpo.train.evaluate import EvalSet, evaluate
from jax_dpo.train.metrics import Window
from jax_dpo.train.plan import Plan
from jax_dpo.train.rate_search import Found, Trial, search
from jax_dpo.train.schedule import schedule, warmup_of
from jax_dpo.train.signals import StopRequest
from jax_dpo.train.state import Knobs, TrainState
from jax_dpo.trainer.datasets import Some
from jax_dpo.trainer.dpo import DPOTrainer
from jax_dpo.trainer.parts import schedule_options

# Where the configured rate is 0.
FULL_RATE, ADAPTER_RATE = 1e-6, 1e-5
BETAS = (0.05, 0.3)  # the range known to work, within which betas are compared
LOOKS = (0.25, 0.5, 1.0)  # where in a trial the held-out KL is measured
HOPELESS = 30.0  # a trial whose KL passes its aim by this factor tells nothing more
WORSE = 1.5  # a loss that has grown by this factor since the first step is getting out of hand


# Of target_kl, what is aimed at. Of the runs in docs/tune.md full training with AdamW ended at 1.12 times the expected KL at most,
# adapters at 1.41, other optimizers at 1.58.
SHARE, SHARE_IF_LESS_KNOWN = 0.75, 0.6


@dataclass(frozen=True)
class TuneOptions:
    """`steps` of a trial; `pairs` held out that it is measured on; `rates` and `betas` to try, found where there are none;
    `share` of target_kl that the planned run is to end at, `usual_share` of the run where it is None."""

    steps: int = 30
    pairs: int = 64
    rates: tuple[float, ...] = ()
    betas: tuple[float, ...] = ()
    share: float | None = None


def without_control(config: DPOConfig) -> DPOConfig:
    """The options of the trials: those of the run, without what acts on the KL and without what is saved and evaluated on the way; pairs of
    a curriculum in random order, since its first steps are the easy ones and would stand for no later ones.

    Raises:
      UserError: the reference moves, so that no bound on the KL to it can be aimed at.
    """
    if config.sync_ref_model:
        raise UserError(
            "tune-moving-reference",
            "sync_ref_model moves the reference after the policy, so the KL to it at the end of a run cannot be told from short trials. "
            "Tune with sync_ref_model false: the KL to the reference as it was at the start is then held.",
        )
    in_order = config.train_sampling_strategy
    return replace(
        config,
        train_sampling_strategy="random" if in_order == "curriculum" else in_order,
        kl_actions=[],
        kl_controller="none",
        adaptive_beta=False,
        kl_trust_region=False,
        precompute_ref_log_probs=False,
        eval_strategy="no",
        eval_on_start=False,
        load_best_model_at_end=False,
        metric_for_best_model=None,
    )


def betas_to_compare(config: DPOConfig, given: tuple[float, ...]) -> tuple[float, ...]:
    """Those that are given; else half and twice the configured one, within the range known to work."""
    if given:
        return () if set(given) == {config.beta} else given
    low, high = BETAS
    if set(config.loss_type) == {"sft"} or not low <= config.beta <= high:
        return ()
    near = (min(max(x, low), high) for x in (config.beta / 2, config.beta * 2))
    return tuple(dict.fromkeys(round(x, 6) for x in near if x != config.beta))


def planned_factors(config: DPOConfig, total: int) -> list[float]:
    """The schedule's factor of every step of the planned run."""
    warmup = warmup_of(config.warmup_steps, total)
    factor = schedule(config.lr_scheduler_type, total=total, warmup=warmup, options=schedule_options(config))
    return [factor(k) for k in range(total)]


def trial_factors(planned: list[float], steps: int) -> list[float]:
    """A trial's: the plan's warm-up in the same share of the steps, then the full rate; a plan that is no longer is made as it is."""
    if steps >= len(planned):
        return planned
    peak = int(np.argmax(planned))
    at = [k * len(planned) // steps for k in range(steps)]
    return [planned[k] if k < peak else planned[peak] for k in at]


@dataclass
class Tuner:
    """Makes the trials of one search. `planned` is the run that the proposal is for."""

    run: DPOTrainer
    probe: Some
    planned: Plan
    options: TuneOptions
    stop: StopRequest
    tell: Callable[[Trial], None] = lambda trial: None
    done: list[Trial] = field(default_factory=list)

    @property
    def adapter(self) -> bool:
        return self.run.pairing.policy.config.lora is not None

    @property
    def aim(self) -> float:
        """KL that the planned run is to end at, nats per token."""
        known = self.run.args.optim.startswith("adamw") and not self.adapter
        share = self.options.share or (SHARE if known else SHARE_IF_LESS_KNOWN)
        return share * self.run.args.target_kl

    @cached_property
    def plan_factors(self) -> list[float]:
        return planned_factors(self.run.args, self.planned.total)

    @cached_property
    def factors(self) -> list[float]:
        return trial_factors(self.plan_factors, self.options.steps)

    @cached_property
    def batches(self) -> list[StepBatch]:
        """The steps that every trial takes: the first of the run."""
        plan, engine = self.run.plan, self.run.engine
        assert plan is not None
        return [engine.batch_at(plan.after(k)) for k in range(len(self.factors))]

    @cached_property
    def held_out(self) -> EvalSet:
        return self.run.engine.held_out(None, self.probe)

    def search(self) -> Found:
        """Measures the start, then searches.

        Raises:
          UserError: the KL is at its bound before anything has moved; no trial is a guide.
          Stopped: a signal.
        """
        config = self.run.args
        state = self.run.engine.fresh_state()
        self.frozen = self.run.engine.frozen(state)
        self.run.display.busy("measuring the start")
        self.start = self._measured(state)
        del state
        aim = self.aim
        if not self.start["kl_divergence"] < aim:
            raise UserError(
                "tune-starts-over",
                f"The KL to the reference is {self.start['kl_divergence']:.4g} nats per token before anything is trained, and target_kl "
                f"{config.target_kl:g} (of which {aim / config.target_kl:.2g} is aimed at) leaves no room. Raise target_kl, or leave "
                "ref_model_name_or_path out, so that the policy's own start is the reference.",
            )
        return search(
            self.trial,
            start=config.learning_rate or (ADAPTER_RATE if self.adapter else FULL_RATE),
            beta=config.beta,
            limit=aim - self.start["kl_divergence"],
            factors=self.factors,
            planned=self.plan_factors,
            held_out=len(self.probe),
            rates=self.options.rates,
            betas=betas_to_compare(config, self.options.betas),
        )

    def trial(self, rate: float, beta: float) -> Trial:
        """Trains from the start for the steps of a trial, and forgets the state."""
        engine, began, n = self.run.engine, time.perf_counter(), len(self.factors)
        limit = HOPELESS * self.run.args.target_kl
        looks = sorted({max(1, round(share * n)) for share in LOOKS})
        key = jax.random.key(self.run.args.seed)
        state = engine.fresh_state()
        losses: list[float] = []
        norms: list[float] = []
        growth: list[tuple[int, float]] = []
        trouble, step = None, 0
        found = dict.fromkeys(self.start, math.nan)  # until there is a look
        for k, (factor, batch) in enumerate(zip(self.factors, self.batches)):
            if self.stop.asked():
                raise Stopped(f"stopped by {self.stop.name}: the trials are given up; nothing was written or kept")
            self.run.display.busy(
                f"trial {len(self.done) + 1}: learning rate {rate:g}, beta {beta:g}, step {k + 1} of {n}"
            )
            knobs = Knobs(*(jnp.float32(x) for x in (rate * factor, beta, self.run.args.kl_coef)))
            count, now = jnp.int32(batch.micro_batches), jax.random.fold_in(key, k)
            state, results = engine.step(state, self.frozen, engine.to_devices(batch), count, knobs, now)
            window = Window()
            window.add(jax.device_get(results["sums"]), batch.groups)
            step, metrics = k + 1, window.metrics()
            losses.append(metrics["loss"])
            norms.append(float(results["grad_norm"]))
            trouble = _trouble(bool(results["finite"]), metrics["kl_divergence"], limit, step)
            if trouble is None and step in looks:
                found = self._measured(state)
                growth.append((step, found["kl_divergence"] - self.start["kl_divergence"]))
            if trouble is not None:
                break
        late = float(np.mean(losses[-max(1, n // 4) :]))
        if trouble is None and not late <= WORSE * abs(losses[0]):
            trouble = f"the loss went from {losses[0]:.3g} to {late:.3g}"
        made = Trial(
            rate=rate,
            beta=beta,
            steps=step,
            kl=found["kl_divergence"] if trouble is None else metrics["kl_divergence"],
            accuracy=found["rewards/accuracies"],
            margin=found["rewards/margins"] / self.run.args.beta,
            loss=found["loss"],
            grad_norm=float(np.mean(norms)),
            growth=tuple(growth),
            seconds=time.perf_counter() - began,
            trouble=trouble,
        )
        self.done.append(made)
        self.tell(made)
        return made

    def _measured(self, state: TrainState) -> dict[str, float]:
        """The probe's metrics without prefix, at the configured beta."""
        engine, config = self.run.engine, self.run.args
        knobs = Knobs(*(jnp.float32(x) for x in (0.0, config.beta, config.kl_coef)))
        held = engine.against(state, self.frozen)
        found = evaluate(engine.evaluator, self.held_out, state.params, held, knobs, engine.options)
        return {name.removeprefix(self.held_out.prefix): value for name, value in found.items()}


def _trouble(finite: bool, kl: float, limit: float, step: int) -> str | None:
    if not finite:
        return f"step {step} is not finite"
    if not kl <= limit:
        return f"KL {kl:.3g} at step {step}"
    return None


def trial_record(t: Trial) -> Record:
    return {
        "learning_rate": t.rate,
        "beta": t.beta,
        "steps": t.steps,
        "kl": t.kl,
        "accuracy": t.accuracy,
        "logratio_margin": t.margin,
        "loss": t.loss,
        "grad_norm": t.grad_norm,
        "seconds": t.seconds,
        "trouble": t.trouble,
    }


def report_of(tuner: Tuner, found: Found, *, seconds: float, notes: list[str]) -> Record:
    """Everything that was measured and what is proposed, as `tune.json` holds it."""
    run, config, law = tuner.run, tuner.run.args, found.law
    start, adapter = tuner.start["kl_divergence"], tuner.adapter
    ends = {
        name: {"learning_rate": rate, "kl": start + law.kl(rate, tuner.plan_factors)}
        for name, rate in (("configured", config.learning_rate), ("doubled", 2 * found.rate))
        if rate > 0
    }
    proposed = replace(config, learning_rate=found.rate, beta=found.beta)
    shards = row_shards(run.engine.mesh)
    outside = [
        w for w in proposed.warnings(adapter=adapter, data_parallel=shards) if w.startswith(("learning_rate", "beta "))
    ]
    if found.capped:
        outside.append(
            named(
                "tune-rate-capped", "trials above this rate had trouble, so it is lower than the KL alone would allow"
            )
        )
    return {
        "version": version("jax-dpo"),
        "model": run.pairing.policy.title,
        "reference": run.pairing.sentence,
        "trained": "an adapter" if adapter else "all parameters",
        "held_out_pairs": len(tuner.probe),
        "pairs_per_step": tuner.planned.pairs_per_step,
        "target_kl": config.target_kl,
        "aim": tuner.aim,
        "kl_at_start": start,
        "planned_steps": tuner.planned.total,
        "trial_steps": len(tuner.factors),
        "trials": [
            {**trial_record(t), "kl_growth": [{"step": step, "kl": start + kl} for step, kl in t.growth]}
            for t in found.trials + found.compared[1:]
        ],
        "law": {
            "steps_last": found.likely.lasts,
            "slope": law.slope(found.rate, tuner.plan_factors),
            "noise": law.noise,
            "points": law.points,
        },
        "proposal": {
            "learning_rate": found.rate,
            "beta": found.beta,
            "kl": start + found.kl,
            "likely_rate": found.likely_rate,
            "why_beta": found.why_beta,
        },
        "ends": ends,
        "notes": [*notes, *outside],
        "seconds": seconds,
    }
