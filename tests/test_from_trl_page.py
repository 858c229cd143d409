"""docs/from-trl.md says what the code says. Oracle: the page made anew, and the names of TRL's own dataclasses."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jax_dpo.config import DPOConfig
from scripts.from_trl_page import BETTER, PAGE, TRL, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/from-trl.md is not what the code says: run `make docs`"


def test_every_option_of_trl_has_its_line() -> None:
    text = page()
    for part in ("DPOConfig", "ScriptArguments", "ModelConfig", "DatasetMixtureConfig"):
        for name in TRL[part]:
            assert f"| `{name}` | " in text, name
    assert set(BETTER) <= {name for part in TRL.values() for name in part}


def test_tables_are_whole() -> None:
    lines = [line for line in page().splitlines() if line.startswith("|")]
    columns = [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in lines]
    assert set(columns) == {2, 3, 4}
    assert not [line for line in lines if re.search(r"\s\.(?!\.)|(?<!\.)\.\.(?!\.)", line)]


def test_the_options_of_the_example_are_options() -> None:
    (line,) = re.findall(r"args = (DPOConfig\(.*\))", page())
    assert eval(line, {"DPOConfig": DPOConfig}).report_to == "tensorboard"
