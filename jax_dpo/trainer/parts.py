"""The parts of the loop, out of what a run is made of; and the record that says at the start what will be done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_dpo.config import DPOConfig
from jax_dpo.errors import UserError
from jax_dpo.report.html import write_report
from jax_dpo.report.records import Record, RunLog, log_history
from jax_dpo.report.summary import nonfinite_text
from jax_dpo.report.terminal import Quiet
from jax_dpo.report.writers import Writers, open_writers
from jax_dpo.sharding.mesh import row_shards
from jax_dpo.train import nonfinite
from jax_dpo.train.checkpoint import Checkpoints
from jax_dpo.train.control import KL_ACTIONS, ControlState, KLControl
from jax_dpo.train.controllers import AdaptiveBeta, Controller, DualKLCoef, PIBeta
from jax_dpo.train.evaluate import EvalSet, evaluate
from jax_dpo.train.flops import matmul_rate, peak_of
from jax_dpo.train.parts import Parts
from jax_dpo.train.plan import Plan, interval, total_steps
from jax_dpo.train.progress import Progress
from jax_dpo.train.ranking import Ranking
from jax_dpo.train.schedule import schedule, warmup_of
from jax_dpo.train.start_check import check_start
from jax_dpo.train.state import Frozen, Knobs, TrainState
from jax_dpo.trainer import outputs
from jax_dpo.trainer.chat import chat_warnings
from jax_dpo.trainer.curriculum import curriculum_record
from jax_dpo.trainer.datasets import PairSet
from jax_dpo.trainer.models import parameter_count
from jax_dpo.trainer.on_policy import on_policy_of
from jax_dpo.trainer.plan_warnings import plan_warnings
from jax_dpo.trainer.run import Run
from jax_dpo.trainer.served import reader_notes, served_warnings

# Share of the measured matmul rate that a step reaches, for the time that is announced before the first step.
EXPECTED_EFFICIENCY = {"cpu": 0.55, "gpu": 0.35, "tpu": 0.35}


def make_plan(config: DPOConfig, pairs: int) -> Plan:
    """When the run does what, from TRL's options.

    Raises:
      UserError: with dataloader_drop_last nothing is left of an epoch.
    """
    from jax_dpo.sharding.mesh import mesh_shape

    data, fsdp, _ = mesh_shape(jax.device_count(), config.mesh_data, config.mesh_fsdp, config.mesh_tensor)
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps * data * fsdp
    if config.dataloader_drop_last:
        pairs = _whole_batches(pairs, micro * data * fsdp)
    total = total_steps(pairs, micro, accumulation, config.max_steps, config.num_train_epochs)
    epoch = total_steps(pairs, micro, accumulation, -1, 1.0)
    logging = interval(config.logging_steps, total, 10)

    def every(strategy: str, steps: float | None, default: int) -> int:
        return {"no": 0, "best": 0, "epoch": epoch}.get(strategy, interval(steps, total, default))

    return Plan(
        pairs=pairs,
        micro_batch=micro,
        accumulation=accumulation,
        total=total,
        logging_steps=every(config.logging_strategy, config.logging_steps, 10),
        eval_steps=every(config.eval_strategy, config.eval_steps, logging),
        save_steps=every(config.save_strategy, config.save_steps, 500),
        saves_best=config.save_strategy == "best",
        logging_first_step=config.logging_first_step,
        eval_on_start=config.eval_on_start and config.eval_strategy != "no",
        sync_steps=config.ref_model_sync_steps if config.sync_ref_model else 0,
        eval_delay=config.eval_delay * (epoch if config.eval_strategy == "epoch" else 1),
        logs_last=config.logging_strategy == "epoch",
    )


def _whole_batches(pairs: int, size: int) -> int:
    """The pairs of an epoch that fill batches of `size` (one micro-batch on each device), as TRL's loader leaves out the rest."""
    if pairs < size:
        raise UserError(
            "no-whole-batch",
            f"dataloader_drop_last leaves nothing: there are {pairs} pairs, and one batch of all devices takes {size}. Lower "
            "per_device_train_batch_size, or set dataloader_drop_last to false.",
        )
    return pairs // size * size


def schedule_options(config: DPOConfig) -> dict[str, Any]:
    """`lr_scheduler_kwargs` as the schedules take them: ends as shares of the rate."""
    options = dict(config.lr_scheduler_kwargs or {})
    rate = config.learning_rate or 1.0
    if config.lr_scheduler_type == "polynomial":
        options["end"] = options.pop("lr_end", 1e-7) / rate
    if config.lr_scheduler_type in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and "min_lr" in options:
        options["min_lr_rate"] = options.pop("min_lr") / rate
    return options


