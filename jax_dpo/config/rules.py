"""Which values exist, and which exclude each other.

Facts about losses and schedules are those of TRL 1.16 and transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax_dpo.config import kl_rules
from jax_dpo.config.fields import Problem, nearest, show

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
PAIR_COLUMNS = ("beta", "margin", "label", "weight")
DATA_FORMATS = ("auto", "trl", "sharegpt", "repeated_prompt", "transcript")
SYSTEM_TURNS = ("as_given", "merged")
COMPLETION_TURNS = ("all", "assistant", "last")
OVERLONG = ("cut", "drop")
DROP_REASONS = ("invalid", "empty", "identical", "torn", "duplicate", "small_gap")

# Losses whose scores go through the f-divergence; the others take the plain log-ratios.
_WITH_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
# Losses that read label_smoothing.
WITH_OPTIONAL_SMOOTHING = ("sigmoid", "sigmoid_norm")
WITH_SMOOTHING = {"robust", "exo_pair", "aot", "aot_unpaired"}

# What lr_scheduler_kwargs may hold for each schedule.
_SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "polynomial": ("lr_end", "power"),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
SCHEDULERS = tuple(_SCHEDULER_KWARGS)
_RAMPS = ("linear", "cosine", "1-sqrt")
_MAY_BE_UNSET = ("timescale", "warmup_lr_rate")

# What optim_args may hold for each optimizer.
_OPTIM_ARGS: dict[str, tuple[str, ...]] = {
    "adamw_torch_fused": (),
    "adamw_torch": (),
    "adafactor": (),
    "lion_32bit": (),
    "sgd": ("momentum", "dampening", "nesterov"),
}
OPTIMIZERS = tuple(_OPTIM_ARGS)


@dataclass(frozen=True)
class Rule:
    """Something that must hold between options: `wrong` gets their values and says what is wrong, or None.

    The first of `options` is the one that the message is about. A rule is left out where one of its options is faulty by itself.
    """

    options: tuple[str, ...]
    wrong: Callable[..., str | None]


def _loss_weights(weights: list[float] | None, losses: list[str]) -> str | None:
    if weights is None or len(weights) == len(losses):
        return None
    return f"found {len(weights)} weights for {len(losses)} losses ({', '.join(losses)}), expected one for each"


def _some_loss(losses: list[str]) -> str | None:
    return None if losses else "found an empty list, expected at least one loss, such as sigmoid"


def _smoothing(smoothing: float, losses: list[str], sigmoid_too: bool | None) -> str | None:
    if "robust" in losses and smoothing >= 0.5:
        return f"found {show(smoothing)}, expected less than 0.5 for loss_type robust, which divides by 1 - 2 * label_smoothing"
    if sigmoid_too and smoothing >= 0.5 and {*WITH_OPTIONAL_SMOOTHING} & set(losses):
        return f"found {show(smoothing)}, expected less than 0.5 with sigmoid_label_smoothing: from there on rejected is preferred"
    if "exo_pair" in losses and smoothing == 0:
        return "found 0.0, expected more than 0 for loss_type exo_pair, which takes its logarithm; its paper has 0.001"
    return None


def _divergence(kind: str, losses: list[str]) -> str | None:
    plain = [loss for loss in losses if loss not in _WITH_DIVERGENCE]
    if kind == "reverse_kl" or not plain:
        return None
    return f"found {show(kind)}, expected reverse_kl with loss_type {', '.join(plain)}, which takes no other divergence"


def _pair_columns(columns: list[str], losses: list[str], smoothing: float, sigmoid_too: bool | None) -> str | None:
    # sft is no preference: margin and label have nothing to say there.
    for column, takes in (("margin", (*WITH_OPTIONAL_SMOOTHING, "hinge")), ("label", WITH_OPTIONAL_SMOOTHING)):
        without = [loss for loss in losses if loss not in takes]
        if column in columns and (set(without) - {"sft"} or without == losses):
            return f"found {column}, which loss_type {', '.join(without)} does not take; {', '.join(takes)} do"
    sorting = [loss for loss in losses if loss in ("aot", "aot_unpaired")]
    for column in ("beta", "weight"):
        if column in columns and sorting:
            return f"found {column}, which loss_type {', '.join(sorting)} does not take: it is no value of single pairs"
    if "label" in columns and sigmoid_too and smoothing > 0:
        return "found label beside sigmoid_label_smoothing: both say how sure the labels are; leave one of them out"
    return kl_rules.no_repeats(columns)


def _weighting(on: bool, losses: list[str]) -> str | None:
    without = [loss for loss in losses if loss in ("sft", "aot", "aot_unpaired")]
    if not on or not without:
        return None
    return f"found true, expected false with loss_type {', '.join(without)}, which is no value of single pairs"


def _scheduler_kwargs(kwargs: dict[str, Any] | None, scheduler: str, rate: float) -> str | None:
    given, known = kwargs or {}, _SCHEDULER_KWARGS[scheduler]
    for key, value in given.items():
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            close = nearest(key, known, n=1)
            return f"found {key}, but {scheduler} {takes}" + (f"; did you mean {close[0]}?" if close else "")
        if key in ("warmup_type", "decay_type"):
            if value not in _RAMPS:
                return f"{key}: found {show(value)}, expected one of {', '.join(_RAMPS)}"
        elif not _counts(value) and (value is not None or key not in _MAY_BE_UNSET):
            return f"{key}: found {show(value)}, expected a number of at least 0"
    if scheduler.endswith("with_min_lr") and ("min_lr" in given) == ("min_lr_rate" in given):
        return f"found {show(given)}, expected either min_lr or min_lr_rate for {scheduler}"
    if scheduler == "warmup_stable_decay" and "num_decay_steps" not in given:
        return f"found {show(given)}, expected num_decay_steps for warmup_stable_decay"
    if scheduler == "polynomial" and given.get("lr_end", 1e-7) >= rate:
        return f"lr_end: {show(given.get('lr_end', 1e-7))} is not below learning_rate {show(rate)}"
    return None


def _optim_args(given: dict[str, Any] | None, optimizer: str) -> str | None:
    given, known = given or {}, _OPTIM_ARGS[optimizer]
    for key, value in given.items():
        if key == "weight_decay":
            return f"found {key}, which transformers overrides by the option weight_decay; write weight_decay: {show(value)}"
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none (transformers ignores them)"
            close = nearest(key, known, n=1)
            return f"found {key}, but optim {optimizer} {takes}" + (f"; did you mean {close[0]}?" if close else "")
        if key == "nesterov" and not isinstance(value, bool):
            return f"nesterov: found {show(value)}, expected true or false"
        if key != "nesterov" and not _counts(value):
            return f"{key}: found {show(value)}, expected a number of at least 0"
    if given.get("nesterov") and (not given.get("momentum") or given.get("dampening")):
        return "nesterov needs a momentum above 0 and no dampening"
    return None


def _counts(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _best_at_end(
    load: bool, evaluate: str, save: str, eval_steps: float | None, save_steps: float, logging_steps: float
) -> str | None:
    if not load:
        return None
    if save == "best":
        return None
    if evaluate != save or save == "no":
        return f"needs eval_strategy and save_strategy to be the same and not no; found {evaluate} and {save}"
    every = eval_steps or logging_steps
    if save != "steps":
        return None
    ratio = save_steps / every
    if (save_steps < 1) != (every < 1) or abs(ratio - round(ratio)) > 1e-6 or ratio < 1:
        return f"needs save_steps to be a multiple of eval_steps; found {show(save_steps)} and {show(every)}"
    return None


def _save_best(save: str, evaluate: str) -> str | None:
    if save == "best" and evaluate == "no":
        return "found best, which needs evaluations to compare: set eval_strategy to steps or epoch"
    return None


def _ref_columns(columns: bool, precompute: bool, curriculum_by: str) -> str | None:
    if columns and not precompute and curriculum_by != "reference":
        return "found true without precompute_ref_log_probs; set that to true as well"
    return None


def _reporters(targets: str | list[str]) -> str | None:
    return "found none beside others" if isinstance(targets, list) and "none" in targets else None


def _mesh(data: int, fsdp: int, tensor: int) -> str | None:
    free = [size for size in (data, fsdp, tensor) if size == -1]
    return (
        None
        if len(free) <= 1
        else "only one of mesh_data, mesh_fsdp and mesh_tensor can be -1 (all devices that are left)"
    )


def _processes(address: str | None, count: int | None, number: int | None) -> str | None:
    given = [value is not None for value in (address, count, number)]
    if not any(given):
        return None
    if not all(given):
        return "coordinator_address, num_processes and process_id go together; set all three or none"
    assert address is not None and count is not None and number is not None
    if not address.rpartition(":")[2].isdecimal() or not address.rpartition(":")[0]:
        return f"found {show(address)}, expected ADDRESS:PORT, such as 10.0.0.1:8476"
    if number >= count:
        return f"process_id {number} is not below num_processes {count}"
    return None


_RULES = (
    Rule(("loss_type",), _some_loss),
    Rule(("loss_weights", "loss_type"), _loss_weights),
    Rule(("label_smoothing", "loss_type", "sigmoid_label_smoothing"), _smoothing),
    Rule(("f_divergence_type", "loss_type"), _divergence),
    Rule(("use_weighting", "loss_type"), _weighting),
    Rule(("pair_columns", "loss_type", "label_smoothing", "sigmoid_label_smoothing"), _pair_columns),
    Rule(("lr_scheduler_kwargs", "lr_scheduler_type", "learning_rate"), _scheduler_kwargs),
    Rule(("optim_args", "optim"), _optim_args),
    Rule(
        ("load_best_model_at_end", "eval_strategy", "save_strategy", "eval_steps", "save_steps", "logging_steps"),
        _best_at_end,
    ),
    Rule(("precompute_ref_log_probs", "sync_ref_model", "kl_coef", "kl_controller"), kl_rules.precomputed),
    Rule(("kl_actions",), kl_rules.no_repeats),
    Rule(("save_strategy", "eval_strategy"), _save_best),
    Rule(("ref_log_probs_columns", "precompute_ref_log_probs", "curriculum_by"), _ref_columns),
    Rule(("kl_judged_on", "precompute_ref_log_probs"), kl_rules.judged_on),
    Rule(("kl_patience",), partial(kl_rules.per_action, least=1)),
    Rule(("kl_cooldown",), partial(kl_rules.per_action, least=0)),
    Rule(("kl_most_actions",), partial(kl_rules.per_action, least=1)),
    Rule(("kl_trust_region", "eval_strategy", "precompute_ref_log_probs"), kl_rules.trust_region),
    Rule(("adaptive_beta", "kl_controller"), kl_rules.controller),
    Rule(("kl_controller", "kl_actions"), kl_rules.beta_turned_twice),
    Rule(("pi_beta_gains",), kl_rules.gains),
    Rule(("mesh_fsdp", "mesh_data", "mesh_tensor"), lambda fsdp, data, tensor: _mesh(data, fsdp, tensor)),
    Rule(("coordinator_address", "num_processes", "process_id"), _processes),
    Rule(("report_to",), _reporters),
    Rule(("output_dir",), lambda path: None if path.strip() else "found an empty text, expected a directory"),
)


def problems_between(values: Mapping[str, Any]) -> list[Problem]:
    """What is wrong between options. `values` holds the options that are right by themselves."""
    found = []
    for rule in _RULES:
        if all(name in values for name in rule.options):
            text = rule.wrong(*(values[name] for name in rule.options))
            if text is not None:
                found.append(Problem(rule.options[0], text))
    return found
