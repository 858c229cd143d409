"""ScriptArguments: what the command line and a YAML file name beside the options of DPOConfig (model, data, adapter)."""

# ruff: noqa: RUF009 (`option` makes a dataclass field)
from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax_dpo.config.advice import ADVICE, VALUE_ADVICE
from jax_dpo.config.fields import (
    Check,
    Problem,
    above,
    at_least,
    nearest,
    option,
    read,
    show,
    sort_out,
    validated,
    within,
)
from jax_dpo.errors import named

_SHARE_OR_COUNT = Check(
    "a share between 0 and 1, or a whole number of rows", lambda value: value > 0 and (value < 1 or value == int(value))
)


def check_script(cls: type, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """(value of every argument, everything that is wrong with what was given)."""
    known = [item.name for item in dataclasses.fields(cls)]
    options, unknown = sort_out(given, known, ADVICE)
    values, problems = read(cls, options, VALUE_ADVICE)
    modules = values.get("lora_target_modules")
    # PEFT reads a text as a pattern that must match the whole path, so a plain name would match nothing.
    if isinstance(modules, str) and modules != "all-linear" and re.fullmatch(r"\w+", modules):
        values["lora_target_modules"] = [modules]
    if "datasets" in values:
        problems += _faults_of_mixture(values["datasets"])
    if values.get("datasets") and values.get("dataset_streaming"):
        problems.append(Problem("dataset_streaming", "a mixture (datasets) is read whole; leave it out"))
    return values, unknown + problems


_ENTRY = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")


def _faults_of_mixture(entries: list[dict[str, Any]]) -> list[Problem]:
    """What is wrong with the entries of `datasets`."""
    found = []
    for number, entry in enumerate(entries, 1):
        where = f"entry {number}"
        for key, value in entry.items():
            if key not in _ENTRY:
                close = nearest(key, _ENTRY, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(_ENTRY)}"
                found.append(f"{where} has {key}, which is not known{hint}")
            elif value is not None and not _ENTRY_KINDS[key](value):
                found.append(f"{where}, {key}: found {show(value)}, expected {_ENTRY_WORDS[key]}")
        if not entry.get("path"):
            found.append(f"{where} has no path: a file, a directory, a Hub name, or json, csv, parquet with data_files")
    shares = [entry["fraction"] for entry in entries if entry.get("fraction") is not None]
    if shares and len(shares) < len(entries):
        found.append("fraction stands in some entries and not in others; expected in all or in none")
    elif not found and shares and sum(shares) <= 0:
        found.append("the fractions sum to 0, expected more")
    return [Problem("datasets", text) for text in found]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _files(value: Any) -> bool:
    return (
        _text(value)
        or _texts(value)
        or (isinstance(value, dict) and all(_text(v) or _texts(v) for v in value.values()))
    )


_ENTRY_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("path", "name", "data_dir", "split"), _text),
    "data_files": _files,
    "columns": _texts,
    "fraction": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0,
}
_ENTRY_WORDS = {
    **dict.fromkeys(("path", "name", "data_dir", "split"), "text"),
    "data_files": "a file, a list of files, or a mapping of splits to them",
    "columns": "a list of names",
    "fraction": "a number of at least 0",
}


@validated(check_script)
@dataclass(frozen=True, kw_only=True)
class ScriptArguments:
    """Model, data and adapter of a run from the command line, under the names of TRL's script, model and data arguments.

    An empty text stands for a name that was not given. Raises one `UserError` with all faults, as DPOConfig does.
    """

    model_name_or_path: str = option(
        "", "The policy: a Hugging Face directory, a GGUF file or a Hub name.", group="Model"
    )
    model_revision: str = option("main", "Revision of a Hub name.", group="Model")
    ref_model_name_or_path: str | None = option(
        None, "The reference; unset, the policy as it is at the start.", group="Model"
    )
    tokenizer_name_or_path: str | None = option(None, "The tokenizer; unset, the model's own.", group="Model")

    dataset_name: str = option(
        "", "Preference pairs: a JSONL, JSON, Parquet or CSV file, a directory or a Hub name.", group="Data"
    )
    dataset_config: str | None = option(None, "Configuration of a Hub data set.", group="Data")
    dataset_train_split: str = option("train", "Split to train on.", group="Data")
    dataset_test_split: str = option("test", "Split to evaluate on.", group="Data")
    eval_dataset: dict[str, str] | str | None = option(
        None, "Held-out pairs in a place of their own: a file, or several by name, as JSON or in YAML.", group="Data"
    )
    test_split_size: int | float | None = option(
        None,
        "Rows that are held out of the training data where there is no test split: a share or a number.",
        group="Data",
        check=_SHARE_OR_COUNT,
    )

    datasets: list[dict[str, Any]] = option(
        [],
        "Several data sets as one, in YAML: a list of path, name, data_dir, data_files, split (train[:1000] is a part), columns, fraction; "
        "dataset_name is not used then.",
        group="Data",
    )
    dataset_streaming: bool = option(
        False,
        "Read a data set on the Hub row by row, in its own order and as far as max_steps (which it needs) takes; files are read whole.",
        group="Data",
    )

    retry: int = option(
        0,
        "How many times the run is made again where a gate failed, each time with the change that the gate advises; what failed is set "
        "aside in output_dir/attempt-1, ... and compared in comparison.html.",
        group="Attempts",
        check=at_least(0),
    )

    use_peft: bool = option(False, "Train a LoRA adapter; the model itself is the reference.", group="LoRA")
    lora_r: int = option(16, "Rank of the adapter.", group="LoRA", check=at_least(1))
    lora_alpha: int | float = option(32, "The adapter counts lora_alpha / lora_r.", group="LoRA", check=above(0))
    lora_dropout: float = option(
        0.05,
        "Dropout before the adapter; silent unless disable_dropout is false.",
        group="LoRA",
        check=within(0, 1, open_high=True),
    )
    lora_target_modules: list[str] | str | None = option(
        None,
        "Linear layers with an adapter: names, all-linear, or a regular expression for the whole path; unset, PEFT's choice for the "
        "family.",
        group="LoRA",
    )
    lora_modules_to_save: list[str] | None = option(
        None,
        "Modules that are trained whole beside the adapter and saved with it, such as lm_head or norm: those whose path ends so.",
        group="LoRA",
    )
    lora_task_type: str = option("CAUSAL_LM", "Only language models are trained.", group="LoRA", choices=("CAUSAL_LM",))
    use_rslora: bool = option(False, "The adapter counts lora_alpha / sqrt(lora_r).", group="LoRA")
    use_dora: bool = option(
        False,
        "DoRA: the length of each row of the adapted weights is trained too, its direction by the adapter.",
        group="LoRA",
    )

    def to_dict(self) -> dict[str, Any]:
        """{argument: value} of every argument."""
        return {item.name: copy.copy(getattr(self, item.name)) for item in dataclasses.fields(self)}

    def warnings(self) -> list[str]:
        """Sentences on arguments that have no effect beside the others."""
        return [*self._unused_data(), *self._unused_adapter()]

    def _unused_data(self) -> list[str]:
        if self.datasets and self.dataset_name:
            return [named("option-without-effect", "datasets is used, dataset_name is not")]
        return []

    def _unused_adapter(self) -> list[str]:
        changed = [
            item.name
            for item in dataclasses.fields(self)
            if item.name.startswith(("lora_", "use_rslora", "use_dora")) and getattr(self, item.name) != item.default
        ]
        if changed and not self.use_peft:
            return [named("option-without-effect", f"{', '.join(changed)} without use_peft: true has no effect")]
        return []