def controller_of(config: DPOConfig) -> Controller | None:
    """What follows the KL wherever it is judged."""
    name = "adaptive_beta" if config.adaptive_beta else config.kl_controller
    proportional, integral = config.pi_beta_gains
    choices: dict[str, Controller] = {
        "adaptive_beta": AdaptiveBeta(config.adaptive_beta_rate),
        "pi_beta": PIBeta(proportional, integral),
        "dual_kl_coef": DualKLCoef(config.dual_kl_rate),
    }
    return choices.get(name)


def kl_control(config: DPOConfig) -> KLControl:
    """The rules by which the KL is held."""

    def per_action(value: int | dict[str, int] | None) -> dict[str, int]:
        if value is None:
            return {}
        return dict(value) if isinstance(value, dict) else dict.fromkeys(KL_ACTIONS, value)

    return KLControl(
        config.target_kl,
        tuple(config.kl_actions),
        controller_of(config),
        judged_on=tuple(config.kl_judged_on),
        window=config.kl_window,
        patience=per_action(config.kl_patience),
        cooldown=per_action(config.kl_cooldown),
        most=per_action(config.kl_most_actions),
    )


def ranking_of(config: DPOConfig, sets: Mapping[str | None, PairSet]) -> Ranking:
    """How checkpoints are compared; `metric_for_best_model` is checked before anything is loaded.

    Raises:
      UserError: a metric that evaluations do not have, with the nearest name; with several sets, one that names none of them.
    """
    import difflib

    from jax_dpo.train import kl
    from jax_dpo.train.metrics import Sums, named

    names = [*named(dict.fromkeys(Sums._fields, 1.0)), *kl.NAMES]
    if config.eval_on_policy_prompts:
        names += [kl.ON_POLICY, f"{kl.ON_POLICY}/sequence"]
    metric = config.metric_for_best_model
    named_sets = [n for n in sets if n is not None]
    which = named_sets[0] if named_sets else None
    if metric is not None and sets:
        bare = metric.removeprefix("eval_")
        if named_sets:
            found = [n for n in named_sets if bare.startswith(n + "_")]
            if not found:
                raise UserError(
                    "metric-for-best-model-unknown",
                    f"metric_for_best_model {metric} names none of the evaluation sets {', '.join(named_sets)}. "
                    f"Write for example {named_sets[0]}_{bare if bare in names else 'loss'}.",
                )
            which = max(found, key=len)
            bare = bare.removeprefix(which + "_")
        if bare not in names:
            near = difflib.get_close_matches(bare, names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                "metric-for-best-model-unknown",
                f"metric_for_best_model: an evaluation has no {metric}.{hint} It has: {', '.join(names)}.",
            )
        metric = bare
    return Ranking(config.target_kl, metric, config.greater_is_better, which, config.beta)


def fresh_progress(config: DPOConfig) -> Progress:
    return Progress(ControlState.start(learning_rate=config.learning_rate, beta=config.beta, kl_coef=config.kl_coef))


def trainer_state(run: Run, history: list[dict[str, Any]], ranking: Ranking, progress: Progress) -> dict[str, Any]:
    """What trainer_state.json of a checkpoint holds."""
    plan, config = run.plan, run.args
    assert plan is not None
    best = progress.best_saved(ranking)
    return outputs.hf_trainer_state(
        history,
        step=progress.step,
        epoch=plan.epoch(progress.position),
        best_step=best,
        best_metric=None if best is None else progress.scores[best],
        output_dir=Path(config.output_dir),
        facts={
            "max_steps": plan.total,
            "num_train_epochs": config.num_train_epochs,
            "logging_steps": plan.logging_steps,
            "eval_steps": plan.eval_steps,
            "save_steps": plan.save_steps,
            "train_batch_size": config.per_device_train_batch_size,
            "num_input_tokens_seen": progress.num_tokens,
        },
    )


def start_check(run: Run) -> Callable[[dict[str, float]], None] | None:
    """What the first numbers must pass; None where policy and reference differ from the start, or dropout acts."""
    engine = run.engine
    if not run.pairing.same_start or engine.facts.dropout:
        return None
    scored = float(np.mean(run.train_set.sizes.scored)) if run.train_set is not None else 1.0
    return partial(check_start, options=engine.options, beta=run.args.beta, tokens_per_pair=scored, dtype=engine.dtype)


