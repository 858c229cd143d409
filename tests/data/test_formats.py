"""Layouts of other tools. Oracle: the same pairs written by hand in TRL's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jax_dpo.data.formats import Reading, columns_to_read, is_transcript, read_as
from jax_dpo.data.load import load_rows
from jax_dpo.data.pairs import READ_COLUMNS
from jax_dpo.data.prepare import DataOptions, PreparedData, prepare
from jax_dpo.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
TOKENIZER = AutoTokenizer.from_pretrained(str(GOLDEN / "tokenizers" / "chatml"))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASK, GOOD, BAD = said("user", "Which bin?"), said("assistant", "The food one."), said("assistant", "Any.")
EARLIER = [said("system", "Be brief."), said("user", "Hello"), said("assistant", "Hi.")]
WANT = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}


def run(rows: list[Any], **options: Any) -> PreparedData:
    return prepare(rows, lambda: TOKENIZER, name="rows", options=DataOptions(**{"use_cache": False} | options))


def ids(rows: list[Any], **options: Any) -> list[list[list[int]]]:
    data = run(rows, **options)
    parts = [data.pairs.tree(i) for i in range(len(data.pairs))]
    return [[list(map(int, x)) for x in (part[0], part[1], part[3])] for part in parts]


def sharegpt(message: dict[str, str]) -> dict[str, str]:
    return {
        "from": {"user": "human", "assistant": "gpt"}.get(message["role"], message["role"]),
        "value": message["content"],
    }


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [sharegpt(ASK)], "chosen": sharegpt(GOOD), "rejected": sharegpt(BAD)},
        {"conversations": [sharegpt(ASK)], "chosen": [sharegpt(GOOD)], "rejected": [sharegpt(BAD)]},
        {"conversation": [ASK], "chosen": GOOD, "rejected": BAD},
        {"messages": [ASK], "chosen": "The food one.", "rejected": "Any."},
        {"messages": [ASK], "chosen_response": [GOOD], "rejected_response": [BAD]},
        # Argilla's and UltraFeedback's: the prompt as text, and once more in both answers.
        {"prompt": "Which bin?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "Which bin?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {
            "chosen": [said("Human", "Which bin?"), said("Assistant", "The food one.")],
            "rejected": [said("human", "Which bin?"), said("ai", "Any.")],
        },
        {
            "prompt": [said("prompter", "Which bin?")],
            "chosen": [said("model", "The food one.")],
            "rejected": [said("bot", "Any.")],
        },
    ],
)
def test_other_layouts_are_read_as_trls(row: dict[str, Any]) -> None:
    assert ids([row]) == ids([WANT])
    warnings = [w for w in run([row]).warnings if "read as TRL's layout" in w]
    assert len(warnings) == 1 and "data_format: trl" in warnings[0]


def test_several_turns() -> None:
    want = {**WANT, "prompt": [*EARLIER, ASK]}
    apart = {"conversations": list(map(sharegpt, [*EARLIER, ASK])), "chosen": sharegpt(GOOD), "rejected": sharegpt(BAD)}
    repeated = {"prompt": [*EARLIER, ASK], "chosen": [*EARLIER, ASK, GOOD], "rejected": [*EARLIER, ASK, BAD]}
    assert ids([want]) == ids([apart]) == ids([repeated])


@pytest.mark.parametrize("name", ["instruction", "question", "query", "input"])
def test_text_under_other_names(name: str) -> None:
    want = {"prompt": "Which bin? ", "chosen": "Food.", "rejected": "Any."}
    assert ids([{name: "Which bin? ", "chosen": "Food.", "rejected": "Any."}]) == ids([want])
    # Answers that hold the prompt already have it as their common beginning, as in TRL.
    whole = {name: "Which bin? ", "chosen": "Which bin? Food.", "rejected": "Which bin? Any."}
    assert ids([whole]) == ids([{k: whole[k] for k in ("chosen", "rejected")}])


@pytest.mark.parametrize(
    "row",
    [
        WANT,
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": "a b", "rejected": "a c"},
        # The three columns win over whatever stands beside them.
        {
            **WANT,
            "messages": [said("user", "no"), said("assistant", "no")],
            "conversations": [{"from": "human", "value": "no"}],
        },
        {"prompt": "a", "chosen": "b", "rejected": "c", "question": "no", "instruction": "no"},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD]},
    ],
)
def test_trls_own_layouts_are_left_alone(row: dict[str, Any]) -> None:
    found = read_as([row])
    assert not found.said and found[0] is row
    assert not [w for w in run([row]).warnings if "layout" in w]


def test_a_repeated_prompt_in_text_is_told() -> None:
    """It may be meant, so it is said and not done."""
    row = {"prompt": "Name one: ", "chosen": "Name one: two", "rejected": "Name one: three"}
    assert any("data_format: repeated_prompt" in w for w in run([row]).warnings)
    assert ids([row], data_format="repeated_prompt") == ids(
        [{"prompt": "Name one: ", "chosen": "two", "rejected": "three"}]
    )


def test_transcripts() -> None:
    turns = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    row = {"chosen": turns + " One two", "rejected": turns + " One three"}
    assert is_transcript(row) and not is_transcript({"chosen": "a", "rejected": "b"})
    want = {"prompt": turns, "chosen": " One two", "rejected": " One three"}
    assert ids([row], data_format="transcript") == ids([want])
    # Without a shared turn of the assistant there is nothing to split at: TRL's split stays.
    other = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: b"}
    assert read_as([row, other], Reading("transcript"))[1] == other


def test_a_layout_that_is_told_must_be_there() -> None:
    for data_format in ("sharegpt", "repeated_prompt", "transcript"):
        with pytest.raises(UserError, match=f"data_format is {data_format}, and none of its first 1 rows"):
            run([WANT], data_format=data_format)
    assert ids([WANT], data_format="trl") == ids([WANT])


def test_trl_takes_rows_as_they_are() -> None:
    apart = {"conversations": [sharegpt(ASK)], "chosen": sharegpt(GOOD), "rejected": sharegpt(BAD)}
    (drop,) = run([apart], data_format="trl").drops
    assert "chosen is an object" in drop.detail
    narrator = {**WANT, "prompt": [said("narrator", "It rains."), ASK]}
    assert len(run([narrator], data_format="trl").pairs) == 1
    (drop,) = run([narrator]).drops
    assert "prompt[0].role is 'narrator', expected one of system, developer, user, assistant, tool" in drop.detail


def call(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


def test_tool_arguments() -> None:
    as_text, as_object = ({"prompt": [ASK], "chosen": [call(a)], "rejected": [BAD]} for a in ('{"a": 1}', {"a": 1}))
    assert ids([as_text], tool_arguments="parsed") == ids([as_object]) == ids([as_object], tool_arguments="parsed")
    assert ids([as_text]) != ids([as_object])
    # What is no JSON object stays as it is.
    for other in ("not json", "[1]", ""):
        row = {"prompt": [ASK], "chosen": [call(other)], "rejected": [BAD]}
        assert ids([row], tool_arguments="parsed") == ids([row])
        assert not any("tool_arguments" in w for w in run([row]).warnings)


def test_columns_that_are_read_of_a_wide_file(tmp_path: Path) -> None:
    """Only where TRL's three are not all there are others looked at: they can be larger than the pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert columns_to_read(["prompt", "chosen", "rejected", "messages", "x"], READ_COLUMNS) == [
        "prompt",
        "chosen",
        "rejected",
    ]
    assert columns_to_read(["chosen", "rejected", "messages", "x"], READ_COLUMNS) == ["chosen", "rejected", "messages"]
    row = {"conversations": [sharegpt(ASK)], "chosen": sharegpt(GOOD), "rejected": sharegpt(BAD), "x": "no"}
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for _ in range(2)))
    for file in ("a.parquet", "a.jsonl"):
        data = prepare(load_rows(tmp_path / file), lambda: TOKENIZER, options=DataOptions(use_cache=False))
        assert data.facts.unread_columns == ["x"]
        assert len(data.pairs) == 2 and data.facts.read_as


def test_the_cache_knows_how_rows_were_read(tmp_path: Path) -> None:
    turns = "\n\nHuman: a?\n\nAssistant:"
    row = {"chosen": turns + " One two", "rejected": turns + " One three"}
    options = {"use_cache": True, "cache_dir": tmp_path}
    first, told = run([row], **options), run([row], **options, data_format="transcript")
    assert not told.from_cache and run([row], **options).from_cache
    assert len(told.pairs.tree(0)[0]) != len(first.pairs.tree(0)[0])
