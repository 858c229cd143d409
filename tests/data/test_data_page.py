"""docs/data.md. Oracles: the names in the code, and the examples of the page read by the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers import AutoTokenizer

from jax_dpo.data.check import DROP_REASONS, OVERLONG
from jax_dpo.data.formats import DATA_FORMATS
from jax_dpo.data.pairs import PAIR_COLUMNS, REF_ALIASES, REF_COLUMNS
from jax_dpo.data.prepare import DataOptions, prepare
from jax_dpo.data.turns import COMPLETION_TURNS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_name_is_on_the_page() -> None:
    names = {
        *DROP_REASONS,
        *OVERLONG,
        *DATA_FORMATS,
        *PAIR_COLUMNS,
        *REF_COLUMNS,
        *REF_ALIASES.values(),
        *COMPLETION_TURNS,
    }
    assert [name for name in sorted(names) if f"`{name}`" not in PAGE] == []


def test_every_example_is_the_same_pair() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "tests" / "golden" / "tokenizers" / "chatml"))
    rows = [json.loads(line) for block in re.findall(r"```json\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    hashes = set()
    for row in rows:
        data = prepare([row], lambda: tokenizer, options=DataOptions(use_cache=False))
        assert len(data.pairs) == 1 and len(data.pairs.pair(0)[0]) > 5
        hashes.add(data.pairs.content_hash())
    assert len(rows) == 7 and len(hashes) == 1
