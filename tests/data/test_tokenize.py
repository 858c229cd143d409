"""Text to ids, boundary, filter and truncation, against what TRL 1.16 made of the same rows (tests/golden/tokenization)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_dpo.data.load import load_rows
from jax_dpo.data.prepare import DataOptions, PreparedData, prepare
from jax_dpo.data.tokenize import common_prefix, tokenize_rows, tokenizer_fingerprint
from jax_dpo.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
FILES = sorted(p.stem for p in (GOLDEN / "tokenization").glob("*.json") if p.stem != "errors")


@cache
def tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(GOLDEN / "tokenizers" / name))


@cache
def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "tokenization" / f"{name}.json").read_text("utf-8"))


def prepared(name: str, **options: Any) -> PreparedData:
    g = golden(name)
    options = {"max_length": None, "use_cache": False, "drop_rows": ()} | options
    return prepare(g["rows"], lambda: tokenizer(g["tokenizer"]), options=DataOptions(**options))


def test_there_are_twelve_files() -> None:
    assert len(FILES) == 12


@pytest.mark.parametrize("name", FILES)
def test_ids_of_every_row(name: str) -> None:
    data = prepared(name)
    got = list(data.pairs.rows())
    want = golden(name)["prepared"]
    assert len(got) == len(want) > 2
    for row, w in zip(got, want):
        assert row == {k: v for k, v in w.items() if k != "row"}, f"row {w['row']}"


@pytest.mark.parametrize("name", FILES)
def test_filter_and_truncation_of_every_config(name: str) -> None:
    """The rows that are kept, and each batch's ids, masks and length, under all six option sets of the file."""
    g = golden(name)
    for conf in g["configs"]:
        o = conf["options"]
        data = prepared(name, max_length=o["max_length"], truncation_mode=o["truncation_mode"])
        assert data.pairs.index.tolist() == conf["kept_rows"]
        assert {d.reason for d in data.drops} <= {"too_long"}
        assert [d.row for d in data.drops] == [i + 1 for i in range(len(g["rows"])) if i not in conf["kept_rows"]]
        for batch in conf["batches"]:
            check_batch(data, batch)


def check_batch(data: PreparedData, batch: dict[str, Any]) -> None:
    """All chosen rows of a batch, then all rejected ones, padded on the right."""
    n = len(batch["rows"])
    attention, completion = (np.asarray(batch[k]) for k in ("attention_mask", "completion_mask"))
    place = {row: i for i, row in enumerate(data.pairs.index.tolist())}
    for k, row in enumerate(batch["rows"]):
        i = place[row]
        tree = data.pairs.tree(i)
        sides = ((tree.chosen_prompt, tree.chosen), (tree.rejected_prompt, tree.rejected))
        for side, (prompt, answer) in enumerate(sides):
            r = k + side * n
            length = int(attention[r].sum())
            ids = batch["input_ids"][r][:length]
            assert [*prompt.tolist(), *answer.tolist()] == ids
            assert [0] * len(prompt) + [1] * len(answer) == completion[r][:length].tolist()
            assert data.pairs.sequence_lengths()[i, side] == length
            assert data.pairs.lengths()[i, 1 + side] == completion[r].sum()
            assert data.pairs.branch_lengths()[i, 2 * side] == length - completion[r].sum()
        assert data.pairs.shared[i] == tree.shared == (len(tree.chosen_prompt) == len(tree.rejected_prompt))


def test_cut_pairs_are_counted() -> None:
    """Oracle: the recorded batches; a sequence is cut where the uncut one is longer than max_length."""
    data = prepared("text_explicit_chatml", max_length=48)
    whole = {
        w["row"]: [len(w["prompt_ids"]) + len(w[k]) for k in ("chosen_ids", "rejected_ids")]
        for w in golden("text_explicit_chatml")["prepared"]
    }
    want = [any(n > 48 for n in whole[row]) for row in data.pairs.index.tolist()]
    assert data.pairs.cut.tolist() == want
    assert data.cut == sum(want) > 0
    assert data.counts["cut"] == data.cut
    assert data.counts["dropped"] == {"too_long": 1}


