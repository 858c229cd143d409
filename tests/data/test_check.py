"""Which rows are left out and why. Oracle: the reasons written beside the rows of each test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jax_dpo.data.check import DROP_REASONS, Drop, name_rows, write_drops
from jax_dpo.data.prepare import DataOptions, PreparedData, prepare
from jax_dpo.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
TOKENIZER = AutoTokenizer.from_pretrained(str(GOLDEN / "tokenizers" / "chatml"))
ALL = tuple(DROP_REASONS)


def text(prompt: str, chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def run(rows: list[Any], **options: Any) -> PreparedData:
    return prepare(rows, lambda: TOKENIZER, name="rows", options=DataOptions(**{"use_cache": False} | options))


# The reason for each row is its "why"; None is kept.
MIXED = [
    text("q", "a", "b", why=None),
    text("q", "a", "b", why="duplicate"),
    text("q", "a", None, why="invalid"),
    text("q", " ", "b", why="empty"),
    text("q", "a", "", why="empty"),
    text("q", "a", "<|im_end|>", why="empty"),
    text("q", "a", "a", why="identical"),
    text("q", "a", "a<|im_end|>", why="identical"),
    text("q", "a", "c", why="small_gap", score_chosen=5, score_rejected=4.9),
    text("q", "a", "c", why=None, score_chosen=5, score_rejected=4),
    text("q", "a", "d", why="small_gap", score_chosen=1, score_rejected=4),
    text("long " * 40, "a", "d", why="too_long"),
    text("q", "a", "c", why="duplicate", score_chosen=5, score_rejected=4),
]


def test_every_reason_is_found() -> None:
    data = run(MIXED, drop_rows=ALL, max_length=30)
    why = {i + 1: row["why"] for i, row in enumerate(MIXED) if row["why"]}
    assert {d.row: d.reason for d in data.drops} == why
    assert [d.row for d in data.drops] == sorted(why)
    assert data.pairs.index.tolist() == [i for i, row in enumerate(MIXED) if not row["why"]]
    assert data.dropped == {r: list(why.values()).count(r) for r in set(why.values())}
    assert not data.flagged
    detail = {d.row: d.detail for d in data.drops}
    assert detail[2] == "prompt, chosen and rejected are those of row 1"
    assert detail[13] == "prompt, chosen and rejected are those of row 10"
    assert detail[5] == "rejected is empty"
    assert "0.1 above" in detail[9] and "0.15 is the least" in detail[9]
    assert all(d.file == "rows" for d in data.drops)


def test_reasons_that_are_not_named_are_counted() -> None:
    data = run(MIXED, max_length=30)
    assert [d.reason for d in data.drops] == ["invalid", "too_long"]
    # Rows 6 and 8 differ from 5 and 7 only by the end-of-sequence text that is put there anyway.
    assert data.flagged == {
        "empty": [4, 5, 6],
        "identical": [7, 8],
        "small_gap": [9, 11],
        "duplicate": [2, 6, 8, 10, 13],
    }
    said = "\n".join(data.warnings)
    assert "3 rows with an answer without a token of its own, used all the same: rows 4, 5, 6." in said
    assert "Put `empty` into drop_rows" in said
    assert "1 row left out as invalid: row 3. Row 3: rejected is null." in said
    assert "max_prompt_length" in said and "columns that are not read: why." in said


def test_answers_that_the_split_tears_are_named() -> None:
    rows = [{"chosen": "one two", "rejected": "one three"}, {"chosen": "alpha ", "rejected": "beta"}]
    kept = run(rows)
    assert kept.flagged == {"empty": [2], "torn": [2]}, "what is left of chosen is a space"
    assert "1 row with answers cut to their last character" in "\n".join(kept.warnings)
    dropped = run(rows, drop_rows=("torn",))
    assert [(d.row, d.reason) for d in dropped.drops] == [(2, "torn")]
    assert "write a prompt column" in dropped.drops[0].detail


def test_an_invalid_row_is_an_error_where_it_is_not_named() -> None:
    with pytest.raises(UserError, match=r"rows, row 3: rejected is null\..*put `invalid` into drop_rows") as error:
        run(MIXED, drop_rows=())
    assert error.value.name == "row-invalid"
    rows = [MIXED[2], MIXED[2], MIXED[0]]
    with pytest.raises(UserError, match="1 more rows are invalid"):
        run(rows, drop_rows=("empty",))


def test_a_gap_of_exactly_the_least_is_enough() -> None:
    """0.15 in decimal, though not in floating point (3.15 - 3.0 < 0.15)."""
    assert 3.15 - 3.0 < 0.15
    rows = [
        text("q", "a", str(i), score_chosen=a, score_rejected=b) for i, (a, b) in enumerate([(3.15, 3.0), (0.9, 0.75)])
    ]
    assert len(run(rows, drop_rows=ALL).pairs) == 2
    assert len(run(rows, drop_rows=ALL, min_gap=0.2).pairs) == 0
    assert len(run([text("q", "a", "b", score_chosen=None, score_rejected=1)], drop_rows=ALL).pairs) == 1


def test_a_repeat_of_a_row_that_is_left_out_is_no_duplicate() -> None:
    rows = [
        text("q", "a", "b", score_chosen=1, score_rejected=1),
        text("q", "a", "b", score_chosen=2, score_rejected=1),
    ]
    data = run(rows, drop_rows=ALL)
    assert [(d.row, d.reason) for d in data.drops] == [(1, "small_gap")]


def test_conversations() -> None:
    def answer(content: str | None, **more: Any) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": content, **more}]

    ask = [{"role": "user", "content": "q"}]
    rows = [
        text(ask, answer("a"), answer("b")),  # type: ignore[arg-type]
        text(ask, answer("   "), answer("b")),  # type: ignore[arg-type]
        text(ask, answer(None), answer("b")),  # type: ignore[arg-type]
        text(ask, answer(None, tool_calls=[{"function": {"name": "f", "arguments": {}}}]), answer("b")),  # type: ignore[arg-type]
        text(ask, answer("a"), [{"role": "user", "content": "b"}]),  # type: ignore[arg-type]
        text(ask, [], answer("b")),  # type: ignore[arg-type]
    ]
    data = run(rows, drop_rows=ALL)
    assert [(d.row, d.reason) for d in data.drops] == [(2, "empty"), (3, "empty"), (5, "invalid"), (6, "invalid")]


def test_answers_that_a_template_trims_alike_are_identical() -> None:
    """llama2's template strips contents: equal ids, though not equal texts."""
    tok = AutoTokenizer.from_pretrained(str(GOLDEN / "tokenizers" / "llama2"))
    chat = [{"role": "user", "content": "q"}]
    row = text(chat, [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "a  "}])  # type: ignore[arg-type]
    data = prepare([row], lambda: tok, options=DataOptions(use_cache=False, drop_rows=ALL))
    assert [d.reason for d in data.drops] == ["identical"]


