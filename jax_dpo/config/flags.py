"""The grammar of a command line, for any dataclass of options.

`--a_b value`, `--a-b value`, `--a_b=value`; a boolean `--x`, `--x false` or `--no_x`; a list `--x one two`; a mapping as JSON.
What stands in no option's place is a positional. Nothing is abbreviated.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_dpo.config.fields import FALSE_WORDS, TRUE_WORDS, Problem, is_list, members, nearest, types_of, unknown_option

YAML_SUFFIXES = (".yaml", ".yml")
_NUMBER = re.compile(r"-(\d|\.\d)")


@dataclass
class Flags:
    """What a command line says: texts by option, configuration files and other positionals in order, what could not be understood."""

    given: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    positionals: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def option_types(*classes: type) -> dict[str, Any]:
    """{option: type} of several dataclasses together."""
    return {item.name: types_of(cls)[item.name] for cls in classes for item in dataclasses.fields(cls)}  # type: ignore[arg-type]


def read_flags(
    argv: Sequence[str],
    hints: Mapping[str, Any],
    *,
    aliases: Mapping[str, str],
    advice: Mapping[str, str],
    with_files: bool,
) -> Flags:
    """Reads `argv` by the types in `hints`. `aliases` are short names of options. Faults are collected, not raised.

    `with_files`: a positional YAML file, or what follows --config, is a configuration.
    """
    flags = Flags()
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token == "--":
            flags.positionals += rest
            break
        if not token.startswith("-") or _NUMBER.match(token) or token == "-":
            (flags.files if with_files and token.endswith(YAML_SUFFIXES) else flags.positionals).append(token)
            continue
        word, equals, value = token.partition("=")
        name = word.lstrip("-").replace("-", "_")
        name = aliases.get(name, name)
        negated = name.removeprefix("no_")
        if not word.startswith("--"):
            flags.problems.append(Problem(word, f"options begin with two dashes{_near(name, hints)}", unknown=True))
            _take(rest)
        elif with_files and name == "config":
            _read_file(flags, value if equals else None, rest)
        elif name in hints:
            _read_one(flags, name, hints[name], [value] if equals else None, rest)
        elif negated != name and negated in hints and bool in members(hints[negated]) and not equals:
            flags.given[negated] = False
        else:
            problem = unknown_option(name, [*hints, *aliases], advice)
            flags.problems.append(dataclasses.replace(problem, option=word))
            if not equals:
                _take(rest)
    return flags


def take_flags(argv: Sequence[str], hints: Mapping[str, Any], others: Iterable[str] = ()) -> tuple[Flags, list[str]]:
    """(the options in `hints`, all that stands beside them, as it was). `others` are options that are none of a typing error's business."""
    flags, rest, left = Flags(), list(argv), []
    known = {*others, "config"} - set(hints)
    while rest:
        token = rest.pop(0)
        if token == "--":
            left += [token, *rest]
            break
        word, equals, value = token.partition("=")
        name = word.lstrip("-").replace("-", "_")
        close = nearest(name, [*hints, *known], n=1)
        if word.startswith("--") and name in hints:
            _read_one(flags, name, hints[name], [value] if equals else None, rest)
        elif word.startswith("--") and name not in known and close and close[0] in hints:
            flags.problems.append(Problem(word, f"there is no such option; did you mean --{close[0]}?", unknown=True))
            if not equals:
                _take(rest)
        else:
            left.append(token)
    return flags, left


def _near(name: str, hints: Mapping[str, Any]) -> str:
    close = nearest(name, hints, n=1)
    return f"; did you mean --{close[0]}?" if close else ""


def _read_file(flags: Flags, value: str | None, rest: list[str]) -> None:
    if value is None and (not rest or not _is_value(rest[0], yaml=True)):
        flags.problems.append(Problem("--config", "needs a YAML file"))
    else:
        flags.files.append(rest.pop(0) if value is None else value)


def _read_one(flags: Flags, name: str, hint: Any, values: list[str] | None, rest: list[str]) -> None:
    """Takes the values of one option off `rest`, unless they were given after an equals sign."""
    kinds = members(hint)
    if values is None and is_list(hint):
        values = _take(rest)
        if not values and len(kinds) > 1:  # only a plain list can be empty
            flags.problems.append(Problem(name, "needs a value"))
            return
    elif values is None and bool in kinds:
        only_bool = str not in kinds
        following = rest[0] if rest else ""
        takes = following.lower() in TRUE_WORDS | FALSE_WORDS | {"none", "null"} if only_bool else _is_value(following)
        values = [rest.pop(0)] if following and takes else ["true"]
    elif values is None:
        if not rest or not _is_value(rest[0], yaml=True):
            flags.problems.append(Problem(name, "needs a value"))
            return
        values = [rest.pop(0)]
    flags.given[name] = values if is_list(hint) and len(values) != 1 else values[0]


def _is_value(token: str, *, yaml: bool = False) -> bool:
    """Whether a token can be an option's value. A YAML file is one only where `yaml` says so: else it is the configuration."""
    if token.endswith(YAML_SUFFIXES) and not yaml:
        return False
    return not token.startswith("-") or bool(_NUMBER.match(token)) or token == "-"


def _take(rest: list[str]) -> list[str]:
    """The values at the head of `rest`, taken off it."""
    taken = []
    while rest and _is_value(rest[0]):
        taken.append(rest.pop(0))
    return taken
