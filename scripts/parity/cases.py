"""What is compared: a table of cases. A new feature is one entry more.

Every option has the name that both trainers give it, and what is not said has its default, which is the same in both.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from scripts.parity.ggufs import BLOCKS
from scripts.parity.ggufs import PLAIN as PLAIN_TYPES
from scripts.parity.models import ADAPTERS, SHAPES

Options = Mapping[str, Any]
NOTHING: Options = {}


@dataclass(frozen=True)
class Case:
    """One comparison. `do` names what both sides do (a function of `ours` and of `theirs`).

    step: one optimizer step on `rows` pairs; the log and the gradient of every tensor.
    run: a whole run with evaluations; the log, the last evaluation and the final weights.
    ids: the prepared data set, token by token.
    penalty: as run, with a KL penalty in the loss, which the other side computes in plain torch.
    logits: a model on given tokens, padded on either side.
    export: this side trains and saves; the other opens what was saved, and both compute its logits.
    """

    area: str
    name: str
    do: str
    model: str = "llama"
    reference: str | None = None
    adapter: str | None = None
    data: str = "plain"
    tokenizer: str = "turns"
    rows: int = 6
    options: Options = field(default_factory=dict)
    ours: Options = field(default_factory=dict)
    """options that only jax_dpo has"""
    extra: Options = field(default_factory=dict)

    @property
    def file(self) -> str:
        """A file name that no other case has."""
        plain = "".join(c if c.isalnum() else "_" for c in f"{self.area} {self.name}".lower())
        return f"{plain[:60]}_{zlib.crc32(f'{self.area} {self.name}'.encode()):08x}"


WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
PLAIN = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
SMOOTHING = {"robust": 0.15, "exo_pair": 0.02}
DIVERGENCES: tuple[Options, ...] = (
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
)


def say(options: Options) -> str:
    """Options as a case's name has them."""
    words = [f"{k}={'+'.join(map(str, v)) if isinstance(v, list | tuple) else v}" for k, v in options.items()]
    return ", ".join(words)