def with_probe(run: Run, frozen: Frozen, ranking: Ranking) -> Frozen:
    """What stays, with the probe set of the trust region where there is one.

    Raises:
      UserError: no held-out pairs.
    """
    sets = run.engine.eval_sets
    if not run.args.kl_trust_region:
        return frozen
    if not sets:
        raise UserError(
            "no-probe-set",
            "kl_trust_region measures each update on held-out pairs, and there are none. Name an evaluation set (eval_dataset, or "
            "dataset_test_split of the data), or set kl_trust_region to false.",
        )
    data = sets.get(ranking.set) or next(iter(sets.values()))
    return frozen._replace(probe=run.engine.probe(data, frozen))


def assemble(
    run: Run, log: RunLog, frozen: Frozen, *, notify: Callable[[str, dict[str, Any]], None], primary: bool
) -> Parts:
    """Everything that the loop needs. `notify` tells the callbacks; `primary`: this process writes."""
    config, engine, plan = run.args, run.engine, run.plan
    assert plan is not None and run.train_set is not None
    out = Path(config.output_dir)
    named: dict[str | None, PairSet] = {**engine.eval_sets, nonfinite.TRAINING: run.train_set}
    eval_sets = tuple(_held_out(run, name, data) for name, data in engine.eval_sets.items())
    ranking = ranking_of(config, engine.eval_sets)
    writers = Writers(log, open_writers(config.report_to, out, config.run_name, config.project) if primary else ())

    def report() -> None:
        if primary:
            write_report(out)

    peak = peak_of(jax.devices()[0].device_kind)
    warmup = warmup_of(config.warmup_steps, plan.total)
    factor = schedule(config.lr_scheduler_type, total=plan.total, warmup=warmup, options=schedule_options(config))
    return Parts(
        plan=plan,
        step=engine.step,
        evaluator=engine.evaluator,
        frozen=with_probe(run, frozen, ranking),
        against=lambda state: engine.against(state, frozen),
        sync=engine.sync,
        fresh_state=engine.fresh_state,
        batch_at=engine.batch_at,
        to_devices=engine.to_devices,
        eval_sets=eval_sets,
        schedule=factor,
        learning_rate=config.learning_rate,
        key=jax.random.key(config.seed),
        options=engine.options,
        control=kl_control(config),
        ranking=ranking,
        checkpoints=Checkpoints(
            out, save_total_limit=config.save_total_limit, primary=primary, say=lambda text: run.notes.append(text)
        ),
        writers=writers,
        display=run.display,
        trainer_state=lambda progress: trainer_state(run, log_history(log.records()), ranking, progress),
        check_start=start_check(run),
        notify=notify,
        report=report,
        flops=engine.flops,
        peak_flops=None if peak is None else peak * jax.device_count(),
        skip_nonfinite=config.nonfinite_steps == "skip",
        faulty_pairs=lambda name, pairs, state: engine.faulty_pairs(
            named[name], pairs, state, engine.against(state, frozen)
        ),
        row_names={name: s.data.row_names for name, s in named.items()},
    )


def _held_out(run: Run, name: str | None, data: PairSet) -> EvalSet:
    return replace(run.engine.held_out(name, data), on_policy=on_policy_of(run, data))


def evaluation_metrics(
    run: Run, sets: Mapping[str | None, PairSet], state: TrainState, frozen: Frozen, step: int
) -> dict[str, float]:
    """All sets at the configured beta, as the run stands at `step`. Rows whose numbers are not finite are shown, or warned of where
    nothing is shown."""
    engine, config = run.engine, run.args
    knobs = Knobs(jnp.float32(0), jnp.float32(config.beta), jnp.float32(config.kl_coef))
    found: dict[str, float] = {}
    held = engine.against(state, frozen)
    for name, data in sets.items():
        held_out = _held_out(run, name, data)
        faulty: list[np.ndarray] = []
        against = (state.params, held, knobs, engine.options)
        found |= evaluate(engine.evaluator, held_out, *against, faulty.append, step)
        for pairs in faulty:
            fault = nonfinite.of_evaluation(None, engine.faulty_pairs(data, pairs, state, held), pairs)
            record = {"kind": "nonfinite", **fault.record(data.data.row_names, "counted")}
            run.display.write(record)
            if isinstance(run.display, Quiet):
                warnings.warn(nonfinite_text(record), stacklevel=3)
        if run.trained_tokens is not None:
            found[f"{held_out.prefix}num_tokens"] = run.trained_tokens
    return found


