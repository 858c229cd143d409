"""Help texts, made from the options' own metadata."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from jax_dpo.cli.commands import Command, option_groups
from jax_dpo.config.fields import default_of, members, show

_INDENT = 30


def overview(commands: Mapping[str, Command]) -> str:
    """What `jax-dpo --help` prints."""
    lines = ["Train a language model on preference pairs, and hold it close to its reference.", ""]
    lines += ["usage: jax-dpo COMMAND [options]", "", "commands:"]
    lines += [f"  {command.name:<10} {command.summary}" for command in commands.values()]
    lines += ["", "examples:", *(f"  {command.examples[0]}" for command in commands.values())]
    lines += ["", "`jax-dpo COMMAND --help` lists the options of a command; `jax-dpo --version` tells the version."]
    lines += ["The word in brackets behind an error or a warning is its entry in docs/troubleshooting.md."]
    return "\n".join(lines)


def command_help(command: Command) -> str:
    """What `jax-dpo COMMAND --help` prints."""
    width = min(max(shutil.get_terminal_size().columns, 72), 110)
    lines = [command.summary, "", f"usage: {command.usage}", "", "examples:"]
    lines += [f"  {example}" for example in command.examples]
    for paragraph in filter(None, command.note.split("\n")):
        lines += ["", *textwrap.wrap(paragraph, width)]
    for group, items in option_groups(command).items():
        lines += ["", f"{group}:"]
        for item, hint in items:
            lines += _option_lines(item, hint, width)
    return "\n".join(lines)


def _option_lines(item: dataclasses.Field[Any], hint: Any, width: int) -> list[str]:
    head = f"  --{item.name} {_placeholder(item, hint)}"
    default = default_of(item)
    text = item.metadata["help"]
    if default not in ("", None):
        text += f" [{_default(default)}]"
    body = textwrap.wrap(text, width - _INDENT)
    if item.metadata["choices"]:
        body += textwrap.wrap("One of " + ", ".join(item.metadata["choices"]) + ".", width - _INDENT)
    indent = " " * _INDENT
    if len(head) <= _INDENT - 2:
        return [f"{head:<{_INDENT}}{body[0]}", *(indent + line for line in body[1:])]
    return [head, *(indent + line for line in body)]


def _default(value: Any) -> str:
    return " ".join(str(item) for item in value) or "empty" if isinstance(value, list) else show(value).strip('"')


def _placeholder(item: dataclasses.Field[Any], hint: Any) -> str:
    """The kind of value in capitals, such as NUMBER or TEXT [TEXT ...]."""
    words = []
    for kind in members(hint):
        origin = typing.get_origin(kind)
        if kind is types.NoneType:
            continue
        if origin is list:
            one = "NUMBER" if typing.get_args(kind)[0] is float else "NAME" if item.metadata["choices"] else "TEXT"
            words.append(f"{one} [{one} ...]")
        elif origin is dict:
            words.append("JSON")
        else:
            words.append({bool: "true|false", int: "N", float: "NUMBER", str: "TEXT"}[kind])
    return _joined(words)


def _joined(words: Iterable[str]) -> str:
    unique = list(dict.fromkeys(words))
    if unique == ["N", "NUMBER"]:
        return "NUMBER"
    if unique[-1:] == ["TEXT"] and len(unique) > 1 and unique[0].startswith("TEXT "):
        unique.pop()
    if unique[:1] == ["TEXT"] and len(unique) > 1 and unique[1].endswith("...]"):
        unique.pop(0)
    return "|".join(unique)
