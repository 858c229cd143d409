"""Rows to pairs. Oracle of the extraction: the `extracted` rows that TRL 1.16 made (tests/golden/tokenization)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jax_dpo.data.pairs import Layout, Pair, extract_prompt, is_blank, layout_of, read_pair, score_gap, torn
from jax_dpo.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenization"
IMPLICIT = sorted(p.stem for p in GOLDEN.glob("*_implicit_*.json"))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("name", IMPLICIT)
def test_common_beginning(name: str) -> None:
    g = json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))
    eos = {"chatml": "<|im_end|>", "llama2": "</s>"}[g["tokenizer"]]
    for i, (row, want) in enumerate(zip(g["rows"], g["extracted"])):
        prompt, *answers = extract_prompt(row["chosen"], row["rejected"])
        if name.startswith("text"):
            answers = [a if a.endswith(eos) else a + eos for a in answers]
        assert [prompt, *answers] == [want["prompt"], want["chosen"], want["rejected"]], i


def test_a_split_at_the_start_tears_the_pair_as_in_trl() -> None:
    assert extract_prompt("alpha ", "beta") == ("alpha", " ", "a")
    assert torn("alpha ", "beta")
    assert not torn("alpha", "beta"), "nothing is torn without the space"
    assert not torn("alpha ", "alp"), "nor where there is a common beginning"
    assert not torn([user("a")], [user("b")])


def test_layout_is_the_first_deciding_rows() -> None:
    text, chat = {"chosen": "a", "rejected": "b"}, {"chosen": [user("a"), assistant("b")], "rejected": []}
    assert layout_of([text, chat], "x") == Layout(False, False)
    assert layout_of([chat, text], "x") == Layout(False, True)
    assert layout_of([{"prompt": "p"} | text], "x") == Layout(True, False)
    assert layout_of([{"prompt": [user("a")], "chosen": [], "rejected": None}], "x") == Layout(True, True)
    assert layout_of([None, {"messages": [], **chat}], "x") == Layout(False, True)


def test_no_rows_and_images() -> None:
    with pytest.raises(UserError, match="holds no rows"):
        layout_of([], "pairs.jsonl")
    with pytest.raises(UserError, match="images"):
        layout_of([{"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x"]}], "pairs.jsonl")


TEXT, CHAT = Layout(True, False), Layout(True, True)
GOOD = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


@pytest.mark.parametrize(
    ("layout", "row", "words"),
    [
        (TEXT, None, "the row is null"),
        (TEXT, [1], "the row is a list"),
        (TEXT, {"prompt": "a", "chosen": "b"}, "rejected is missing; the row has 'prompt', 'chosen'"),
        (TEXT, {"prompt": "a", "chosen": None, "rejected": "c"}, "chosen is null"),
        (TEXT, {"prompt": "a", "chosen": 3, "rejected": "c"}, r"chosen is a number \(3\), text was expected"),
        (TEXT, {"prompt": "a", "chosen": [assistant("x")], "rejected": "c"}, "chosen is a list"),
        (Layout(False, False), {"prompt": "a", "chosen": "b", "rejected": "c"}, "the first row has none"),
        (Layout(False, False), {"chosen": "b", "rejected": ""}, "rejected is empty, and without a prompt"),
        (Layout(False, True), {"chosen": [assistant("b")], "rejected": [assistant("c")]}, "no first message in common"),
        (CHAT, GOOD | {"chosen": []}, "chosen is an empty list"),
        (CHAT, GOOD | {"prompt": "q"}, "prompt is text, a list of messages was expected.*remove the prompt column"),
        (CHAT, GOOD | {"chosen": ["a"]}, r"chosen\[0\] is text, a message with role"),
        (CHAT, GOOD | {"chosen": [{"content": "a"}]}, r"chosen\[0\].role is missing"),
        (CHAT, GOOD | {"chosen": [{"role": 1, "content": "a"}]}, r"chosen\[0\].role is a number \(1\)"),
        (CHAT, GOOD | {"chosen": [{"role": "assistant", "content": 5}]}, r"chosen\[0\].content is a number"),
        (
            CHAT,
            GOOD | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            r"prompt\[0\].content has a part of type 'image'",
        ),
        (CHAT, GOOD | {"rejected": [user("b")]}, r"rejected\[0\].role is 'user': an answer must end in"),
        (CHAT, GOOD | {"tools": "{"}, "tools is not valid JSON"),
        (CHAT, GOOD | {"tools": {"a": 1}}, "tools is an object, a list"),
        (CHAT, GOOD | {"chat_template_kwargs": [1]}, "chat_template_kwargs is a list, an object"),
    ],
)
def test_invalid_rows_say_what_is_wrong(layout: Layout, row: Any, words: str) -> None:
    import re

    problem = read_pair(row, layout)
    assert isinstance(problem, str) and re.search(words, problem), problem


def test_an_answers_last_turn_is_counted_from_the_row() -> None:
    """Without a prompt column the place named is the one in the file."""
    row = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), user("b")]}
    assert (
        read_pair(row, Layout(False, True)) == "rejected[1].role is 'user': an answer must end in a turn of 'assistant'"
    )


def test_columns_for_the_template() -> None:
    pair = read_pair(GOOD | {"tools": "[]", "chat_template_kwargs": {"enable_thinking": False}}, CHAT)
    assert isinstance(pair, Pair)
    assert pair.tools == [] and pair.template_kwargs == {"enable_thinking": False}
    pair = read_pair(GOOD | {"tools": [{"type": "function"}], "chat_template_kwargs": None, "messages": []}, CHAT)
    assert isinstance(pair, Pair) and pair.tools == [{"type": "function"}] and pair.template_kwargs == {}


@pytest.mark.parametrize(
    ("row", "gap"),
    [
        ({"score_chosen": 8.5, "score_rejected": 6}, 2.5),
        ({"chosen_score": "3", "rejected_score": "1"}, 2.0),
        ({"chosen-rating": 1, "rejected-rating": 5}, -4.0),
        ({"score_chosen": None, "score_rejected": 1, "chosen_rating": 2, "rejected_rating": 1}, 1.0),
        ({"score_chosen": 1}, math.nan),
        ({"score_chosen": "n/a", "score_rejected": 1}, math.nan),
        ({"score_chosen": True, "score_rejected": False}, math.nan),
    ],
)
def test_score_gap(row: dict[str, Any], gap: float) -> None:
    got = score_gap(row)
    assert got == gap or (math.isnan(got) and math.isnan(gap))


def test_blank_answers() -> None:
    assert is_blank(" \n") and is_blank([assistant("  ")]) and is_blank([assistant(None)])
    assert is_blank([assistant([{"type": "text", "text": " "}])])  # type: ignore[arg-type]
    assert not is_blank("a")
    assert not is_blank([assistant(None) | {"tool_calls": [{"id": "1"}]}])
    assert not is_blank([assistant(""), user("a"), assistant("")])


ROW = {"prompt": "p", "chosen": "a", "rejected": "b", "beta": 0.2, "margin": -1, "label": 0.75, "weight": "3"}


def test_columns_are_read_where_they_are_named() -> None:
    layout = Layout(True, False)
    pair = read_pair(ROW, layout, ("weight", "margin"))
    assert isinstance(pair, Pair)
    assert math.isnan(pair.given[0]) and pair.given[1] == -1 and math.isnan(pair.given[2]) and pair.given[3] == 3
    assert all(map(math.isnan, read_pair(ROW, layout).given))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("beta", 0, "beta is a number (0), a number above 0 was expected"),
        ("beta", None, "beta is null"),
        ("margin", float("inf"), "margin is a number (inf), a number was expected"),
        ("margin", "wide", "margin is 'wide', a number was expected"),
        ("label", 1.25, "label is a number (1.25), a number from 0 to 1 was expected"),
        ("label", True, "label is a boolean (true)"),
        ("weight", -1, "a number of at least 0 was expected"),
        ("weight", float("nan"), "weight is a number (nan)"),
        ("weight", [1], "weight is a list"),
    ],
)
def test_a_number_that_cannot_be_makes_the_row_invalid(column: str, value: Any, words: str) -> None:
    problem = read_pair({**ROW, column: value}, Layout(True, False), (column,))
    assert words in str(problem)
    assert isinstance(read_pair({**ROW, column: value}, Layout(True, False)), Pair), "nobody reads it"


def test_a_column_that_a_row_lacks() -> None:
    row = {k: v for k, v in ROW.items() if k != "weight"}
    assert read_pair(row, Layout(True, False), ("weight",)) == "weight is missing, a number of at least 0 was expected"
