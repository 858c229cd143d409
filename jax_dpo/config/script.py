"""ScriptArguments: what the command line and a YAML file name beside the options of DPOConfig (model, data, adapter)."""

# ruff: noqa: RUF009 (`option` makes a dataclass field)
from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax_dpo.config.advice import ADVICE, VALUE_ADVICE
from jax_dpo.config.fields import Check, Problem, above, at_least, option, read, sort_out, validated, within

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
    return values, unknown + problems


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
        changed = [
            item.name
            for item in dataclasses.fields(self)
            if item.name.startswith(("lora_", "use_rslora", "use_dora")) and getattr(self, item.name) != item.default
        ]
        if changed and not self.use_peft:
            return [f"{', '.join(changed)} without use_peft: true has no effect"]
        return []
