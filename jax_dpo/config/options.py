"""DPOConfig: every option of a training run, flat, under TRL's names and with TRL 1.16's defaults.

What only jax_dpo has is off by default, or only watches, so that a ported script gives the same numbers.
"""

# ruff: noqa: RUF009 (`option` makes a dataclass field)
from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from jax_dpo.config.advice import ADVICE, PYTHON_ADVICE, VALUE_ADVICE
from jax_dpo.config.chat import ChatOptions
from jax_dpo.config.fields import (
    Advice,
    Check,
    Problem,
    SameAs,
    above,
    at_least,
    count_or,
    default_of,
    option,
    read,
    sort_out,
    validated,
    within,
)
from jax_dpo.config.kl_rules import KL_ACTIONS, KL_CONTROLLERS, KL_JUDGED_ON
from jax_dpo.config.rules import (
    COMPLETION_TURNS,
    DATA_FORMATS,
    DROP_REASONS,
    F_DIVERGENCES,
    LOSS_TYPES,
    OVERLONG,
    PAIR_COLUMNS,
    SYSTEM_TURNS,
    problems_between,
)
from jax_dpo.config.unusual import warnings_of

_MULTIPLE = Check("a whole number of at least 1, auto or null", lambda value: value == "auto" or _is_count(value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def check_config(cls: type, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """(value of every option, everything that is wrong with what was given)."""
    known = [item.name for item in dataclasses.fields(cls)]
    options, unknown = sort_out(given, known, ADVICE | PYTHON_ADVICE)
    values, problems = check_values(cls, options)
    return values, unknown + problems


def check_values(cls: type, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """As `check_config`, for names that are all known: each value by itself, then the values together."""
    values, problems = read(cls, {name: _pairs_of(name, value) for name, value in given.items()}, VALUE_ADVICE)
    if values.get("resume_from_checkpoint") is False:
        values["resume_from_checkpoint"] = None
    if isinstance(values.get("report_to"), list) and set(values["report_to"]) <= {"none"}:
        values["report_to"] = "none"
    return values, problems + problems_between(values)


def _pairs_of(name: str, value: Any) -> Any:
    """transformers' spelling of optim_args, "momentum=0.9,nesterov=true", as the mapping that it stands for."""
    if name != "optim_args" or not isinstance(value, str) or "=" not in value or value.lstrip().startswith("{"):
        return value
    parts = [part.partition("=") for part in value.replace(" ", "").split(",") if part]
    return {key: _scalar(text) for key, _, text in parts}


def _scalar(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


@validated(check_config)
@dataclass(frozen=True)
class DPOConfig(ChatOptions):
    """The options of a run. Names, meanings and defaults are those of TRL 1.16's DPOConfig; the last two groups are jax_dpo's own.

    Raises one `UserError` that names every option that cannot be used: unknown names (with the nearest, or with what to write
    instead), values of the wrong type, values that cannot be, options that exclude each other. Values that are only unusual are
    listed by `warnings`.
    """

    _: KW_ONLY
    max_length: int | None = option(
        1024, "Most tokens of prompt and one answer; null does not cut.", group="Data", check=at_least(1)
    )
    max_prompt_length: int | None = option(
        None,
        "Most tokens of a prompt; a longer one loses its beginning. Unset, prompts are not cut.",
        group="Data",
        check=at_least(1),
    )
    truncation_mode: str = option(
        "keep_start",
        "What is kept of a sequence that is too long.",
        group="Data",
        choices=("keep_start", "keep_end"),
    )
    pad_to_multiple_of: int | str | None = option(
        "auto",
        "Rows are made a multiple of so many tokens long, beyond what the device wants; auto and null ask for nothing more.",
        group="Data",
        check=_MULTIPLE,
    )
    data_format: str = option(
        "auto",
        "How rows are read: auto also takes the layouts of other tools (ShareGPT, columns under other names, foreign roles, a prompt "
        "repeated in both answers) and says so; trl takes rows as TRL does; sharegpt, repeated_prompt and transcript insist on that "
        "layout.",
        group="Data",
        choices=DATA_FORMATS,
    )
    tool_arguments: str = option(
        "as_given",
        "Arguments of tool calls that are JSON text: as_given to the chat template, as TRL does, or parsed into objects.",
        group="Data",
        choices=("as_given", "parsed"),
    )
    system_turn: str = option(
        "as_given",
        "System turns: as_given to the chat template, or merged into the user's turn that follows (the text, an empty line, the "
        "user's), for templates that refuse a system turn.",
        group="Data",
        choices=SYSTEM_TURNS,
    )
    system_column: bool = option(
        False,
        "Make the text of the column `system` the system turn of each conversation that has none.",
        group="Data",
    )
    completion_turns: str = option(
        "all",
        "Which tokens of an answer of several turns are trained on: all (TRL: the user's turns too), those of the assistant's turns, or "
        "those of its last turn. Answers of one turn are the same with each.",
        group="Data",
        choices=COMPLETION_TURNS,
    )
    overlong: str = option(
        "cut",
        "Pairs of which prompt and an answer are longer than max_length: cut (TRL) or drop.",
        group="Data",
        choices=OVERLONG,
    )
    drop_rows: list[str] = option(
        ["invalid"],
        "Which faulty rows are left out; an invalid row that is not left out is an error.",
        group="Data",
        choices=DROP_REASONS,
    )
    min_score_gap: float = option(
        0.15,
        "Least difference of the two scores, where the data have them; drop_rows small_gap leaves out the rest.",
        group="Data",
        check=at_least(0),
    )
    dataset_cache_dir: str | None = option(
        None,
        "Where tokenized data and precomputed log-probabilities are kept for the next run; unset, in the user's cache directory.",
        group="Data",
    )

    loss_type: list[str] = option(["sigmoid"], "The loss, or several that are added.", group="Loss", choices=LOSS_TYPES)
    loss_weights: list[float] | None = option(None, "Weight of each loss; unset, all 1.", group="Loss")
    beta: float = option(0.1, "How strongly the policy is held to the reference.", group="Loss", check=above(0))
    label_smoothing: float = option(
        0.0,
        "Share of labels taken as wrong; read by robust, exo_pair, aot and aot_unpaired, and by sigmoid and sigmoid_norm where "
        "sigmoid_label_smoothing says so.",
        group="Loss",
        check=within(0, 1, open_high=True),
    )
    sigmoid_label_smoothing: bool | None = option(
        None,
        "Whether sigmoid and sigmoid_norm read label_smoothing: true is conservative DPO (cDPO); false and unset are TRL 1.16's number, "
        "which ignores it (unset with a warning).",
        group="Loss",
    )
    pair_columns: list[str] = option(
        [],
        "Columns of the data that are read of each pair: beta (its own beta), margin (by how much its reward should exceed), label (the "
        "probability that chosen is better), weight (how many times it counts).",
        group="Loss",
        choices=PAIR_COLUMNS,
    )
    beta_dpo_alpha: float = option(
        0.0,
        "How strongly beta follows the mean reward margin of each step's pairs (beta-DPO, whose paper has 0.6); 0 does not.",
        group="Loss",
        check=at_least(0),
    )
    beta_dpo_momentum: float = option(
        0.9,
        "Momentum of the moving average that beta-DPO measures this margin against.",
        group="Loss",
        check=within(0, 1, open_high=True),
    )
    f_divergence_type: str = option(
        "reverse_kl", "Divergence whose derivative turns a log-ratio into a score.", group="Loss", choices=F_DIVERGENCES
    )
    f_alpha_divergence_coef: float = option(0.5, "Alpha of alpha_divergence.", group="Loss")
    ld_alpha: float | None = option(
        None,
        "Weight of the tokens beyond the shorter answer's length (LD-DPO); unset, 1.",
        group="Loss",
        check=at_least(0),
    )
    use_weighting: bool = option(False, "Weigh pairs by the policy's probability of them (WPO).", group="Loss")
    discopop_tau: float = option(0.05, "Temperature of the discopop loss.", group="Loss", check=above(0))
    router_aux_loss_coef: float | None = option(
        None,
        "Weight of the loss that balances the experts of a mixture, made as TRL makes it: over both padded rows of the "
        "per_device_train_batch_size pairs that it computes together, so prompt tokens count twice. Unset, the model's own; 0 "
        "switches it off.",
        group="Loss",
        check=at_least(0),
    )
    disable_dropout: bool = option(True, "No dropout, LoRA's included.", group="Loss")

    ref_log_probs_columns: bool = option(
        False,
        "Beside precompute_ref_log_probs: take the reference's log-probabilities of the training pairs from the columns ref_chosen_logps "
        "and ref_rejected_logps (or reference_..) of the data; those of some pairs are computed, to see that they are this reference's.",
        group="Reference",
    )
    precompute_ref_log_probs: bool = option(
        False,
        "Compute the reference's log-probabilities of the training pairs before training and do without the reference in the step. They "
        "are kept for later runs with the same reference and pairs, in dataset_cache_dir or the user's cache directory. Evaluations load "
        "the reference, so that their KL stays exact; training logs kl_estimate in place of kl_divergence.",
        group="Reference",
    )
    precompute_ref_batch_size: int | None = option(
        None,
        "Pairs of a batch on one device while precompute_ref_log_probs computes; unset, per_device_train_batch_size.",
        group="Reference",
        check=at_least(1),
    )
    sync_ref_model: bool = option(
        False,
        "Move the reference toward the policy every ref_model_sync_steps (TR-DPO): reference <- ref_model_mixup_alpha * policy + "
        "(1 - ref_model_mixup_alpha) * reference. The KL, rewards and margins are against the reference as it has moved by then. Not with "
        "an adapter.",
        group="Reference",
    )
    ref_model_mixup_alpha: float = option(
        0.6, "The policy's share where sync_ref_model moves the reference.", group="Reference", check=within(0, 1)
    )
    ref_model_sync_steps: int = option(
        512, "Optimizer steps from one move of the reference to the next.", group="Reference", check=at_least(1)
    )

    target_kl: float = option(
        0.1,
        "Bound on the KL divergence of the policy from the reference, in nats per response token: watched, ranked by, judged by.",
        group="KL control",
        check=above(0),
    )
    kl_coef: float = option(
        0.0, "Weight of the exact KL as a penalty in the loss; 0 is plain DPO.", group="KL control", check=at_least(0)
    )
    kl_reduction: str = option(
        "token",
        "KL of the penalty: mean of a pair's tokens, or sum of its sequences.",
        group="KL control",
        choices=("token", "sequence"),
    )
    kl_actions: list[str] = option(
        [],
        "What is done, in this order, when the KL is over target_kl.",
        group="KL control",
        choices=KL_ACTIONS,
    )
    kl_judged_on: list[str] = option(
        ["eval"],
        "Where kl_actions and kl_controller judge the KL: eval, every evaluation; train, the mean of each kl_window train steps; or both.",
        group="KL control",
        choices=KL_JUDGED_ON,
    )
    kl_window: int = option(
        10,
        "Train steps whose mean KL is judged, where kl_judged_on names train.",
        group="KL control",
        check=at_least(1),
    )
    kl_patience: int | dict[str, int] = option(
        1,
        "Judgements in a row over target_kl that it takes before an action: a number, or one for each action as JSON: "
        '\'{"halve_lr": 1, "rollback": 3}\'.',
        group="KL control",
    )
    kl_cooldown: int | dict[str, int] = option(
        0,
        "Steps after an action in which no other is taken, so that it can take effect: a number, or one for each action as JSON.",
        group="KL control",
    )
    kl_most_actions: int | dict[str, int] | None = option(
        None,
        "How often each action may be taken: a number, or one for each action as JSON; unset, until it is at its end.",
        group="KL control",
    )
    kl_trust_region: bool = option(
        False,
        "Know the KL of some held-out pairs before each update is accepted, and scale an update back that would bring it over the bound. "
        "Costs one forward pass of the policy over these pairs a step.",
        group="KL control",
    )
    kl_probe_pairs: int = option(
        16,
        "Held-out pairs that kl_trust_region measures at every step; they are spread over the lengths of all.",
        group="KL control",
        check=at_least(1),
    )
    kl_controller: str = option(
        "none",
        "What follows the KL wherever it is judged: adaptive_beta (beta in fixed shares, aims at half of target_kl to target_kl), "
        "pi_beta (proportional-integral on log beta) or dual_kl_coef (kl_coef as the multiplier of the constraint); the last two aim "
        "at 0.9 of target_kl and never go under the configured value.",
        group="KL control",
        choices=KL_CONTROLLERS,
    )
    adaptive_beta: bool = option(False, "Short for kl_controller: adaptive_beta.", group="KL control")
    adaptive_beta_rate: float = option(
        0.1,
        "Share by which adaptive_beta changes beta.",
        group="KL control",
        check=within(0, 1, open_low=True, open_high=True),
    )
    pi_beta_gains: list[float] = option(
        [1.0, 0.3], "Proportional and integral gain of pi_beta, in log beta per log KL.", group="KL control"
    )
    dual_kl_rate: float = option(
        1.0,
        "How far dual_kl_coef raises kl_coef for a KL of twice its aim. The penalty of kl_reduction token is small: hundreds there.",
        group="KL control",
        check=above(0),
    )

    mesh_data: int = option(
        1, "Replicas of the model, across slices; -1: all devices that are left.", group="Devices", check=count_or(-1)
    )
    mesh_fsdp: int = option(
        -1,
        "Devices that share parameters, gradients and optimizer state; -1: all that are left.",
        group="Devices",
        check=count_or(-1),
    )
    mesh_tensor: int = option(
        1, "Devices that share each matrix product; -1: all devices that are left.", group="Devices", check=count_or(-1)
    )
    compile_cache_dir: str | None = option(
        None,
        "Where compiled programs are kept for the next run; unset, in the user's cache directory.",
        group="Devices",
    )
    coordinator_address: str | None = option(
        None, "Address and port of process 0, where no cluster is recognised.", group="Devices"
    )
    num_processes: int | None = option(None, "Number of processes of the run.", group="Devices", check=at_least(1))
    process_id: int | None = option(None, "Number of this process, from 0.", group="Devices", check=at_least(0))

    def validate(self) -> None:
        """Raises the `UserError` that making the object would raise. A made object has passed it already."""
        type(self)(**self.to_dict())

    def warnings(self, *, adapter: bool = False, data_parallel: int = 1) -> list[str]:
        """Sentences on values that are unusual; the run goes on with them.

        `adapter`: LoRA is trained, whose learning rates are higher. `data_parallel`: devices that take pairs of their own.
        """
        return warnings_of(self.to_dict(), adapter=adapter, data_parallel=data_parallel)

    def to_dict(self) -> dict[str, Any]:
        """{option: value} of every option, as it could be written in JSON or YAML."""
        return {item.name: copy.copy(getattr(self, item.name)) for item in dataclasses.fields(self)}

    def changed(self) -> dict[str, Any]:
        """{option: value} of the options that differ from their defaults."""
        defaults = {item.name: default_of(item) for item in dataclasses.fields(self)}
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}

    if not TYPE_CHECKING:  # for a type checker no other name exists

        def __getattr__(self, name: str) -> Any:
            """What is in effect of an option of TRL that is none here: scripts ask for `args.push_to_hub` and the like."""
            words = ADVICE.get(name, "")
            if isinstance(words, SameAs):
                return getattr(self, words.option)
            if isinstance(words, Advice):
                return copy.copy(words.values[0])
            raise AttributeError(f"DPOConfig has no option {name}" + (f": {words}" if words else ""))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> DPOConfig:
        """The inverse of `to_dict`; options that are left out have their defaults."""
        return cls(**options)
