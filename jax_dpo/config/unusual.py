"""Values that run, and of which a user is warned: outside the ranges known to work, or without effect beside the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_dpo.config import kl_rules
from jax_dpo.config.rules import WITH_OPTIONAL_SMOOTHING, WITH_SMOOTHING
from jax_dpo.errors import named

# Known to work, for AdamW: (range of the learning rate, what is usual). An adapter starts from nothing and takes more.
FULL_RATES = ((1e-7, 5e-6), "5e-7 to 1e-6")
ADAPTER_RATES = ((1e-6, 2e-4), "1e-5, for a small model 1e-4")
BETAS = (0.05, 0.3)
LEAST_PAIRS = 4
# Losses of a mean log-ratio per token, which take betas of another size, and the one that reads none.
_WITH_OTHER_BETAS = {"ipo", "sigmoid_norm", "sft"}

# What only train_sampling_strategy curriculum reads, with its defaults.
_OF_CURRICULUM = (
    ("curriculum_by", "score"),
    ("curriculum_reward_model", None),
    ("curriculum_buckets", 10),
    ("curriculum_later_epochs", "random"),
)
# What only sync_ref_model reads, with its defaults.
_OF_SYNC = (("ref_model_mixup_alpha", 0.6), ("ref_model_sync_steps", 512))
# Which of the adam_ options an optimizer reads, and their defaults.
_ADAM_READ = {
    "adamw_torch_fused": ("adam_beta1", "adam_beta2", "adam_epsilon"),
    "adamw_torch": ("adam_beta1", "adam_beta2", "adam_epsilon"),
    "lion_32bit": ("adam_beta1", "adam_beta2"),
}
_ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def warnings_of(values: Mapping[str, Any], *, adapter: bool, data_parallel: int) -> list[str]:
    """Sentences on values that are outside the ranges known to work, or that have no effect beside the others."""
    return [
        *_unusual(values, adapter, data_parallel),
        *_unusual_losses(values),
        *_without_effect(values),
        *kl_rules.without_effect(values),
        *_prompts_fill(values),
    ]


def _rate_out_of_range(values: Mapping[str, Any], adapter: bool) -> list[str]:
    rate = values["learning_rate"]
    if rate == 0:
        return [named("learning-rate-zero", "learning_rate 0: nothing will be learned")]
    if not values["optim"].startswith("adamw"):  # the ranges are those of AdamW
        return []
    (low, high), usual = ADAPTER_RATES if adapter else FULL_RATES
    if low <= rate <= high:
        return []
    what = "an adapter (LoRA)" if adapter else "full training"
    known = f"{low:g} to {high:g}".replace("e-0", "e-")
    return [
        named(
            "learning-rate-range",
            f"learning_rate {rate:g} is outside {known}, the range known to work for {what}; usual is {usual}",
        )
    ]


def _beta_out_of_range(beta: float, losses: list[str]) -> list[str]:
    low, high = BETAS
    if low <= beta <= high or set(losses) <= _WITH_OTHER_BETAS:
        return []
    return [named("beta-range", f"beta {beta:g} is outside {low:g} to {high:g}, the range known to work")]


def _unusual(values: Mapping[str, Any], adapter: bool, data_parallel: int) -> list[str]:
    found = []
    found += [*_rate_out_of_range(values, adapter), *_beta_out_of_range(values["beta"], values["loss_type"])]
    pairs = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * data_parallel
    if pairs < LEAST_PAIRS:
        found.append(
            named(
                "few-pairs-a-step",
                f"{pairs} pair{'s' * (pairs > 1)} a step is few: 4 to 8 for experiments, 16 to 32 is the standard, 64 and more "
                "for production",
            )
        )
    if values["max_steps"] == 0:
        found.append(named("max-steps-zero", "max_steps 0 is taken as -1: num_train_epochs decides"))
    if values["adam_epsilon"] == 0:
        found.append(named("adam-epsilon-zero", "adam_epsilon 0 divides by 0 where a gradient is 0"))
    elif values["adam_epsilon"] > 1e-3:
        found.append(
            named(
                "adam-epsilon-large",
                f"adam_epsilon {values['adam_epsilon']:g} is large: AdamW turns into plain gradient descent",
            )
        )
    if values["max_grad_norm"] == 0 or values["max_grad_norm"] > 100:
        found.append(named("no-clipping", f"max_grad_norm {values['max_grad_norm']:g} does not clip"))
    if values["save_strategy"] == "no":
        found.append(
            named(
                "nothing-saved",
                "save_strategy no: a run that is interrupted starts over, and rollback can only go back to the start",
            )
        )
    return found


def _unusual_losses(values: Mapping[str, Any]) -> list[str]:
    found = []
    if values["ld_alpha"] is not None and values["ld_alpha"] > 1:
        found.append(
            named(
                "ld-alpha-large",
                f"ld_alpha {values['ld_alpha']:g} weighs the longer answer's tail more than the shared length",
            )
        )
    if values["beta_dpo_alpha"] > 2:
        found.append(
            named("beta-dpo-alpha-large", f"beta_dpo_alpha {values['beta_dpo_alpha']:g} is large: 0.6 is the paper's")
        )
    if values["f_divergence_type"] == "alpha_divergence" and values["f_alpha_divergence_coef"] == 1:
        found.append(
            named(
                "alpha-is-reverse-kl",
                "f_alpha_divergence_coef 1 makes alpha_divergence the same as reverse_kl; TRL before 0.29 had another form, "
                "whose coefficient is 1 minus this one",
            )
        )
    if values["sync_ref_model"]:
        found.append(
            named(
                "sync-ref-model-compares",
                "sync_ref_model: margins, losses and KL of two evaluations are against two references where it moved between "
                "them, so the best checkpoint is the best against its own",
            )
        )
    if values["target_kl"] > 1:
        found.append(
            named(
                "target-kl-large",
                f"target_kl {values['target_kl']:g} nats per token is far from the reference: 0.1 is the standard",
            )
        )
    return found


def _smoothing_without_effect(smoothing: float, sigmoid_too: bool | None, losses: list[str]) -> list[str]:
    likelihoods = [loss for loss in losses if loss in WITH_OPTIONAL_SMOOTHING]
    if sigmoid_too and (smoothing == 0 or not likelihoods):
        why = "label_smoothing is 0" if likelihoods else f"loss_type is {', '.join(losses)}"
        return [named("option-without-effect", f"sigmoid_label_smoothing true has no effect: {why}")]
    if smoothing == 0 or sigmoid_too:
        return []
    if likelihoods and sigmoid_too is None:
        return [
            named(
                "label-smoothing-unread",
                f"label_smoothing {smoothing:g} is not read by loss_type {', '.join(likelihoods)}, as in TRL 1.16 (before 0.29 "
                "it was cDPO); write sigmoid_label_smoothing: true for cDPO, or false for TRL's number without this warning",
            )
        ]
    if not likelihoods and not WITH_SMOOTHING & set(losses):
        return [
            named(
                "option-without-effect",
                f"label_smoothing {smoothing:g} has no effect with loss_type {', '.join(losses)}; robust reads it",
            )
        ]
    return []


def _without_effect(values: Mapping[str, Any]) -> list[str]:
    found = []
    losses = values["loss_type"]
    if values["beta_dpo_momentum"] != 0.9 and values["beta_dpo_alpha"] == 0:
        found.append(named("option-without-effect", "beta_dpo_momentum has no effect: beta_dpo_alpha is 0"))
    found += _smoothing_without_effect(values["label_smoothing"], values["sigmoid_label_smoothing"], losses)
    ordered = values["train_sampling_strategy"] == "curriculum"
    beforehand = values["precompute_ref_log_probs"] or (ordered and values["curriculum_by"] == "reference")
    if values["precompute_ref_batch_size"] is not None and not beforehand:
        found.append(
            named(
                "option-without-effect", "precompute_ref_batch_size can do nothing: precompute_ref_log_probs is false"
            )
        )
    unordered = [name for name, usual in _OF_CURRICULUM if values[name] != usual]
    if ordered and values["curriculum_reward_model"] is not None and values["curriculum_by"] != "reward_model":
        found.append(
            named(
                "option-without-effect",
                f"curriculum_reward_model can do nothing: curriculum_by is {values['curriculum_by']}",
            )
        )
    if unordered and not ordered:
        found.append(
            named(
                "option-without-effect",
                f"{' and '.join(unordered)} can do nothing: train_sampling_strategy is {values['train_sampling_strategy']}, not curriculum",
            )
        )
    if values["eval_on_policy_tokens"] != 128 and not values["eval_on_policy_prompts"]:
        found.append(
            named("option-without-effect", "eval_on_policy_tokens can do nothing: eval_on_policy_prompts is 0")
        )
    moving = [name for name, usual in _OF_SYNC if values[name] != usual]
    if moving and not values["sync_ref_model"]:
        found.append(
            named(
                "option-without-effect",
                f"{' and '.join(moving)} can do nothing: sync_ref_model is false, so the reference stays as it is",
            )
        )
    unread = [
        name
        for name, default in _ADAM_DEFAULTS.items()
        if values[name] != default and name not in _ADAM_READ.get(values["optim"], ())
    ]
    if unread:
        found.append(
            named(
                "option-without-effect",
                f"{' and '.join(unread)} without effect: optim {values['optim']} does not read it, as in transformers",
            )
        )
    if (values["optim_args"] or {}).get("dampening") and not values["optim_args"].get("momentum"):
        found.append(named("option-without-effect", "optim_args dampening has no effect without momentum, as in torch"))
    return found


def _prompts_fill(values: Mapping[str, Any]) -> list[str]:
    found = []
    if values["max_length"] and values["max_prompt_length"] and values["max_prompt_length"] >= values["max_length"]:
        found.append(
            named(
                "prompt-fills-max-length",
                f"max_prompt_length {values['max_prompt_length']} is not below max_length {values['max_length']}: "
                "a prompt that fills it leaves no room for an answer",
            )
        )
    return found
