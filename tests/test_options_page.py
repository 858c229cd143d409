"""docs/options.md says what the code says. Oracle: the options' own fields."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jax_dpo.config import DPOConfig, ScriptArguments
from scripts.options_page import PAGE, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/options.md is not what the options say: run `make docs`"


def test_every_option_has_its_line() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for cls in (DPOConfig, ScriptArguments):
        for item in dataclasses.fields(cls):
            found = [line for line in lines if line.startswith(f"| `{item.name}` |")]
            assert len(found) == 1, item.name
            assert found[0].count("|") - found[0].count("\\|") == 5, found[0]