def _loss_options() -> Iterator[Options]:
    for loss in (*WITH_DIVERGENCE, *PLAIN):
        base: dict[str, Any] = {"loss_type": loss}
        if loss in SMOOTHING:
            base["label_smoothing"] = SMOOTHING[loss]
        yield base
        if loss in WITH_DIVERGENCE:
            yield from (base | dict(divergence) for divergence in DIVERGENCES)
    yield {"loss_type": "sigmoid", "label_smoothing": 0.2}
    yield {"loss_type": "sigmoid", "beta": 0.37}
    yield {"loss_type": "ipo", "beta": 0.37, "ld_alpha": 0.4}
    yield {"loss_type": "sigmoid", "ld_alpha": 0.25}
    yield {"loss_type": "sft", "ld_alpha": 0.0}
    yield {"loss_type": "discopop", "discopop_tau": 0.4, "beta": 0.6}
    for loss in ("sigmoid", "ipo", "sppo_hard"):
        yield {"loss_type": loss, "use_weighting": True}
    yield {"loss_type": "sigmoid", "use_weighting": True, "ld_alpha": 0.5}
    yield {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    yield {"loss_type": ["apo_zero", "sigmoid_norm"], "loss_weights": [1.5, 0.7], "beta": 0.2}


def _losses() -> Iterator[Case]:
    moved = {"model": "llama_moved", "reference": "llama"}
    for options in _loss_options():
        yield Case("Losses", say(options), "step", **moved, options={**options, "per_device_train_batch_size": 6})
    sorted_losses = (
        {"loss_type": "aot"},
        {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
        {"loss_type": ["aot", "sigmoid"], "loss_weights": [0.7, 1.2], "beta": 0.3},
    )
    for options in ({"loss_type": "sft"}, {"loss_type": "sigmoid_norm"}, *sorted_losses):
        yield Case(
            "Losses",
            say(options) + ", micro-batches of 4 and 3",
            "step",
            **moved,
            rows=7,
            options={**options, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            extra={"without": TOKEN_METRICS},
        )


def _data() -> Iterator[Case]:
    for tokenizer in ("turns", "bos", "both"):
        for name in ("plain", "rough", "implicit", "chat", "implicit_chat"):
            yield Case("Token ids", f"{name}, tokenizer {tokenizer}", "ids", data=name, tokenizer=tokenizer, rows=48)
    yield Case("Token ids", "tools and chat_template_kwargs", "ids", data="tools", rows=48)
    for length in (9, 17):
        yield Case(
            "Token ids", f"rough, max_length={length}", "ids", data="rough", rows=48, options={"max_length": length}
        )
    order = {"max_steps": 90, "per_device_train_batch_size": 1, "learning_rate": 0.0}
    yield Case("Order of pairs", "31 pairs, three epochs", "run", rows=31, options=order)
    yield Case("Order of pairs", "data_seed=7", "run", rows=31, options={**order, "data_seed": 7, "max_steps": 40})
    yield Case(
        "Order of pairs",
        "sequential",
        "run",
        rows=13,
        options={**order, "train_sampling_strategy": "sequential", "max_steps": 20},
    )


STEPS = {
    "per_device_train_batch_size": 4,
    "max_steps": 8,
    "learning_rate": 1e-3,
    # Adam divides a gradient by its own size. Where a gradient is nearly nothing, as one element of a hundred thousand always is, the
    # change is rounding, and two runs of TRL itself part there by 1e-4. An epsilon above the rounding keeps that out of sight.
    "adam_epsilon": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "per_device_eval_batch_size": 8,
}
# TRL's token metrics are means over micro-batches, here they are means over tokens: equal where there is one micro-batch.
TOKEN_METRICS = (r"entropy", r"logits/.*", r"mean_token_accuracy")
SEVERAL = {"without": TOKEN_METRICS}


def _run(area: str, name: str, options: Options = NOTHING, **more: Any) -> Case:
    return Case(area, name, "run", rows=48, options={**STEPS, **options}, **more)


def _trajectories() -> Iterator[Case]:
    area = "Trajectories"
    yield _run(area, "sigmoid")
    for loss in ("ipo", "hinge", "apo_zero", "sppo_hard", "sft"):
        yield _run(area, loss, {"loss_type": loss})
    yield _run(area, "robust, label_smoothing=0.2", {"loss_type": "robust", "label_smoothing": 0.2})
    yield _run(
        area,
        "sigmoid and sft, accumulation 2",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4], "gradient_accumulation_steps": 2},
        extra={"without": TOKEN_METRICS},
    )
    yield _run(
        area,
        "linear without warm-up, epsilon 1e-4",
        {"lr_scheduler_type": "linear", "warmup_steps": 0, "adam_epsilon": 1e-4},
    )
    yield _run(area, "epsilon 1e-8", {"adam_epsilon": 1e-8})
    yield _run(area, "unclipped", {"max_grad_norm": 0})
    yield _run(area, "clipped at 0.3", {"max_grad_norm": 0.3})
    yield _run(
        area,
        "7 pairs, batch 2, accumulation 4, two epochs",
        {
            "gradient_accumulation_steps": 4,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 2,
            "max_steps": -1,
            "eval_steps": 1,
            "warmup_steps": 1,
        },
        extra={"rows": 7, "without": TOKEN_METRICS},
    )
    for loss in ("aot", "aot_unpaired"):
        yield _run(
            area, f"{loss}, accumulation 2", {"loss_type": loss, "gradient_accumulation_steps": 2}, extra=SEVERAL
        )
    for model in ("mistral", "qwen3", "llama_tied", "gemma2"):
        yield _run(area, model, model=model)
    yield _run(area, "mixtral, the router's loss as its config has it", model="mixtral")
    yield _run(
        area,
        "mixtral, router_aux_loss_coef=0.5, accumulation 2",
        {"router_aux_loss_coef": 0.5, "gradient_accumulation_steps": 2},
        model="mixtral",
        extra=SEVERAL,
    )
    yield _run(area, "qwen3_moe, router_aux_loss_coef=0", {"router_aux_loss_coef": 0.0}, model="qwen3_moe")
    yield _run(
        area,
        "evaluated in batches of 3, eval_weighting=batches",
        {"per_device_eval_batch_size": 3},
        ours={"eval_weighting": "batches"},
    )
    # A bias of keys hardly changes anything but by rotation: its gradient is rounding. See STEPS.
    yield _run(area, "qwen2", {"adam_epsilon": 1e-3}, model="qwen2")


def _schedules() -> Iterator[Case]:
    short = {
        "max_steps": 12,
        "learning_rate": 3e-4,
        "warmup_steps": 4,
        "eval_strategy": "no",
        "per_device_train_batch_size": 1,
    }
    kwargs: dict[str, Options | None] = {
        "linear": None,
        "cosine": {"num_cycles": 0.7},
        "cosine_with_restarts": {"num_cycles": 2},
        "polynomial": {"power": 2.0, "lr_end": 1e-6},
        "constant_with_warmup": None,
        "inverse_sqrt": {"timescale": 30},
        "cosine_with_min_lr": {"min_lr_rate": 0.2},
        "warmup_stable_decay": {"num_decay_steps": 3, "min_lr_ratio": 0.1, "decay_type": "1-sqrt"},
    }
    for name, more in kwargs.items():
        options = {"lr_scheduler_type": name} | ({"lr_scheduler_kwargs": more} if more else {})
        yield _run("Schedules", say(options), {**short, **options})
    yield _run(
        "Schedules",
        "constant without warm-up",
        {**short, "lr_scheduler_type": "constant", "warmup_steps": 0, "adam_epsilon": 1e-4},
    )
    yield _run("Schedules", "warmup_steps=0.3", {**short, "lr_scheduler_type": "cosine", "warmup_steps": 0.3})


def _optimizers() -> Iterator[Case]:
    yield _run("Optimizers", "adamw, weight_decay=0.2", {"weight_decay": 0.2})
    yield _run(
        "Optimizers",
        "adamw, betas 0.7 and 0.9, epsilon 1e-3",
        {"adam_beta1": 0.7, "adam_beta2": 0.9, "adam_epsilon": 1e-3},
    )
    sgd = {"optim": "sgd", "learning_rate": 2e-2, "weight_decay": 0.1}
    yield _run("Optimizers", say(sgd), sgd)
    adafactor = {"optim": "adafactor", "learning_rate": 1e-3, "weight_decay": 0.1}
    yield _run("Optimizers", say(adafactor), adafactor)
    yield _run("Optimizers", f"adapters, {say(adafactor)}", adafactor, model="llama", adapter="plain")


def _truncation() -> Iterator[Case]:
    for mode in ("keep_start", "keep_end"):
        for length in (12, 20):
            name = f"max_length={length}, truncation_mode={mode}"
            yield _run("Data in runs", name, {"max_length": length, "truncation_mode": mode})
    yield _run("Data in runs", "conversations", data="chat")
    yield _run(
        "Data in runs", "conversations without a prompt column, max_length=40", {"max_length": 40}, data="implicit_chat"
    )
    yield _run("Data in runs", "text without a prompt column", data="implicit")
    yield _run("Data in runs", "tools", data="tools")
    yield _run(
        "Data in runs", "a tokenizer that writes both ends and has no padding token", data="rough", tokenizer="both"
    )


def _references() -> Iterator[Case]:
    area = "Reference models"
    yield _run(area, "another model", model="llama_moved", reference="llama")
    kept: Options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 5}
    yield _run(area, f"{say(kept)}, another model", kept, model="llama_moved", reference="llama")
    # The first steps are ties, which rounding decides: the two passes of this trainer are not one program any more.
    yield _run(area, f"{say(kept)}, the policy's start", kept, extra={"without": (r"rewards/accuracies",)})
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.4}
    yield _run(area, say(sync), {**sync, "max_steps": 7})


