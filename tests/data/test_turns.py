"""Which tokens of answers of several turns are trained on, system turns, pairs that are too long.

Oracle: conversations rendered by the chat template turn by turn and encoded by hand; for the rest the same rows written as they should be
read.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from jax_dpo.data.batch import Placed, empty_batch, fill_rows
from jax_dpo.data.pack import RowShape
from jax_dpo.data.prepare import DataOptions, PreparedData, prepare
from jax_dpo.data.turns import scored_tokens
from jax_dpo.errors import UserError

TOKENIZER = AutoTokenizer.from_pretrained(str(Path(__file__).parent.parent / "golden" / "tokenizers" / "chatml"))
# Writes an empty thought before the assistant's last turn, as Qwen3's does, and opens one where it is invited.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
# Says how many turns follow, so that no turn is written as it is alone.
COUNTING = (
    "{% for m in messages %}{{ messages | length - loop.index }} {{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TURNS = [assistant("The food one."), user("And paper?"), assistant("The blue one.")]
ROW = {"prompt": [user("Which bin?")], "chosen": TURNS, "rejected": [assistant("Any."), user("Why?"), assistant("No.")]}
SHORT = {"prompt": [user("Which bin?")], "chosen": [assistant("Blue.")], "rejected": [assistant("Any.")]}


def run(rows: list[Any], tokenizer: Any = TOKENIZER, **options: Any) -> PreparedData:
    return prepare(rows, lambda: tokenizer, name="rows", options=DataOptions(**{"use_cache": False} | options))


def with_template(template: str) -> Any:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def scored(data: PreparedData, i: int = 0) -> list[str]:
    """The tokens of both answers that are trained on, decoded."""
    tree = data.pairs.tree(i)
    assert tree.scored is not None
    return [TOKENIZER.decode(ids[marks]) for ids, marks in zip((tree.chosen, tree.rejected), tree.scored)]


def test_turns_of_the_assistant_are_scored_to_the_token_that_ends_them() -> None:
    first, second = "The food one.<|im_end|>\n", "The blue one.<|im_end|>\n"
    rejected = ("Any.<|im_end|>\n", "No.<|im_end|>\n")
    data = run([ROW], completion_turns="assistant")
    assert scored(data) == [first + second, "".join(rejected)]
    assert scored(run([ROW], completion_turns="last")) == [second, rejected[1]]
    # The ids are those of TRL, whichever of them are trained on.
    plain = run([ROW])
    assert [x.tolist() for x in plain.pairs.prepared(0)] == [x.tolist() for x in data.pairs.prepared(0)]
    assert plain.pairs.tree(0).scored is None and not len(plain.pairs.table.scored)
    assert data.pairs.scored_lengths().tolist() == [
        [len(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in scored(data)]
    ]


def test_what_a_batch_trains_on() -> None:
    """Places and lengths in a packed row: those of the marked tokens, each predicted by the one before it."""
    data = run([ROW], completion_turns="last")
    tree = data.pairs.tree(0)
    batch = empty_batch(1, RowShape(128, 64, 2, 1), token_weight=True)
    fill_rows(batch, 0, [[Placed(0, 1.0)]], data.pairs.tree, ld_alpha=0.25)
    real = batch.slot[0] < 4
    assert real.sum() == data.pairs.scored_lengths().sum()
    for side, (ids, marks) in enumerate(zip((tree.chosen, tree.rejected), tree.scored or ())):
        here = batch.slot[0] == side
        assert batch.target[0][here].tolist() == ids[marks].tolist()
        before = np.concatenate([tree.chosen_prompt[-1:], ids])[:-1][marks]
        assert batch.tokens[0][batch.source[0][here]].tolist() == before.tolist()
        assert batch.length[0, 0, side] == marks.sum()
        shorter = min(len(tree.chosen), len(tree.rejected))  # LD-DPO counts places in the answer
        want = np.where(np.flatnonzero(marks) < shorter, 1.0, 0.25)
        assert batch.token_weight[0][here].tolist() == want.tolist()


def test_answers_of_one_turn_are_the_same_with_each() -> None:
    for turns in ("assistant", "last"):
        data = run([SHORT], completion_turns=turns)
        assert data.pairs.tree(0).scored is None
        # Beside a row of several turns too.
        mixed = run([SHORT, ROW], completion_turns=turns)
        tree = mixed.pairs.tree(0)
        assert all(m.all() for m in tree.scored or ()) and tree.scored is not None
        assert mixed.pairs.scored_lengths()[0].tolist() == [len(tree.chosen), len(tree.rejected)]
    text = {"prompt": "a", "chosen": " b", "rejected": " c"}
    assert run([text], completion_turns="last").pairs.content_hash() == run([text]).pairs.content_hash()


def test_tool_results_and_an_implicit_prompt() -> None:
    call = {"role": "assistant", "content": "Let me look."}
    found = {"role": "tool", "content": "blue"}
    row = {"chosen": [user("Which?"), call, found, assistant("Blue.")], "rejected": [user("Which?"), assistant("Any.")]}
    assert scored(run([row], completion_turns="assistant")) == [
        "Let me look.<|im_end|>\nBlue.<|im_end|>\n",
        "Any.<|im_end|>\n",
    ]
    assert scored(run([row], completion_turns="last"))[0] == "Blue.<|im_end|>\n"


def test_a_template_that_writes_the_last_turn_differently() -> None:
    thinking = with_template(THINKING)
    thought = "<think>\n\n</think>\n\n"
    data = run([ROW], thinking, completion_turns="assistant")
    # The first turn is there without the thought that it would have as the last one; the other's begins behind its invitation.
    assert (
        scored(data)[0] == "The food one.<|im_end|>\n" + thought.removeprefix("<think>") + "The blue one.<|im_end|>\n"
    )
    assert (
        scored(run([ROW], thinking, completion_turns="last"))[1] == thought.removeprefix("<think>") + "No.<|im_end|>\n"
    )


def test_a_template_whose_turns_cannot_be_told_apart_is_said_by_row() -> None:
    data = run([ROW, SHORT], with_template(COUNTING), completion_turns="assistant")
    assert [(d.row, d.reason) for d in data.drops] == [(1, "invalid")]
    assert "turn 3 of an answer" in data.drops[0].detail and "completion_turns: all" in data.drops[0].detail
    assert len(run([ROW, SHORT], with_template(COUNTING)).pairs) == 2


def test_turns_that_max_length_cuts_off_leave_the_pair_out() -> None:
    whole = len(run([ROW]).pairs.prepared(0)[0]) + 8
    data = run([ROW, SHORT], completion_turns="last", max_length=whole)
    assert [(d.row, d.reason) for d in data.drops] == [(1, "too_long")]
    assert "completion_turns" in data.drops[0].detail and len(data.pairs) == 1
    assert data.pairs.index.tolist() == [1]
    # keep_end keeps the end.
    assert len(run([ROW, SHORT], completion_turns="last", max_length=whole, truncation_mode="keep_end").pairs) == 2


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast, chat_template, eos_token, eos_token_id = False, "x", "</s>", 2

    with pytest.raises(UserError, match="completion_turns is last, and the tokenizer \\(Slow\\)"):
        run([ROW], Slow(), completion_turns="last")
    assert scored_tokens(lambda m, o: "", [], [assistant("a")], "a", np.array([[0, 1]]), "last") == np.array([True])


SYSTEM = {"role": "system", "content": "Be brief."}


def same(rows: list[Any], as_if: list[Any], **options: Any) -> None:
    got, want = run(rows, **options), run(as_if)
    assert len(got.pairs) == len(want.pairs) == len(rows)
    assert got.pairs.content_hash() == want.pairs.content_hash()


def test_a_system_turn_is_merged_where_that_is_told() -> None:
    merged = [user("Be brief.\n\nWhich bin?")]
    row = {**SHORT, "prompt": [SYSTEM, *SHORT["prompt"]]}
    same([row, SHORT], [{**SHORT, "prompt": merged}, SHORT], system_turn="merged")
    whole = {side: [SYSTEM, *SHORT["prompt"], *SHORT[side]] for side in ("chosen", "rejected")}
    same([whole], [{side: [*merged, *SHORT[side]] for side in ("chosen", "rejected")}], system_turn="merged")
    parts = {**SHORT, "prompt": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "Which bin?"}]}]}
    same([parts], [{**SHORT, "prompt": merged}], system_turn="merged")
    # Nothing to merge into: left to the template.
    alone = {**SHORT, "prompt": [SYSTEM]}
    same([alone], [alone], system_turn="merged")


def test_a_system_column_is_the_system_turn_where_that_is_told() -> None:
    row = {**SHORT, "system": "Be brief."}
    with_turn = {**SHORT, "prompt": [SYSTEM, *SHORT["prompt"]]}
    same([row, {**SHORT, "system": None}, {**SHORT, "system": " "}], [with_turn, SHORT, SHORT], system_column=True)
    same([{**with_turn, "system": "Something else."}], [with_turn], system_column=True)
    same([row], [{**SHORT, "prompt": [user("Be brief.\n\nWhich bin?")]}], system_column=True, system_turn="merged")
    same([row], [SHORT])
    assert any("columns that are not read: system" in w for w in run([row]).warnings)
    assert not any("not read" in w for w in run([row], system_column=True).warnings)


def test_a_refused_system_turn_names_the_ways_out() -> None:
    refusing = with_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + TOKENIZER.chat_template
    )
    row = {**SHORT, "prompt": [SYSTEM, *SHORT["prompt"]]}
    data = run([row, SHORT], refusing)
    assert "System role not supported; system_turn: merged puts" in data.drops[0].detail
    assert len(run([row, SHORT], refusing, system_turn="merged").pairs) == 2


def test_overlong_pairs_are_cut_or_dropped() -> None:
    long = {**SHORT, "rejected": [assistant("word " * 40)]}
    limit = 40
    cut = run([long, SHORT], max_length=limit)
    assert cut.cut == 1 and len(cut.pairs) == 2
    for mode in ("keep_start", "keep_end"):
        dropped = run([long, SHORT], max_length=limit, overlong="drop", truncation_mode=mode)
        tokens = len(dropped.pairs.table.ids[: dropped.pairs.table.bounds[1]]) + int(
            np.diff(dropped.pairs.table.bounds)[2]
        )
        assert dropped.cut == 0 and dropped.pairs.index.tolist() == [1]
        assert [(d.row, d.reason) for d in dropped.drops] == [(1, "too_long")]
        assert dropped.drops[0].detail == f"prompt and answer have {tokens} tokens, max_length is {limit}"
        assert any("1 row left out" in w and "overlong" in w for w in dropped.warnings)
    exact = int(run([long]).pairs.sequence_lengths().max())
    assert len(run([long], max_length=exact, overlong="drop").pairs) == 1
    assert len(run([long], max_length=exact - 1, overlong="drop").pairs) == 0
    # What max_prompt_length takes off a prompt is not over.
    asked = {**SHORT, "prompt": [user("word " * 40)]}
    assert len(run([asked], max_length=limit, overlong="drop").pairs) == 0
    assert len(run([asked], max_length=limit, max_prompt_length=10, overlong="drop").pairs) == 1
