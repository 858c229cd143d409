"""The options that transformers' training arguments have: of the run, its steps, optimizer, evaluations, checkpoints and log.

DPOConfig stands on them. Names, meanings and defaults are those of TRL 1.16 and transformers 5.24.
"""

# ruff: noqa: RUF009 (`option` makes a dataclass field)
from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from jax_dpo.config.fields import (
    above,
    at_least,
    count_or,
    option,
    steps_or_share,
    within,
)
from jax_dpo.config.rules import OPTIMIZERS, SCHEDULERS


@dataclass(frozen=True)
class TrainingOptions:
    """What any training run is told; the groups are those of the help."""

    output_dir: str = option("trainer_output", "Directory that everything is written to.", group="Run")
    _: KW_ONLY
    overwrite_output_dir: bool = option(False, "Delete the run that output_dir holds and start over.", group="Run")
    resume_from_checkpoint: bool | str | None = option(
        None,
        "What to do with the run in output_dir: true goes on from its newest checkpoint, a path from that checkpoint, auto goes on "
        "where there is an unfinished run of the same options and else starts; unset refuses a directory that holds a run.",
        group="Run",
    )
    run_name: str | None = option(None, "Name of the run in reports.", group="Run")
    seed: int = option(42, "Seed of everything random.", group="Run", check=within(0, 2**32 - 1))
    data_seed: int | None = option(
        None, "Seed of the order of the pairs; unset, that is seed.", group="Run", check=within(0, 2**32 - 1)
    )

    num_train_epochs: float = option(
        3.0, "Times that the data are gone through; max_steps wins over it.", group="Steps and batches", check=above(0)
    )
    max_steps: int = option(
        -1,
        "Number of optimizer steps; -1: as many as num_train_epochs needs.",
        group="Steps and batches",
        check=count_or(-1, 0),
    )
    per_device_train_batch_size: int = option(
        8, "Pairs of a micro-batch on one device.", group="Steps and batches", check=at_least(1)
    )
    per_device_eval_batch_size: int = option(
        8, "Pairs of an evaluation batch on one device.", group="Steps and batches", check=at_least(1)
    )
    gradient_accumulation_steps: int = option(
        1,
        "Micro-batches of one optimizer step. A step takes per_device_train_batch_size * gradient_accumulation_steps * data-parallel "
        "devices pairs.",
        group="Steps and batches",
        check=at_least(1),
    )
    train_sampling_strategy: str = option(
        "random",
        "Order of the pairs: random (new in each epoch, TRL's order for the same seed), sequential (the file's own order) or curriculum "
        "(easy to hard: pairs with a wide gap first, see the options of the curriculum).",
        group="Steps and batches",
        choices=("random", "sequential", "curriculum"),
    )
    curriculum_by: str = option(
        "score",
        "Where the gap of a pair comes from: score (chosen's score minus rejected's, from the columns that drop_rows small_gap reads), "
        "reward_model (the same, from curriculum_reward_model) or reference (log ref(chosen) - log ref(rejected)). What must be computed "
        "is made before the training and kept for later runs.",
        group="Curriculum",
        choices=("score", "reward_model", "reference"),
    )
    curriculum_reward_model: str | None = option(
        None,
        "Directory or Hub name of the reward model of curriculum_by reward_model: a sequence classifier with one label, of a family that "
        "can be trained, with its tokenizer. In Python DPOTrainer(reward_model=...) takes a function instead.",
        group="Curriculum",
    )
    curriculum_buckets: int = option(
        10,
        "Equal parts that the pairs are cut into by their gap; inside each the order is random. 1 is random order, as many as there are "
        "pairs is the order of the gaps alone.",
        group="Curriculum",
        check=at_least(1),
    )
    curriculum_later_epochs: str = option(
        "random",
        "Order of the epochs after the first: random, or the curriculum once more, shuffled anew inside the buckets.",
        group="Curriculum",
        choices=("random", "curriculum"),
    )

    dataloader_drop_last: bool = option(
        False,
        "Leave out the pairs at the end of an epoch that fill no whole micro-batch on every device; held-out pairs are all evaluated.",
        group="Steps and batches",
    )

    learning_rate: float = option(
        1e-6, "Peak learning rate. Around 1e-5 for LoRA.", group="Optimizer", check=at_least(0)
    )
    lr_scheduler_type: str = option(
        "linear", "How the rate falls after the warm-up.", group="Optimizer", choices=SCHEDULERS
    )
    lr_scheduler_kwargs: dict[str, Any] | None = option(
        None, "Options of the schedule, as JSON: '{\"min_lr_rate\": 0.1}' for cosine_with_min_lr.", group="Optimizer"
    )
    warmup_steps: int | float = option(
        0,
        "Steps in which the rate rises from 0; below 1, the share of all steps.",
        group="Optimizer",
        check=steps_or_share(zero=True),
    )
    optim: str = option(
        "adamw_torch_fused",
        "Optimizer: AdamW by torch's formula (both names mean it), Adafactor with factored second moments as transformers runs it, "
        "Lion, or torch's SGD.",
        group="Optimizer",
        choices=OPTIMIZERS,
    )
    optim_args: dict[str, Any] | None = option(
        None,
        'Options of the optimizer, as "momentum=0.9,nesterov=true" or JSON: momentum, dampening and nesterov of sgd.',
        group="Optimizer",
    )
    weight_decay: float = option(
        0.0,
        "Decay of the weights; biases and norm weights are not decayed. Apart from the gradient, but for sgd, as in torch.",
        group="Optimizer",
        check=at_least(0),
    )
    adam_beta1: float = option(
        0.9, "First moment's decay (AdamW, Lion).", group="Optimizer", check=within(0, 1, open_high=True)
    )
    adam_beta2: float = option(
        0.999,
        "Second moment's decay (AdamW); Lion's momentum's.",
        group="Optimizer",
        check=within(0, 1, open_high=True),
    )
    adam_epsilon: float = option(
        1e-8, "Added to the root of the second moment (AdamW).", group="Optimizer", check=at_least(0)
    )
    max_grad_norm: float = option(
        1.0, "Gradients are scaled down to this norm; 0 does not clip.", group="Optimizer", check=at_least(0)
    )
    nonfinite_steps: str = option(
        "stop",
        "What a step does whose loss or gradient is not finite: stop ends the run; skip leaves weights and optimizer as they were, and "
        "ends the run after 10 in a row. The rows are named either way.",
        group="Optimizer",
        choices=("stop", "skip"),
    )

    bf16: bool | None = option(
        None,
        "Compute in bfloat16 with float32 weights; false is float32 throughout; unset, bfloat16 on a TPU or GPU and float32 on a CPU.",
        group="Precision and memory",
    )
    fp16: bool = option(False, "Not supported: write bf16.", group="Precision and memory")
    gradient_checkpointing: bool = option(
        True, "Recompute each layer in the backward pass: less memory, a third more time.", group="Precision and memory"
    )
    micro_batch_tokens: int | None = option(
        None,
        "Most tokens that one device works on at a time; unset, those of per_device_train_batch_size pairs. Lowers memory and changes "
        "no result.",
        group="Precision and memory",
        check=at_least(1),
    )
    packing: bool = option(
        True,
        "Several pairs may share a row; false gives each pair a row of its own, padded to the longest. Changes no result.",
        group="Precision and memory",
    )
    kernels: str = option(
        "auto",
        "Which code computes attention and log-probabilities: auto, the fastest for the device; reference, the plain formulas, slow and "
        "large in memory, to compare with.",
        group="Precision and memory",
        choices=("auto", "reference"),
    )
    share_prompt: bool = option(
        True,
        "Compute the prompt of a pair once for both answers; false gives each answer its own copy.",
        group="Precision and memory",
    )

    eval_strategy: str = option(
        "no", "When held-out pairs are evaluated.", group="Evaluation", choices=("no", "steps", "epoch")
    )
    eval_steps: int | float | None = option(
        None,
        "Steps between evaluations; below 1, the share of all steps; unset, logging_steps.",
        group="Evaluation",
        check=steps_or_share(),
    )
    eval_weighting: str = option(
        "pairs",
        "What evaluation metrics are means of: pairs, every pair (and token) once; batches, TRL's means of the means of evaluation "
        "batches, in which a short last batch weighs as much as a full one.",
        group="Evaluation",
        choices=("pairs", "batches"),
    )
    eval_delay: float = option(
        0,
        "Steps (with eval_strategy epoch, epochs) before which nothing is evaluated; the end always is.",
        group="Evaluation",
        check=at_least(0),
    )
    eval_on_start: bool = option(False, "Evaluate before the first step too.", group="Evaluation")
    eval_on_policy_prompts: int = option(
        0,
        "Number of prompts of each evaluation set that the policy answers at every evaluation, sampled from its own distribution, to "
        "measure the exact KL along its own answers: eval_kl_on_policy. Where a set has fewer, they are answered several times. The "
        "weights are whole on each device meanwhile.",
        group="Evaluation",
        check=at_least(0),
    )
    eval_on_policy_tokens: int = option(
        128, "Most tokens of an answer that eval_on_policy_prompts samples.", group="Evaluation", check=at_least(1)
    )
    generate_samples: int = option(
        0,
        "Number of held-out prompts that the reference and the policy answer at the end, side by side.",
        group="Evaluation",
        check=at_least(0),
    )

    save_strategy: str = option(
        "steps",
        "When a checkpoint is saved; best: after each evaluation that is better than all before it (see metric_for_best_model), so that "
        "with save_total_limit 1 the best one alone is kept. A run that is killed then goes on from there.",
        group="Checkpoints",
        choices=("no", "steps", "epoch", "best"),
    )
    save_steps: int | float = option(
        500, "Steps between checkpoints; below 1, the share of all steps.", group="Checkpoints", check=steps_or_share()
    )
    save_total_limit: int | None = option(
        None, "Most checkpoints that are kept; the best one always is.", group="Checkpoints", check=at_least(1)
    )
    metric_for_best_model: str | None = option(
        None,
        "Metric that ranks checkpoints, such as loss or rewards/accuracies; unset, the reward margin of those whose KL is within "
        "target_kl.",
        group="Checkpoints",
    )
    greater_is_better: bool | None = option(
        None, "Whether a larger metric is better; unset, so unless its name ends in loss.", group="Checkpoints"
    )
    load_best_model_at_end: bool = option(
        False, "Go back to the best checkpoint when the training ends.", group="Checkpoints"
    )

    logging_strategy: str = option(
        "steps", "When a log line is written.", group="Logging", choices=("no", "steps", "epoch")
    )
    logging_steps: int | float = option(
        10, "Steps between log lines; below 1, the share of all steps.", group="Logging", check=steps_or_share()
    )
    logging_first_step: bool = option(False, "Log the first step too.", group="Logging")
    report_to: str | list[str] = option(
        "none",
        "Where curves are written beside run.jsonl; all is each that is installed.",
        group="Logging",
        choices=("none", "tensorboard", "wandb", "all"),
    )
    project: str = option(
        "huggingface", "Project that wandb shows the run in; WANDB_PROJECT wins over it.", group="Logging"
    )
    disable_tqdm: bool | None = option(
        None, "No live line on the terminal; unset, there is one where lines can be redrawn.", group="Logging"
    )
