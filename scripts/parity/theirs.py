"""The other side: every case through TRL, transformers and PEFT, in torch on a CPU, float32, one thread.

The side `again` is this one with another implementation of attention and of AdamW: how far TRL is from itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from scripts.parity.cases import Case
from scripts.parity.common import (
    COMMON,
    Arrays,
    Inputs,
    adapter_config,
    ids_arrays,
    log_arrays,
    padded_tokens,
    prefixed,
)
from scripts.parity.models import VOCABULARY

AGAIN = False  # set by `again.py`


def trainer_of(case: Case, inputs: Inputs, out: Path, callbacks: Iterable[Any] = (), **options: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    held_out = None
    if case.options.get("eval_strategy", "no") != "no":
        held_out = Dataset.from_list(inputs.held_out(case))
    quiet = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    if AGAIN:
        quiet["optim"] = "adamw_torch"
    kind = DPOTrainer
    if case.do == "penalty":
        from scripts.parity.penalty import penalised

        kind = penalised(case.ours)
    return kind(
        # TRL trains no model that came out of a GGUF file: the data set is prepared beside another one.
        model=load(inputs.model("llama")) if case.model.endswith(".gguf") else model_of(case, inputs),
        ref_model=load(inputs.model(case.reference)) if case.reference else None,
        args=DPOConfig(str(out), **{**COMMON, **quiet, **case.options, **options}),
        train_dataset=Dataset.from_list(inputs.rows(case)),
        eval_dataset=held_out,
        processing_class=tokenizer_of(case, inputs),
        callbacks=list(callbacks),
    )


def load(path: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    more: dict[str, Any] = {"attn_implementation": "eager"} if AGAIN else {}
    if path.endswith(".gguf"):
        path, more["gguf_file"] = os.path.split(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **more)


def tokenizer_of(case: Case, inputs: Inputs) -> Any:
    from transformers import AutoTokenizer

    if case.tokenizer:
        return AutoTokenizer.from_pretrained(inputs.tokenizer(case.tokenizer))
    folder, file = os.path.split(inputs.model(case.model))
    return AutoTokenizer.from_pretrained(folder, gguf_file=file)


def model_of(case: Case, inputs: Inputs) -> Any:
    if not case.adapter:
        return load(inputs.model(case.model))
    from peft import PeftModel

    return PeftModel.from_pretrained(load(inputs.model(case.model)), inputs.adapter(case.adapter), is_trainable=True)


def saved(model: Any, out: Path) -> Arrays:
    """What transformers or PEFT write of a model, tensor by tensor, under the names of the file."""
    model.save_pretrained(out)
    return load_file(next(out.glob("*model.safetensors")))


def step(case: Case, inputs: Inputs, scratch: Path, seed: int) -> Arrays:
    import torch
    from transformers import TrainerCallback

    gradients: dict[str, Any] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    gradients[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()

    trainer = trainer_of(case, inputs, scratch / "run", [Keep()], max_steps=1, max_grad_norm=0, learning_rate=1e-3)
    before = kl_divergence(trainer, trainer.train_dataset)
    trainer.train()
    found = log_arrays(trainer.state.log_history) | {"kl_divergence": np.asarray([before])}
    del found["learning_rate"]
    with torch.no_grad():  # through the model, so that they come out under the names of the file
        for name, weight in trainer.model.named_parameters():
            if name in gradients:
                weight.copy_(gradients[name])
    return found | prefixed("gradient", saved(trainer.model, scratch / "gradient"))


def run(case: Case, inputs: Inputs, scratch: Path, seed: int) -> Arrays:
    trainer = trainer_of(case, inputs, scratch / "run")
    trainer.train()
    found = log_arrays(trainer.state.log_history)
    if trainer.eval_dataset is not None:
        found |= {f"last {name}": value for name, value in log_arrays([trainer.evaluate()]).items()}
        if not case.options.get("precompute_ref_log_probs"):  # then nobody has the reference's distribution any more
            found["last eval_kl_divergence"] = np.asarray([kl_divergence(trainer, trainer.eval_dataset)])
    found |= prefixed("weight", saved(trainer.model, scratch / "final"))
    return found | adapter_config(scratch / "final") if case.adapter else found


def kl_divergence(trainer: Any, dataset: Any) -> float:
    """KL of policy to reference in nats a response token, from full logits: TRL has no such metric, so torch is asked."""
    import torch

    total, count = 0.0, 0
    for start in range(0, len(dataset), 4):
        batch = trainer.data_collator([dataset[i] for i in range(start, min(start + 4, len(dataset)))])
        with torch.no_grad():
            policy, reference = (torch.log_softmax(x, -1) for x in both_logits(trainer, batch))
            token_kl = (policy.exp() * (policy - reference)).sum(-1)[:, :-1]
        scored = batch["completion_mask"][:, 1:] * batch["attention_mask"][:, 1:]
        total += float((token_kl * scored).sum())
        count += int(scored.sum())
    return total / count


def both_logits(trainer: Any, batch: Any) -> Iterable[Any]:
    """Logits [2B,T,V] of policy and reference."""
    from trl.trainer.utils import use_adapter

    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    was_training = trainer.model.training
    trainer.model.eval()
    yield trainer.model(**given).logits.double()
    if trainer.ref_model is not None:
        yield trainer.ref_model(**given).logits.double()
    else:
        with use_adapter(trainer.model, adapter_name="ref" if "ref" in trainer.model.peft_config else None):
            yield trainer.model(**given).logits.double()
    trainer.model.train(was_training)


def ids(case: Case, inputs: Inputs, scratch: Path, seed: int) -> Arrays:
    return ids_arrays(trainer_of(case, inputs, scratch / "run").train_dataset)


def logits(case: Case, inputs: Inputs, scratch: Path, seed: int) -> Arrays:
    return logits_of(case, model_of(case, inputs), seed)


def logits_of(case: Case, model: Any, seed: int) -> Arrays:
    import torch

    model.eval()
    found = {}
    for side, tokens, mask in padded_tokens(case, seed, VOCABULARY):
        with torch.no_grad():
            both = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}
            # Positions count real tokens, as everyone who pads on the left gives them.
            both["position_ids"] = (both["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            found[f"logits/{side}"] = model(**both).logits.numpy()[mask.astype(bool)]
    return found


def export(case: Case, inputs: Inputs, scratch: Path, seed: int) -> Arrays:
    """Opens what the other side has saved."""
    out = inputs.export(case)
    if (out / "adapter_config.json").exists():
        from peft import PeftModel

        return logits_of(case, PeftModel.from_pretrained(load(inputs.model(case.model)), str(out)), seed)
    return logits_of(case, load(str(out)), seed)


DO: dict[str, Callable[[Case, Inputs, Path, int], Arrays]] = {f.__name__: f for f in (step, run, ids, logits, export)}
DO["penalty"] = run
