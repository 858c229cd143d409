"""docs/options.md, made from the options themselves. `make docs` writes it, and docs/from-trl.md
and docs/troubleshooting.md; tests hold them to the code."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from jax_dpo.config import DPOConfig, ScriptArguments
from jax_dpo.config.advice import ADVICE
from jax_dpo.config.fields import default_of, show, type_words, types_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"

HEAD = """\
# Options

Made by `make docs` from `jax_dpo/config`: do not edit this page. `jax-dpo train --help` prints the same.

A run takes options from YAML files (`option: value` in a line), from the command line (`--option value`, which wins), or in
Python from `DPOConfig(option=value)`. Names, meanings and defaults are those of TRL 1.16 where TRL has the option.
Everything that is wrong with what you gave is told at once, before anything is loaded. Values that are only unusual are
warned of, and run.
"""

SCRIPT_HEAD = """\
## Model, data and adapter

On the command line and in YAML. In Python these are arguments of `DPOTrainer`; the adapter is `peft_config=LoraConfig(...)`.
"""

ADVICE_HEAD = """\
## Names that are not options here

TRL, transformers or older scripts have them. Each is refused with this sentence; none is accepted and ignored.

| name | what to do |
|---|---|
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for group, items in groups(DPOConfig).items():
        parts.append(f"## {group}\n\n{table(DPOConfig, items)}")
    parts.append(SCRIPT_HEAD)
    for group, items in groups(ScriptArguments).items():
        parts.append(f"### {group}\n\n{table(ScriptArguments, items)}")
    lines = [f"| `{name}` | {cell(text)} |" for name, text in sorted(ADVICE.items())]
    parts.append(ADVICE_HEAD + "\n".join(lines) + "\n")
    return "\n".join(parts)


def groups(cls: Any) -> dict[str, list[dataclasses.Field[Any]]]:
    """The fields by group, groups in the order in which they first occur."""
    found: dict[str, list[dataclasses.Field[Any]]] = {}
    for item in dataclasses.fields(cls):
        found.setdefault(item.metadata["group"], []).append(item)
    return found


def table(cls: Any, items: list[dataclasses.Field[Any]]) -> str:
    """A line for each option: name, default, what it takes, what it does."""
    lines = ["| option | default | takes | what it does |", "|---|---|---|---|"]
    for item in items:
        value = default_of(item)
        default = "" if value == "" else f"`{show(value)}`"
        lines.append(f"| `{item.name}` | {default} | {cell(takes(cls, item))} | {cell(item.metadata['help'])} |")
    return "\n".join(lines) + "\n"


def takes(cls: Any, item: dataclasses.Field[Any]) -> str:
    """Its values in words."""
    kind = type_words(types_of(cls)[item.name])
    if item.metadata["choices"]:
        many = "a list of " if kind.startswith("a list") else ""
        return many + ", ".join(f"`{choice}`" for choice in item.metadata["choices"])
    check = item.metadata["check"]
    if check is None:
        return kind
    return check.expected + (" or null" if "null" in kind and "null" not in check.expected else "")


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[1]))
    from scripts import from_trl_page, troubleshooting_page

    PAGE.write_text(page(), encoding="utf-8")
    from_trl_page.PAGE.write_text(from_trl_page.page(), encoding="utf-8")
    sys.exit(troubleshooting_page.main())
