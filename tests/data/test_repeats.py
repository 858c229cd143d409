"""Answers that stand in many pairs. Oracle: counted by hand in the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jax_dpo.data.prepare import DataOptions, PreparedData, prepare
from jax_dpo.data.repeats import repeats

TOKENIZER = AutoTokenizer.from_pretrained(str(Path(__file__).parent.parent / "golden" / "tokenizers" / "chatml"))
REFUSAL = " I cannot help."


def prepared(rows: list[dict[str, Any]], **options: Any) -> PreparedData:
    return prepare(rows, lambda: TOKENIZER, name="rows", options=DataOptions(use_cache=False, **options))


def pairs(same: int, other: int, side: str = "rejected") -> list[dict[str, Any]]:
    """`same` pairs that have one text on a side, after `other` pairs in which all differ."""
    of = "chosen" if side == "rejected" else "rejected"
    rows = [{"prompt": f"Say {i}:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(other)]
    return rows + [{"prompt": f"Tell {i}:", side: REFUSAL, of: f" fine, {i} it is"} for i in range(same)]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(("same", "other", "share"), [(24, 0, "100 % (24 of 24)"), (7, 6, "53 % (7 of 13)")])
def test_half_and_more_is_said(side: str, same: int, other: int, share: str) -> None:
    data = prepared(pairs(same, other, side))
    (found,) = repeats(data.pairs)
    assert (found.side, found.times, found.total, found.pair) == (side, same, same + other, other)
    assert any(f"one text is {share} of the {side} answers, first in row {other + 1}" in w for w in data.warnings)


def test_less_than_half_few_pairs_and_answers_that_are_as_long_are_not() -> None:
    assert not repeats(prepared(pairs(6, 7)).pairs)
    assert not repeats(prepared(pairs(7, 0)).pairs)
    assert not repeats(prepared(pairs(0, 10)).pairs), "one length, ten texts"


def test_conversations_and_what_is_left_after_a_cut() -> None:
    """What counts is what is trained on: answers that max_length makes equal are equal."""
    talk = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    rows = [
        {
            "prompt": [{"role": "user", "content": "Go"}],
            "chosen": talk(f"{i}"),
            "rejected": talk(f"Sorry, not now, {i}"),
        }
        for i in range(9)
    ]
    assert not repeats(prepared(rows).pairs)
    whole = prepared(rows).pairs
    short = int(whole.lengths()[0, 0]) + 2
    assert [r.side for r in repeats(prepared(rows, max_length=short).pairs)] == ["rejected"]
