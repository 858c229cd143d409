"""This side: every case through jax_dpo's public surface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from scripts.parity.cases import Case
from scripts.parity.common import (
    COMMON,
    PROBE,
    PROBE_GAIN,
    Arrays,
    Inputs,
    adapter_config,
    ids_arrays,
    log_arrays,
    padded_tokens,
    prefixed,
)
from scripts.parity.models import VOCABULARY


def trainer_of(case: Case, inputs: Inputs, out: Path, **options: Any) -> Any:
    from jax_dpo import DPOConfig, DPOTrainer, LoraConfig, load_model

    model: Any = inputs.model(case.model)
    if case.adapter:
        model = load_model(model, adapter=inputs.adapter(case.adapter))
    held_out = inputs.held_out(case) if case.options.get("eval_strategy", "no") != "no" else None
    return DPOTrainer(
        model=model,
        ref_model=inputs.model(case.reference) if case.reference else None,
        args=DPOConfig(str(out), **{**COMMON, **case.options, **case.ours, **options}),
        train_dataset=inputs.rows(case),
        eval_dataset=held_out,
        processing_class=inputs.tokenizer(case.tokenizer) if case.tokenizer else None,
        peft_config=LoraConfig(**case.extra["lora"]) if "lora" in case.extra else None,
    )


def saved(trainer: Any, out: Path) -> Arrays:
    """What the trainer writes, tensor by tensor."""
    trainer.save_model(out)
    return load_file(next(out.glob("*model.safetensors")))


def step(case: Case, inputs: Inputs, scratch: Path, seed: int) -> Arrays:
    trainer = trainer_of(case, inputs, scratch / "run", **PROBE)
    before = saved(trainer, scratch / "before")
    trainer.train()
    after = saved(trainer, scratch / "after")
    found = log_arrays(trainer.state.log_history)
    del found["learning_rate"]
    gradients = {name: (before[name] - after[name].astype(np.float64)) / PROBE_GAIN for name in before}
    return found | prefixed("gradient", gradients)


def run(case: Case, inputs: Inputs, scratch: Path, seed: int) -> Arrays:
    trainer = trainer_of(case, inputs, scratch / "run")
    trainer.train()
    found = log_arrays(trainer.state.log_history)
    if case.options.get("eval_strategy", "no") != "no":
        found |= {f"last {name}": np.asarray(value) for name, value in log_arrays([trainer.evaluate()]).items()}
    found |= prefixed("weight", saved(trainer, scratch / "final"))
    return found | adapter_config(scratch / "final") if case.adapter else found


def ids(case: Case, inputs: Inputs, scratch: Path, seed: int) -> Arrays:
    return ids_arrays(trainer_of(case, inputs, scratch / "run").train_dataset)


def logits(case: Case, inputs: Inputs, scratch: Path, seed: int) -> Arrays:
    return logits_of(case, inputs.model(case.model), inputs.adapter(case.adapter) if case.adapter else None, seed)


def logits_of(case: Case, model: str, adapter: str | None, seed: int) -> Arrays:
    from jax_dpo import load_model

    policy = load_model(model, adapter=adapter)
    found = {}
    for side, tokens, mask in padded_tokens(case, seed, VOCABULARY):
        found[f"logits/{side}"] = np.asarray(policy(tokens, mask))[mask.astype(bool)]
    return found


def export(case: Case, inputs: Inputs, scratch: Path, seed: int) -> Arrays:
    """Trains, saves, opens what was saved."""
    trainer = trainer_of(case, inputs, scratch / "run")
    trainer.train()
    out = inputs.export(case)
    trainer.save_model(out, **case.extra.get("save", {}))
    if (out / "adapter_config.json").exists():
        return logits_of(case, inputs.model(case.model), str(out), seed)
    return logits_of(case, str(out), None, seed)


DO: dict[str, Callable[[Case, Inputs, Path, int], Arrays]] = {f.__name__: f for f in (step, run, ids, logits, export)}
DO["penalty"] = run
