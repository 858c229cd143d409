"""From a command line to (ScriptArguments, DPOConfig): YAML files first, in their order, then the command line's options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jax_dpo.config.advice import ADVICE
from jax_dpo.config.fields import Advice, Problem, refuse, show, sort_out
from jax_dpo.config.flags import option_types, read_flags
from jax_dpo.config.options import DPOConfig, check_values
from jax_dpo.config.script import ScriptArguments, check_script
from jax_dpo.config.yaml_file import read_yaml
from jax_dpo.errors import UserError

ALIASES = {"model": "model_name_or_path", "dataset": "dataset_name"}


def parse(
    argv: Sequence[str], *, needs: Sequence[str] = (), data_first: bool = False
) -> tuple[ScriptArguments, DPOConfig]:
    """Options from YAML files (positional, or after --config) and from the command line, which wins.

    `env` in a file sets environment variables, once everything is found to be right.
    `needs` names the arguments that must be given. With `data_first` a positional that is no YAML file is the data set.
    Raises one `UserError` that tells everything that is wrong, with the file in which it stands.
    """
    hints = option_types(ScriptArguments, DPOConfig)
    asking_nothing = {name: words.hint for name, words in ADVICE.items() if isinstance(words, Advice)}
    flags = read_flags(argv, asking_nothing | hints, aliases=ALIASES, advice=ADVICE, with_files=True)
    problems = list(flags.problems)
    data = _data(flags.positionals, data_first)
    given: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path in flags.files:
        for name, value in read_yaml(path).items():
            given[name], origins[name] = value, path
    if data is not None:
        given["dataset_name"], origins["dataset_name"] = data, "command line"
    for name, value in flags.given.items():
        given[name], origins[name] = value, "command line"
    env = given.pop("env", None) or {}
    if not isinstance(env, Mapping) or not all(isinstance(v, str | int | float) for v in env.values()):
        problems.append(Problem("env", f"found {show(env)}, expected a mapping of names to texts"))
    given, unknown = sort_out(given, hints, ADVICE)
    problems += unknown
    mine = {item.name for item in dataclasses.fields(ScriptArguments)}
    script, wrong_script = check_script(ScriptArguments, {name: value for name, value in given.items() if name in mine})
    config, wrong_config = check_values(DPOConfig, {name: value for name, value in given.items() if name not in mine})
    problems += wrong_script + wrong_config
    there = {name for name, value in given.items() if value} | ({"dataset_name"} if given.get("datasets") else set())
    problems += [Problem(name, _NEEDED[name]) for name in needs if name not in there and name in _NEEDED]
    refuse(problems, origins)
    os.environ.update({str(name): str(value) for name, value in env.items()})
    return ScriptArguments(**script), DPOConfig(**config)


_NEEDED = {
    "model_name_or_path": "is needed: a Hugging Face directory, a GGUF file or a Hub name",
    "dataset_name": "is needed: a JSONL, JSON, Parquet or CSV file, a directory or a Hub name",
}


def _data(positionals: Sequence[str], data_first: bool) -> str | None:
    """The data set among the positionals; the others have no place."""
    if len(positionals) <= int(data_first):
        return positionals[0] if positionals else None
    expected = "expected YAML files (.yaml, .yml) and options that begin with --"
    if data_first:
        expected = "expected one data set, YAML files and options that begin with --"
    raise UserError("unexpected-argument", f"unexpected argument {positionals[-1]!r}; {expected}")