def _models() -> Iterator[Case]:
    for name in SHAPES:
        yield Case("Model families", name, "logits", model=name)


def _kl() -> Iterator[Case]:
    for reduction, coefficient in (("token", 1.5), ("sequence", 0.3)):
        ours = {"kl_coef": coefficient, "kl_reduction": reduction}
        options = {**STEPS, "eval_strategy": "no"}
        yield Case("KL penalty", say(ours), "penalty", rows=48, options=options, ours=ours)
    moved = {"model": "llama_moved", "reference": "llama"}
    ours = {"kl_coef": 0.7, "kl_reduction": "token"}
    yield Case("KL penalty", say(ours) + ", another model", "penalty", rows=48, options=options, ours=ours, **moved)


def _lora() -> Iterator[Case]:
    rate = {"learning_rate": 5e-3}
    for name, (model, options) in ADAPTERS.items():
        area = f"{say(options)}, {model}"
        yield Case("LoRA", area + ": PEFT's adapter opened", "logits", model=model, adapter=name)
        yield _run("LoRA", area + ": trained on, against itself as it came", rate, model=model, adapter=name)
    model, options = ADAPTERS["plain"]
    yield _run(
        "LoRA", f"{say(options)}: trained on, against the base", rate, model=model, adapter="plain", reference=model
    )
    short = {**STEPS, **rate, "eval_strategy": "no", "warmup_steps": 0, "max_steps": 4}
    fresh: Options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    for words, more in (("opened by PEFT", {}), ("merged, opened by transformers", {"save": {"merge": True}})):
        extra = {"lora": fresh, **more}
        yield Case("LoRA", f"a new one, {say(fresh)}, {words}", "export", rows=48, options=short, extra=extra)


def _exports() -> Iterator[Case]:
    short = {**STEPS, "eval_strategy": "no", "warmup_steps": 0, "max_steps": 3}
    for model in ("llama", "llama_tied", "qwen3", "gemma2"):
        yield Case("Saved models", f"{model}, opened by transformers", "export", model=model, rows=48, options=short)
    half = {"save": {"dtype": "bfloat16"}}
    yield Case(
        "Saved models",
        "qwen2 in bfloat16, opened by transformers",
        "export",
        model="qwen2",
        rows=48,
        options=short,
        extra=half,
    )


def _ggufs() -> Iterator[Case]:
    for kind in (*PLAIN_TYPES, *BLOCKS):
        yield Case("GGUF", f"{kind}, logits", "logits", model=f"{kind}.gguf")
    yield Case("GGUF", "the tokenizer in the file, text", "ids", model="F32.gguf", tokenizer="", data="rough", rows=48)
    yield Case(
        "GGUF", "the tokenizer in the file, conversations", "ids", model="F32.gguf", tokenizer="", data="chat", rows=48
    )


def all_cases() -> list[Case]:
    """Every case, in the order of the page."""
    made = (
        _losses,
        _data,
        _trajectories,
        _schedules,
        _optimizers,
        _truncation,
        _references,
        _kl,
        _models,
        _lora,
        _exports,
        _ggufs,
    )
    cases = [case for make in made for case in make()]
    names = [(case.area, case.name) for case in cases]
    assert len(set(names)) == len(names), "two cases have one name"
    return cases
