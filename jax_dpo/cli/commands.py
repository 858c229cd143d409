"""What each command takes, and which function does its work."""

# ruff: noqa: RUF009 (`option` makes a dataclass field)
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jax_dpo.config import DPOConfig, ScriptArguments, parse
from jax_dpo.config.advice import ADVICE
from jax_dpo.config.fields import Problem, above, at_least, option, read, refuse, within
from jax_dpo.config.flags import option_types, read_flags, take_flags
from jax_dpo.config.parse import ALIASES
from jax_dpo.config.places import compile_cache, token_cache
from jax_dpo.errors import OK, UserError

A = TypeVar("A")


@dataclass(frozen=True)
class Command:
    """A command as help shows it, and `run`: its arguments -> exit code.

    `options` are the dataclasses whose fields it takes; `groups` limits what its help lists, where it takes far more than it needs.
    """

    name: str
    usage: str
    summary: str
    examples: tuple[str, ...]
    options: tuple[type, ...]
    run: Callable[[list[str]], int]
    groups: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """Arguments of `convert`."""

    dtype: str = option(
        "auto",
        "Type of the weights that are written; auto is that of the weights that come in.",
        group="Options",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Arguments of `generate`."""

    model: str = option("", "The model: a Hugging Face directory, a GGUF file or a Hub name.", group="Options")
    adapter: str | None = option(None, "A PEFT adapter to put on it.", group="Options")
    prompt: list[str] = option(
        [], "What the model is asked; several are answered one after the other.", group="Options"
    )
    max_new_tokens: int = option(128, "Most tokens of an answer.", group="Options", check=at_least(1))
    temperature: float = option(
        0.0, "0 takes the likeliest token; above it samples.", group="Options", check=at_least(0)
    )
    top_p: float = option(
        1.0, "Samples from the likeliest tokens with this total.", group="Options", check=within(0, 1, open_low=True)
    )
    seed: int = option(42, "Seed of the sampling.", group="Options", check=at_least(0))


@dataclass(frozen=True, kw_only=True)
class TuneArguments:
    """Arguments of `tune` beside those of a run."""

    trial_steps: int = option(30, "Steps of each trial.", group="Trials", check=at_least(4))
    trial_pairs: int = option(64, "Held-out pairs that each trial is measured on.", group="Trials", check=at_least(2))
    trial_rates: list[float] = option([], "Learning rates to try, in place of a search.", group="Trials")
    trial_betas: list[float] = option(
        [],
        "Betas to compare with the configured one, which alone compares none; empty, its half and its double within 0.05 to 0.3.",
        group="Trials",
    )
    kl_share: float | None = option(
        None,
        "Share of target_kl that the planned run is to end at, which leaves room for what short trials cannot tell; unset, 0.75 for full "
        "training with AdamW, 0.6 for adapters and other optimizers.",
        group="Trials",
        check=within(0, 1, open_low=True),
    )
    tune_report: str | None = option(None, "File for the report; unset, tune.json in output_dir.", group="Trials")


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Arguments of `report`, beside the directories of the runs."""

    output: str = option(
        "comparison.html",
        "Where the page that compares several runs is written; one run alone has none.",
        group="Options",
    )


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Arguments of `doctor`."""

    compile_cache_dir: str | None = option(None, "Where compiled programs are kept.", group="Options")
    dataset_cache_dir: str | None = option(None, "Where tokenized data are kept.", group="Options")
    min_free_gib: float = option(5.0, "Free disk space below which doctor complains.", group="Options", check=above(0))


def arguments(
    cls: type[A], argv: Sequence[str], *, positionals: Sequence[str], many: bool = False
) -> tuple[A, list[str]]:
    """(options of a small command, its positionals). `positionals` names those it must have; with `many` the last may repeat."""
    flags = read_flags(argv, option_types(cls), aliases={}, advice={}, with_files=False)
    values, wrong = read(cls, flags.given, {})
    problems = list(flags.problems) + wrong
    found = flags.positionals
    missing = positionals[len(found) :]
    problems += [Problem(name, "is missing") for name in missing]
    if len(found) > len(positionals) and not many:
        extra = ", ".join(repr(item) for item in found[len(positionals) :])
        problems.append(Problem(extra, "is more than is expected", unknown=True))
    refuse(problems)
    return cls(**values), found


def train(argv: list[str]) -> int:
    script, config = parse(argv, needs=("model_name_or_path", "dataset_name"))
    from jax_dpo.trainer import run_training

    return run_training(script, config)


def tune(argv: list[str]) -> int:
    others = [*option_types(ScriptArguments, DPOConfig), *ALIASES, *ADVICE]
    flags, rest = take_flags(argv, option_types(TuneArguments), others)
    values, wrong = read(TuneArguments, flags.given, {})
    for name in ("trial_rates", "trial_betas"):
        if any(value <= 0 for value in values.get(name, ())):
            wrong.append(Problem(name, "expected numbers above 0"))
    refuse([*flags.problems, *wrong])
    script, config = parse(rest, needs=("model_name_or_path", "dataset_name"))
    chosen = TuneArguments(**values)
    _, rest = take_flags(rest, {name: option_types(DPOConfig)[name] for name in ("learning_rate", "beta")}, others)
    from jax_dpo.trainer import run_tune

    return run_tune(script, config, rest, **dataclasses.asdict(chosen))


def evaluate(argv: list[str]) -> int:
    script, config = parse(argv, needs=("model_name_or_path",))
    if not script.dataset_name and not script.eval_dataset:
        raise UserError(
            "invalid-option", "option eval_dataset: is needed: held-out pairs (or dataset_name with a test split)"
        )
    from jax_dpo.trainer import run_evaluation

    return run_evaluation(script, config)


def check(argv: list[str]) -> int:
    script, config = parse(argv, needs=("dataset_name", "model_name_or_path"), data_first=True)
    from jax_dpo.trainer import run_check

    return run_check(script, config)


def convert(argv: list[str]) -> int:
    chosen, (source, target) = arguments(ConvertArguments, argv, positionals=("SRC", "OUT"))
    from jax_dpo.policy import convert as convert_model

    convert_model(source, target, chosen.dtype)
    print(f"{target}: written")
    return OK


def generate(argv: list[str]) -> int:
    chosen, _ = arguments(GenerateArguments, argv, positionals=())
    missing = [
        Problem(name, f"is needed: {words}")
        for name, words in (("model", "a directory, a GGUF file or a Hub name"), ("prompt", "a text to answer"))
        if not getattr(chosen, name)
    ]
    refuse(missing)
    from jax_dpo.trainer import run_generate

    return run_generate(
        chosen.model,
        chosen.prompt,
        adapter=chosen.adapter,
        max_new_tokens=chosen.max_new_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        seed=chosen.seed,
    )


def report(argv: list[str]) -> int:
    chosen, folders = arguments(ReportArguments, argv, positionals=("RUN_DIR",), many=True)
    from jax_dpo.report.html import write_report

    for folder in folders:
        print(write_report(Path(folder)))
    if len(folders) > 1:
        from jax_dpo.report.compare import write_comparison

        print(write_comparison(folders, chosen.output))
    return OK


def doctor(argv: list[str]) -> int:
    chosen, _ = arguments(DoctorArguments, argv, positionals=())
    from jax_dpo.doctor import examine

    places = {
        "compile cache": compile_cache(chosen.compile_cache_dir),
        "token cache": token_cache(chosen.dataset_cache_dir),
    }
    return examine(places, min_free_gib=chosen.min_free_gib)


_RUN_NOTE = (
    "A CONFIG is a YAML file with lines `option: value`; several are read in their order, and the command line wins over them. "
    "Options: --a_b value, --a-b value or --a_b=value; --x, --x false or --no_x; --list one two; mappings as JSON; none for unset."
)
_RUN = (ScriptArguments, DPOConfig)
_TUNE_NOTE = (
    "Takes every option of train. The options of the trials stand on the command line alone. No state is kept: what is written is one "
    "small report. Exit codes: 0 done, 1 unexpected, 2 the input is wrong or no trial is a guide, 75 stopped by a signal."
)
_EXIT_NOTE = (
    "Exit codes: 0 done and gates passed, 1 unexpected, 2 the input is wrong, 3 trained but a gate failed, 75 stopped by a signal "
    "after saving (the same command with --resume_from_checkpoint auto goes on). The word in brackets behind an error or a warning is its "
    "entry in docs/troubleshooting.md."
)

COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (
        Command(
            name="train",
            usage="jax-dpo train [CONFIG.yaml ...] [options]",
            summary="Train a model on preference pairs.",
            examples=(
                "jax-dpo train configs/standard.yaml --model_name_or_path ./model --dataset_name pairs.jsonl --test_split_size 0.05",
                "jax-dpo train configs/standard_lora.yaml --model ./model --dataset pairs.jsonl --eval_dataset held-out.jsonl",
                "jax-dpo train --config run.yaml --learning_rate 5e-7 --loss_type sigmoid sft --loss_weights 1.0 0.5",
                "jax-dpo train run.yaml --output_dir outputs/again --no_gradient_checkpointing --kl_actions halve_lr rollback",
            ),
            options=_RUN,
            run=train,
            note=f"{_RUN_NOTE}\n\n{_EXIT_NOTE}",
        ),
        Command(
            name="evaluate",
            usage="jax-dpo evaluate [CONFIG.yaml ...] [options]",
            summary="Evaluate a model on held-out pairs against its reference.",
            examples=(
                "jax-dpo evaluate --model outputs/run/final --ref_model_name_or_path ./model --eval_dataset held-out.jsonl",
                'jax-dpo evaluate run.yaml --eval_dataset \'{"near": "near.jsonl", "far": "far.jsonl"}\'',
            ),
            options=_RUN,
            run=evaluate,
            groups=("Model", "Data", "Evaluation", "Precision and memory", "Loss", "KL control", "Devices"),
            note=_RUN_NOTE,
        ),
        Command(
            name="check",
            usage="jax-dpo check DATA --model MODEL [options]",
            summary="Read preference pairs, name the faulty rows, and show one pair as tokens.",
            examples=(
                "jax-dpo check pairs.jsonl --model ./model",
                "jax-dpo check pairs.jsonl --model ./model --max_length 512 --drop_rows invalid empty identical torn duplicate small_gap",
                "jax-dpo check run.yaml",
            ),
            options=_RUN,
            run=check,
            groups=("Model", "Data"),
            note=_RUN_NOTE,
        ),
        Command(
            name="tune",
            usage="jax-dpo tune [CONFIG.yaml ...] [options]",
            summary="Propose a learning rate and a beta for a model and its pairs, by short trials.",
            examples=(
                "jax-dpo tune configs/standard.yaml --model_name_or_path ./model --dataset_name pairs.jsonl --test_split_size 0.05",
                "jax-dpo tune run.yaml --trial_steps 20 --trial_betas 0.05 0.1 0.2 --tune_report tune.json",
            ),
            options=(TuneArguments, *_RUN),
            run=tune,
            groups=("Trials", "Model", "Data", "LoRA", "Loss", "KL control"),
            note=f"{_RUN_NOTE}\n\n{_TUNE_NOTE}",
        ),
        Command(
            name="convert",
            usage="jax-dpo convert SRC OUT [options]",
            summary="Write a model (a GGUF file, a Hugging Face directory, an adapter with its base) as a Hugging Face directory.",
            examples=(
                "jax-dpo convert outputs/lora/final ./merged",
                "jax-dpo convert model.Q4_1.gguf ./model",
                "jax-dpo convert ./model ./model-bf16 --dtype bfloat16",
            ),
            options=(ConvertArguments,),
            run=convert,
        ),
        Command(
            name="generate",
            usage="jax-dpo generate --model MODEL --prompt TEXT [TEXT ...] [options]",
            summary="Let a model answer prompts.",
            examples=(
                'jax-dpo generate --model outputs/run/final --prompt "Write one sentence from a film review."',
                'jax-dpo generate --model ./model --adapter outputs/lora/final --prompt "Why is the sky blue?" --temperature 0.7',
            ),
            options=(GenerateArguments,),
            run=generate,
        ),
        Command(
            name="report",
            usage="jax-dpo report RUN_DIR [RUN_DIR ...] [options]",
            summary="Make report.html of a run anew from its run.jsonl; compare several runs on one page.",
            examples=(
                "jax-dpo report outputs/dpo_training",
                "jax-dpo report outputs/beta-0.1 outputs/beta-0.3 --output outputs/betas.html",
            ),
            options=(ReportArguments,),
            run=report,
        ),
        Command(
            name="doctor",
            usage="jax-dpo doctor [options]",
            summary="Tell what this machine offers, and what is wrong with it.",
            examples=("jax-dpo doctor",),
            options=(DoctorArguments,),
            run=doctor,
            note="Exit codes: 0 nothing is wrong, 1 something is.",
        ),
    )
}


def option_groups(command: Command) -> dict[str, list[tuple[Any, Any]]]:
    """{group: [(field, its type)]} of what a command's help lists, groups in the order in which they first occur."""
    groups: dict[str, list[tuple[Any, Any]]] = {}
    for cls in command.options:
        hints = option_types(cls)
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            group = item.metadata["group"]
            if not command.groups or group in command.groups:
                groups.setdefault(group, []).append((item, hints[item.name]))
    return groups