def reference_sentence(run: Run) -> str:
    """What the policy is held against, in words."""
    plan, whole = run.plan, run.pairing.sentence
    if run.args.precompute_ref_log_probs and run.train_set is not None:
        found = f", {run.ref_logps_found:,} of them by an earlier run" if run.ref_logps_found else ""
        return (
            f"{whole.replace(' (a second copy)', '')}; its log-probabilities of the {len(run.train_set):,} training pairs were computed "
            f"beforehand{found}, so it is not there while training; evaluations load it, and their KL is exact"
        )
    if plan is None or not plan.sync_steps:
        return whole
    return (
        f"{whole.replace(', frozen', '')}, moved {run.args.ref_model_mixup_alpha:g} of the way to the policy every {plan.sync_steps} steps "
        "(TR-DPO): KL, rewards and margins are against the reference as it has moved by then"
    )


def start_record(run: Run) -> Record:
    """The first record: what is trained on what, and for how long."""
    config, engine, plan, policy = run.args, run.engine, run.plan, run.pairing.policy
    assert plan is not None
    total, trained = parameter_count(policy.config)
    mesh, feed = engine.mesh, engine.feed
    sets = run.named_sets()
    held_out = {name: s.data.counts for name, s in sets.items() if name != "train"}
    warnings = [
        *config.warnings(adapter=policy.config.lora is not None, data_parallel=row_shards(mesh)),
        *plan_warnings(plan, config),
        *served_warnings(policy.config.lora, policy.lora_config, config),
        *chat_warnings(sets["train"].pairs, sets["train"].data.name, run.tokenizer, policy.files, config),
        *run.notes,
        *(w for s in sets.values() for w in s.data.warnings),
    ]
    fill, order = _expected_fill(run), curriculum_record(run)
    return {
        "kind": "start",
        "step": 0,
        "version": version("jax-dpo"),
        "options": config.to_dict(),
        "changed": config.changed(),
        "run": run.identity(),
        "model": {
            "name": policy.title,
            "family": policy.config.model_type,
            "parameters": total,
            "trainable_parameters": trained,
            "dtype": policy.files.dtype,
            "compute_dtype": engine.dtype,
            "readers": reader_notes(run.tokenizer.files),
        },
        "reference": reference_sentence(run),
        "data": {"train": sets["train"].data.counts, "eval": held_out},
        **({} if order is None else {"curriculum": order}),
        "devices": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "mesh": dict(mesh.shape),
            "hosts": jax.process_count(),
        },
        "plan": {
            "steps": plan.total,
            "epochs": plan.epoch(plan.after(plan.total)),
            "pairs_per_step": plan.pairs_per_step,
            "warmup_steps": warmup_of(config.warmup_steps, plan.total),
            "row_tokens": feed.shape.row_tokens,
            "rows": feed.rows,
            "row_fill": fill,
            "seconds": _expected_seconds(run),
            "warnings": warnings,
        },
    }


def _sampled(run: Run, most: int) -> list[Any]:
    plan = run.plan
    assert plan is not None
    at = np.unique(np.linspace(0, plan.total - 1, min(most, plan.total)).astype(int))
    return [run.engine.batch_at(plan.after(int(k))) for k in at]


def _expected_fill(run: Run) -> float:
    return float(np.mean([b.fill for b in _sampled(run, 8)]))


def _expected_seconds(run: Run) -> float:
    """Steps and evaluations at a share of the matmul rate that this device shows now."""
    engine, plan = run.engine, run.plan
    assert plan is not None
    platform = jax.default_backend()
    rate = peak_of(jax.devices()[0].device_kind) or matmul_rate()
    batches = _sampled(run, 8)
    step = float(np.mean([engine.flops(b) for b in batches]))
    pair = step / float(np.mean([len(b.pairs) for b in batches]))
    evaluations = (plan.total // plan.eval_steps + plan.eval_on_start) if plan.eval_steps else 0
    held_out = sum(len(s) for s in engine.eval_sets.values())
    work = step * plan.total + 0.5 * pair * held_out * evaluations
    # A sampled token counts as one of a step: three forward passes, of which the one that draws it takes longer than its FLOPs.
    sampled = run.args.eval_on_policy_prompts * run.args.eval_on_policy_tokens * len(engine.eval_sets)
    work += engine.work.token * sampled * evaluations
    devices = jax.device_count() if platform != "cpu" else 1
    return work / (rate * devices * EXPECTED_EFFICIENCY.get(platform, 0.35)) + 10.0