def test_keep_end_gives_prompts_of_their_own() -> None:
    data = prepared("text_explicit_chatml", max_length=20, truncation_mode="keep_end")
    apart = np.flatnonzero(~data.pairs.shared)
    assert len(apart) > 0
    with pytest.raises(ValueError, match="two prompts"):
        data.pairs.pair(int(apart[0]))
    lengths = data.pairs.branch_lengths()
    assert np.array_equal(data.pairs.tree_lengths(), np.where(data.pairs.shared, lengths[:, 1:].sum(1), lengths.sum(1)))
    assert np.array_equal(data.pairs.tree_lengths(share_prompt=False), lengths.sum(1))


def test_prompts_are_cut_on_the_left_before_the_filter() -> None:
    """max_prompt_length is old TRL's `prompt_ids[-n:]`; with it no prompt of the file reaches max_length 48."""
    whole = {w["row"]: w for w in golden("text_explicit_chatml")["prepared"]}
    data = prepared("text_explicit_chatml", max_length=48, max_prompt_length=6)
    assert len(data.pairs) == 13 and not data.drops
    for i, row in enumerate(data.pairs.index.tolist()):
        prompt, chosen, _ = data.pairs.pair(i)
        assert prompt.tolist() == whole[row]["prompt_ids"][-6:]
        assert chosen.tolist() == whole[row]["chosen_ids"][: 48 - len(prompt)]
        assert data.pairs.prompt_cut[i] == (len(whole[row]["prompt_ids"]) > 6)


def test_scored_lengths_leave_out_a_first_token_that_nothing_predicts() -> None:
    data = prepared("text_explicit_chatml")
    empty = data.pairs.index.tolist().index(10)  # the row with an empty prompt
    lengths, scored = data.pairs.lengths(), data.pairs.scored_lengths()
    assert lengths[empty, 0] == 0
    assert scored[empty].tolist() == (lengths[empty, 1:] - 1).tolist()
    rest = np.delete(np.arange(len(scored)), empty)
    assert np.array_equal(scored[rest], lengths[rest, 1:])


def test_moved_boundaries_are_reported() -> None:
    """README of the golden files: in text rows 0 and 4 a token merges over the prompt's end."""
    data = prepared("text_explicit_chatml")
    assert [i for i in range(13) if data.pairs.table.flags[i] & 8] == [0, 4]
    assert any("2 rows" in w and "tokens merge" in w for w in data.warnings)
    kwargs = prepared("conversation_template_kwargs_chatml")
    assert "think" in kwargs.facts.moved_end


@pytest.mark.parametrize(
    ("label", "rows", "tok", "words"),
    [
        ("implicit, chosen is empty", [{"chosen": "", "rejected": "x"}], "chatml", "chosen is empty"),
        ("rejected column missing", [{"prompt": "a", "chosen": "b"}], "chatml", "rejected is missing"),
        ("prompt is null", [{"prompt": None, "chosen": "a", "rejected": "b"}], "chatml", "prompt is null"),
        (
            "llama2 template, roles do not alternate",
            [
                {
                    "prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
                    "chosen": [{"role": "assistant", "content": "c"}],
                    "rejected": [{"role": "assistant", "content": "d"}],
                }
            ],
            "llama2",
            "Roles must alternate",
        ),
    ],
)
def test_rows_that_trl_refuses(label: str, rows: list[dict[str, Any]], tok: str, words: str) -> None:
    """Each case of errors.json: an error that names the row under drop_rows [], a drop that names it under [invalid]."""
    assert label in json.loads((GOLDEN / "tokenization" / "errors.json").read_text("utf-8"))
    with pytest.raises(UserError, match=f"row 1: .*{words}") as error:
        prepare(rows, lambda: tokenizer(tok), options=DataOptions(use_cache=False, drop_rows=()))
    assert error.value.name == "row-invalid"
    data = prepare(rows, lambda: tokenizer(tok), options=DataOptions(use_cache=False))
    assert [(d.row, d.reason) for d in data.drops] == [(1, "invalid")] and words in data.drops[0].detail
    assert len(data.pairs) == 0
    with pytest.raises(UserError, match=f"1 rows read, 0 kept.*\n.*invalid: 1 .row 1; row 1: .*{words}"):
        data.require_pairs()


