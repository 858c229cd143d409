"""`jax-dpo tune`: data and trainer as `jax-dpo train` has them, the search, its report."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.config import DPOConfig, ScriptArguments
from jax_dpo.data.atomic import replacing
from jax_dpo.data.load import is_stream, split_rows
from jax_dpo.errors import OK, UserError, named
from jax_dpo.report.records import Record, json_ready
from jax_dpo.report.terminal import Quiet
from jax_dpo.report.tuning import TuneScreen
from jax_dpo.sharding.multihost import is_primary, leave
from jax_dpo.train.rate_search import Trial
from jax_dpo.train.signals import StopRequest
from jax_dpo.trainer import outputs
from jax_dpo.trainer.commands import adapter_of, read_data
from jax_dpo.trainer.datasets import Some
from jax_dpo.trainer.dpo import DPOTrainer
from jax_dpo.trainer.parts import make_plan
from jax_dpo.trainer.setup import prepare_jax
from jax_dpo.trainer.tune import TuneOptions, Tuner, report_of, trial_record, without_control

LEAST_ROWS = 8  # training rows of which a part can still be held out
MOST_HELD_OUT = 0.25  # share of them


def run_tune(
    script: ScriptArguments,
    config: DPOConfig,
    rest: Sequence[str],
    *,
    trial_steps: int,
    trial_pairs: int,
    trial_rates: Sequence[float],
    trial_betas: Sequence[float],
    kl_share: float | None,
    tune_report: str | None,
) -> int:
    """`jax-dpo tune`: shows the trials and the proposal, and writes them to `tune_report`, or to tune.json in the run's output_dir.

    Args:
      rest: what stood on the command line beside the options of the trials, learning_rate and beta.

    Raises:
      UserError: what `jax-dpo train` refuses; no pairs to hold out; no trial is a guide; a report that cannot be written.
      Stopped: a signal; nothing is written.
    """
    began = time.time()
    options = TuneOptions(trial_steps, trial_pairs, tuple(trial_rates), tuple(trial_betas), kl_share)
    path = Path(tune_report) if tune_report else Path(config.output_dir) / "tune.json"
    if path.is_dir():
        raise UserError(
            "tune-report-unusable", f"{path} is a directory; name a file for the report with --tune_report."
        )
    args = without_control(config)
    notes = [*prepare_jax(args), *script.warnings()]
    screen = TuneScreen(live=False if config.disable_tqdm else None) if is_primary() else None
    try:
        run, probe, planned = _built(script, args, options, screen or Quiet(), notes)
        with StopRequest() as stop, run.memory("tuning"):
            tell = (lambda trial: screen.trial(trial_record(trial))) if screen else _ignore
            tuner = Tuner(run, probe, planned, options, stop, tell)
            found = tuner.search()
        made = report_of(
            tuner, found, seconds=time.time() - began, notes=[*dict.fromkeys([*notes, *_left_out(config)])]
        )
        proposed = ["--learning_rate", f"{found.rate:.2g}", "--beta", f"{found.beta:g}"]
        made["command"] = shlex.join(["jax-dpo", "train", *rest, *proposed])
        if screen is not None:
            screen.result(made, made["command"])
            _write(path, made)
            screen.wrote(path)
    finally:
        if screen is not None:
            screen.close()
    leave()
    return OK


def _ignore(trial: Trial) -> None:
    pass


def _built(
    script: ScriptArguments, args: DPOConfig, options: TuneOptions, screen: Any, notes: list[str]
) -> tuple[DPOTrainer, Some, Any]:
    """The trainer, the held-out pairs that trials are measured on, and the plan of the run that is to come."""
    screen.busy("reading the data")
    train, held_out = read_data(script, args.seed)
    own = held_out is None
    if held_out is None:
        train, held_out = _hold_out(train, options.pairs, args.seed, script.dataset_name)
        notes.append(
            named(
                "tune-held-out",
                f"there are no held-out pairs, so {len(held_out)} training rows were held out of the trials; the run itself trains on them",
            )
        )
    run = DPOTrainer(
        model=script.model_name_or_path,
        ref_model=script.ref_model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=script.tokenizer_name_or_path,
        peft_config=adapter_of(script),
        display=screen,
        revision=script.model_revision,
    )
    assert run.train_set is not None
    run.train_set.data.require_pairs()
    assert run.plan is not None
    notes += run.notes
    name, data = next(iter(run.eval_sets.items()))
    if name is not None and len(run.eval_sets) > 1:
        notes.append(named("tune-one-set", f"of the evaluation sets, {name} is measured"))
    at = np.unique(np.linspace(0, len(data) - 1, min(options.pairs, len(data))).astype(int))
    planned = make_plan(run.args, len(run.train_set) + len(data)) if own else run.plan
    return run, Some(data, at), planned


def _hold_out(train: Any, pairs: int, seed: int, name: str) -> tuple[Any, Any]:
    if is_stream(train) or len(train) < LEAST_ROWS:
        why = "come as a stream" if is_stream(train) else f"are {len(train)} rows"
        raise UserError(
            "evaluation-data-missing",
            f"The trials are measured on held-out pairs, and there are none; the training data {name} {why}, of which none can be held "
            "out. Name held-out pairs with --eval_dataset.",
        )
    return split_rows(train, min(pairs, int(len(train) * MOST_HELD_OUT)), seed)


def _left_out(config: DPOConfig) -> list[str]:
    """What of the configuration the trials were made without, in words."""
    acting = [name for name in ("kl_actions", "adaptive_beta", "kl_trust_region") if getattr(config, name)]
    acting += ["kl_controller"] * (config.kl_controller != "none")
    found = []
    if acting:
        found.append(
            named(
                "tune-without",
                f"the trials were made without {' and '.join(acting)}: at the proposed rate there should be nothing for it to do",
            )
        )
    if config.train_sampling_strategy == "curriculum":
        found.append(
            named(
                "tune-without",
                "the trials took the pairs in random order, since the first ones of a curriculum stand for no later ones",
            )
        )
    if config.precompute_ref_log_probs:
        found.append(
            named(
                "tune-without",
                "the trials had the reference beside the policy (precompute_ref_log_probs false), since they measure the KL of every step",
            )
        )
    return found


def _write(path: Path, made: Record) -> None:
    outputs.make_output_dir(path.parent)
    try:
        with replacing(path) as file:
            file.write((json.dumps(json_ready(made), indent=2) + "\n").encode())
    except OSError as e:
        raise UserError(
            "tune-report-unusable", f"{path} cannot be written: {e.strerror}. Name another file with --tune_report."
        ) from e