def test_nothing_left_says_why() -> None:
    rows = [MIXED[i] for i in (2, 3, 6)]
    data = run(rows, drop_rows=ALL)
    with pytest.raises(UserError) as error:
        data.require_pairs()
    said = error.value.message.splitlines()
    assert error.value.name == "data-nothing-left" and said[0].startswith("rows: 3 rows read, 0 kept")
    assert said[1:] == [
        "  invalid: 1 (row 1; row 1: rejected is null)",
        "  empty: 1 (row 2; row 2: chosen is empty)",
        "  identical: 1 (row 3; row 3: chosen and rejected are the same tokens)",
    ]
    run(MIXED).require_pairs()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop_rows": ("emty",)}, "drop_rows has 'emty'. Known: invalid, empty"),
        ({"truncation_mode": "keep_middle"}, "expected keep_start or keep_end"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_prompt_length": -1}, "max_prompt_length is -1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DataOptions(**options)


def test_dropped_rows_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "dropped.jsonl"
    path.write_text("old")
    drops = {"train": [Drop("a.jsonl", 3, "empty", "Lindö")], "eval": [Drop("b.jsonl", 1, "too_long", "x")]}
    write_drops(path, drops)
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {"set": "train", "file": "a.jsonl", "row": 3, "reason": "empty", "detail": "Lindö"},
        {"set": "eval", "file": "b.jsonl", "row": 1, "reason": "too_long", "detail": "x"},
    ]
    write_drops(path, {"train": []})
    assert path.read_text() == "" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot be written"):
        write_drops(tmp_path / "no" / "dropped.jsonl", drops)


def test_rows_in_words() -> None:
    assert name_rows([4]) == "row 4"
    assert name_rows(list(range(1, 12)), most=3) == "rows 1, 2, 3 and 8 more"