def test_a_template_error_leaves_the_other_rows_alone() -> None:
    """The ids of good rows in a batch with a refused one are those of the golden file."""
    g = golden("conversation_explicit_llama2")
    turn = {"role": "user", "content": "again"}
    rows = [*g["rows"][:2], g["rows"][0] | {"prompt": [turn, turn]}, *g["rows"][2:]]
    data = prepare(rows, lambda: tokenizer("llama2"), options=DataOptions(max_length=None, use_cache=False))
    assert [d.row for d in data.drops] == [3]
    want = [{k: v for k, v in w.items() if k != "row"} for w in g["prepared"]]
    assert list(data.pairs.rows()) == want
    assert data.pairs.index.tolist() == [0, 1, *range(3, len(rows))]


def test_batches_over_the_chunk_size_keep_their_order() -> None:
    """More rows than one chunk holds: each row's ids are those of the row alone."""
    g = golden("text_explicit_llama2")
    n, seen = 1100, []
    rows = [g["rows"][i % 13] for i in range(n)]
    table = tokenize_rows(load_rows(rows), tokenizer("llama2"), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (n, n) and len(seen) > 2
    for i in (0, 511, 512, 700, 1099):
        want = g["prepared"][i % 13]
        a, b = int(table.bounds[3 * i]), int(table.bounds[3 * i + 3])
        assert table.ids[a:b].tolist() == want["prompt_ids"] + want["chosen_ids"] + want["rejected_ids"]
    assert table.twin.tolist() == [i % 13 for i in range(n)]


def test_conversations_without_a_chat_template() -> None:
    import copy

    bare = copy.deepcopy(tokenizer("chatml"))
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template") as error:
        tokenize_rows(load_rows(golden("conversation_explicit_chatml")["rows"]), bare)
    assert error.value.name == "chat-template-missing"


def test_text_without_an_end_of_sequence_token() -> None:
    import copy

    bare = copy.deepcopy(tokenizer("chatml"))
    bare.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        tokenize_rows(load_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}]), bare)


def test_half_a_surrogate_pair_names_its_row() -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b\ud83d", "rejected": "c"}]
    data = prepare(rows, lambda: tokenizer("chatml"), options=DataOptions(use_cache=False))
    assert [(d.row, d.reason) for d in data.drops] == [(2, "invalid")] and "surrogate" in data.drops[0].detail


def test_tool_calls_with_null_content() -> None:
    """Oracle: apply_chat_template(tokenize=True), which TRL calls. Null content must not become the text None."""
    tok = tokenizer("chatml")
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
    row = {
        "prompt": [{"role": "user", "content": "go"}],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }
    data = prepare([row], lambda: tok, options=DataOptions(use_cache=False, drop_rows=("invalid", "empty")))
    prompt, chosen, _ = data.pairs.pair(0)
    want = tok.apply_chat_template(row["prompt"] + row["chosen"], tools=row["tools"], tokenize=True)["input_ids"]
    assert [*prompt.tolist(), *chosen.tolist()] == want
    assert "None" not in tok.decode(chosen.tolist())


def test_fingerprint_follows_the_tokenizer(tmp_path: Path) -> None:
    import copy
    import shutil

    tok = tokenizer("chatml")
    one = tokenizer_fingerprint(tok)
    tok("some text", truncation=True, max_length=3)
    assert tokenizer_fingerprint(tok) == one != tokenizer_fingerprint(tokenizer("llama2"))
    changed = copy.deepcopy(tok)
    changed.chat_template += " "
    assert tokenizer_fingerprint(changed) != one
    for name in ("a", "b"):
        shutil.copytree(GOLDEN / "tokenizers" / "chatml", tmp_path / name)
    assert tokenizer_fingerprint(tmp_path / "a") == tokenizer_fingerprint(tmp_path / "b")
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_fingerprint(tmp_path / "a") != tokenizer_fingerprint(tmp_path / "b")


def test_common_prefix() -> None:
    a = np.array([1, 2, 3])
    assert [common_prefix(a, np.array(b, int)) for b in ([1, 2, 3], [1, 2], [1, 9, 3], [9], [])] == [3, 2, 1, 0, 0]
