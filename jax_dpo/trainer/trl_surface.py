"""What scripts written for TRL's trainer call or pass beside the training itself: done where it has a meaning here, answered where not."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_dpo.config import DPOConfig
from jax_dpo.config.advice import ADVICE
from jax_dpo.config.fields import Advice, Problem, refuse, sort_out
from jax_dpo.report.records import json_ready
from jax_dpo.sharding.multihost import is_primary
from jax_dpo.trainer.run import Run

# Arguments of TRL's DPOTrainer that are none here; None (of optimizers, a pair of them) asks for nothing.
ARGUMENTS: dict[str, Advice] = {
    "data_collator": Advice("pairs are packed into rows instead of padded by a collator; leave it out", None),
    "compute_metrics": Advice(
        "every evaluation has TRL's metrics and the KL; for more, read the metrics in a callback's on_evaluate", None
    ),
    "optimizers": Advice(
        "PyTorch's optimizers step no JAX arrays; write optim, optim_args, learning_rate and lr_scheduler_type in DPOConfig",
        None,
        (None, None),
        [None, None],
    ),
    "quantization_config": Advice(
        "weights are trained in float32 or bfloat16; load an unquantised model, and save memory by LoRA or "
        "gradient_checkpointing",
        None,
    ),
    "model_init": Advice("pass the model itself", None),
    "preprocess_logits_for_metrics": Advice("no logits are kept; leave it out", None),
}

# Attributes of TRL's and transformers' trainers that are none here -> what to do instead.
ATTRIBUTES: dict[str, str] = {
    "accelerator": "print under `if trainer.is_world_process_zero():`; processes and devices are JAX's own",
    "push_to_hub": "nothing is uploaded; upload the directory of save_model() with `hf upload`",
    "hub_model_id": "nothing is uploaded; upload the directory of save_model() with `hf upload`",
    "predict": "trainer.evaluate(dataset) gives the metrics of any pairs",
    "hyperparameter_search": "start a run for each choice of options, each in an output_dir of its own",
    "optimizer": "the optimizer is a part of the compiled step; write optim in DPOConfig",
    "lr_scheduler": "the schedule is a function of the step; write lr_scheduler_type in DPOConfig",
    "create_optimizer": "write optim in DPOConfig",
    "create_scheduler": "write lr_scheduler_type in DPOConfig",
    "create_optimizer_and_scheduler": "write optim and lr_scheduler_type in DPOConfig",
    "compute_loss": "the loss is a part of the compiled step; write loss_type in DPOConfig",
    "training_step": "the step is compiled as a whole; train() runs it",
    "get_train_dataloader": "trainer.train_dataset has the pairs; batches are packed while a run trains",
    "get_eval_dataloader": "trainer.evaluate() reads the held-out pairs",
    "data_collator": "pairs are packed into rows instead of padded by a collator",
    "ref_model": "the reference lies on the devices beside the policy; trainer.pairing says what it is",
    "create_model_card": "save_model() and a run's final/ write the model card",
}


def refuse_foreign(given: Mapping[str, Any]) -> None:
    """Raises one `UserError` for all arguments that ask for something that there is not."""
    problems: list[Problem] = []
    options = {item.name for item in fields(DPOConfig)}
    rest = dict(given)
    for name in [name for name in given if name in ARGUMENTS]:
        value = rest.pop(name)
        if not any(
            value is known or (isinstance(known, tuple | list) and value == known) for known in ARGUMENTS[name].values
        ):
            problems.append(Problem(name, f"is no argument of DPOTrainer here: {ARGUMENTS[name]}"))
    for name in [name for name in rest if name in options]:  # TRL up to 0.8 took them here
        del rest[name]
        problems.append(Problem(name, f"is an option of a run: write DPOConfig({name}=...)"))
    _, unknown = sort_out(rest, (), ADVICE)
    refuse([*problems, *unknown])


@dataclass
class TrainerState:
    """What `trainer.state` shows: TRL's log, one dict a log line."""

    log_history: list[dict[str, Any]] = field(default_factory=list)
    global_step: int = 0
    epoch: float = 0.0
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    best_global_step: int | None = None


class TrlSurface(Run):
    """Small methods of transformers' Trainer that scripts call around `train()` and `evaluate()`."""

    callbacks: list[Any]
    state: TrainerState

    def add_callback(self, callback: Any) -> None:
        """An object, or a class of one, that looks on from now."""
        self.callbacks.append(callback() if isinstance(callback, type) else callback)

    def pop_callback(self, callback: Any) -> Any:
        """Takes a callback (or the first of that class) off and returns it; None where there is none."""
        for i, known in enumerate(self.callbacks):
            if known is callback or (isinstance(callback, type) and isinstance(known, callback)):
                return self.callbacks.pop(i)
        return None

    def remove_callback(self, callback: Any) -> None:
        self.pop_callback(callback)

    def is_world_process_zero(self) -> bool:
        """Whether this is the one process that writes."""
        return is_primary()

    def is_local_process_zero(self) -> bool:
        """The same: hosts have one process each."""
        return is_primary()

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Prints metrics under a heading, one a line."""
        if not is_primary():
            return
        width = max((len(name) for name in metrics), default=0)
        lines = [f"***** {split} metrics *****"]
        for name, value in sorted(metrics.items()):
            lines.append(
                f"  {name:<{width}} = {value:.4f}" if isinstance(value, float) else f"  {name:<{width}} = {value}"
            )
        print("\n".join(lines), file=sys.stdout)

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Writes `<split>_results.json` under output_dir; with `combined` adds the metrics to `all_results.json` too."""
        if not is_primary():
            return
        out = Path(self.args.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        _write(out / f"{split}_results.json", metrics)
        if combined:
            whole = out / "all_results.json"
            _write(whole, {**(json.loads(whole.read_text(encoding="utf-8")) if whole.exists() else {}), **metrics})

    def save_state(self) -> None:
        """Writes `trainer_state.json` under output_dir: the log and where the run stands. Checkpoints have theirs anyway."""
        if is_primary():
            out = Path(self.args.output_dir)
            out.mkdir(parents=True, exist_ok=True)
            _write(out / "trainer_state.json", vars(self.state))

    def end(self) -> None:
        """Nothing is left to end: train() has closed its writers and checkpoints."""

    if not TYPE_CHECKING:  # for a type checker no other name exists

        def __getattr__(self, name: str) -> Any:
            words = ATTRIBUTES.get(name)
            raise AttributeError(f"DPOTrainer has no {name}" + (f": {words}" if words else ""))


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(json_ready(dict(values)), indent=2, sort_keys=True) + "\n", encoding="utf-8")
