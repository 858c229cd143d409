"""Files of a tokenizer changed by hand. Oracle: what AutoTokenizer makes of them; every other byte as it came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jax_dpo.errors import UserError
from jax_dpo.weights.tokenizer_changes import (
    TokenizerChanges,
    change_files,
    eos_token_of,
    stop_at,
    template_of,
    write_files,
)
from jax_dpo.weights.tokenizer_files import read_tokenizer_files

CHATML = Path(__file__).parents[1] / "golden" / "tokenizers" / "chatml"


def with_config(**changes: Any) -> dict[str, bytes]:
    files = read_tokenizer_files(CHATML)
    config = {**json.loads(files["tokenizer_config.json"]), **changes}
    return {**files, "tokenizer_config.json": json.dumps(config).encode()}


def loaded(files: dict[str, bytes], folder: Path) -> Any:
    write_files(files, folder)
    return AutoTokenizer.from_pretrained(str(folder))


def test_nothing_is_written_anew_where_nothing_changes() -> None:
    files = read_tokenizer_files(CHATML)
    same = TokenizerChanges(template=files["chat_template.jinja"].decode(), eos_token="<|im_end|>")
    assert change_files(files, same, "x") == files


def test_a_word_that_ends_answers_is_one_token_for_every_reader(tmp_path: Path) -> None:
    """Also for a reader of tokenizer.json alone, and inside other text."""
    from tokenizers import Tokenizer

    files = read_tokenizer_files(CHATML)
    vocabulary = json.loads(files["tokenizer.json"])["model"]["vocab"]
    word = max((w for w in vocabulary if w.isalpha()), key=len)
    changed = change_files(files, TokenizerChanges(eos_token=word), "x")
    tokenizer = loaded(changed, tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (word, vocabulary[word])
    text = f"x{word}x"
    assert vocabulary[word] in tokenizer(text)["input_ids"]
    assert tokenizer(text)["input_ids"] == Tokenizer.from_str(changed["tokenizer.json"].decode()).encode(text).ids
    before = json.loads(files["tokenizer.json"])
    after = json.loads(changed["tokenizer.json"])
    assert [t for t in after["added_tokens"] if t["content"] != word] == before["added_tokens"]
    assert {**after, "added_tokens": None} == {**before, "added_tokens": None}


def test_the_end_is_changed_in_every_file_that_names_it(tmp_path: Path) -> None:
    """Also where it is written with its flags, as transformers 4 does."""
    flags = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    files = with_config(eos_token=flags) | {"special_tokens_map.json": json.dumps({"eos_token": flags}).encode()}
    assert eos_token_of(files) == "<|im_end|>"
    changed = change_files(files, TokenizerChanges(eos_token="<|endoftext|>"), "x")
    assert json.loads(changed["special_tokens_map.json"]) == {"eos_token": "<|endoftext|>"}
    assert loaded(changed, tmp_path).eos_token_id == 0


def test_a_template_that_lies_elsewhere_is_replaced_there_too(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "old"}, {"name": "rag", "template": "rag"}]
    for before, after in (("old", "new"), (named, [named[1], {"name": "default", "template": "new"}])):
        files = with_config(chat_template=before)
        del files["chat_template.jinja"]
        assert template_of(files) == "old"
        changed = change_files(files, TokenizerChanges(template="new"), "x")
        assert template_of(changed) == "new"
        assert json.loads(changed["tokenizer_config.json"])["chat_template"] == after
    assert template_of({"chat_template.json": b'{"chat_template": "old"}'}) == "old"
    changed = change_files({"chat_template.json": b'{"chat_template": "old"}'}, TokenizerChanges(template="new"), "x")
    assert changed == {"chat_template.jinja": b"new"}


def test_files_of_a_slow_tokenizer_get_a_tokenizer_json(tmp_path: Path) -> None:
    content = json.loads((CHATML / "tokenizer.json").read_text())
    merges = ["{} {}".format(*m) if isinstance(m, list) else m for m in content["model"]["merges"]]
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    files = {
        "vocab.json": json.dumps(
            content["model"]["vocab"] | {t["content"]: t["id"] for t in content["added_tokens"]}
        ).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges]).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    tokenizer = loaded(change_files(files, TokenizerChanges(eos_token="<|im_end|>"), "x"), tmp_path)
    assert tokenizer.eos_token_id == 2
    assert tokenizer("hi<|im_end|>")["input_ids"][-1] == 2


def test_a_token_that_is_not_there() -> None:
    with pytest.raises(UserError) as refused:
        change_files(read_tokenizer_files(CHATML), TokenizerChanges(eos_token="<|stop|>"), "/models/m")
    assert refused.value.name == "eos-token-unknown"
    assert "/models/m" in refused.value.message


@pytest.mark.parametrize(
    ("generation", "config", "token", "expected"),
    [
        (b'{"eos_token_id": [0, 2]}', {"eos_token_id": 0}, 2, None),
        (b'{"eos_token_id":2}', {}, 2, None),
        (b'{"eos_token_id": 0, "top_p": 0.9}', {"eos_token_id": 5}, 2, {"eos_token_id": [0, 2], "top_p": 0.9}),
        (b'{"top_p": 0.9}', {"eos_token_id": 5}, 2, {"eos_token_id": [2], "top_p": 0.9}),
        (b'{"eos_token_id": [5, 6]}', {}, 2, {"eos_token_id": [5, 6, 2]}),
        (None, {"eos_token_id": 5, "pad_token_id": 5, "vocab_size": 9}, 2, {"eos_token_id": [5, 2], "pad_token_id": 5}),
        (None, {"eos_token_id": 2}, 2, None),
    ],
)
def test_stop_lists(
    generation: bytes | None, config: dict[str, Any], token: int, expected: dict[str, Any] | None
) -> None:
    """None: the file stays byte for byte, or absent."""
    found = stop_at(generation, config, token)
    assert found == generation if expected is None else json.loads(found or b"") == expected


def test_added_tokens_are_those_that_transformers_adds(tmp_path: Path) -> None:
    """Oracle: `add_tokens` of transformers on the tokenizer in memory: the same ids for the same text, in the same order."""
    from tokenizers import AddedToken

    files = with_config(added_tokens_decoder={}) | {"added_tokens.json": b'{"<|im_end|>": 2}'}
    vocabulary = json.loads(files["tokenizer.json"])["model"]["vocab"]
    word = max((w for w in vocabulary if w.isalpha()), key=len)
    special, plain = ("<|turn|>", "<|im_end|>", "<|turn|>"), ("<think>", word)
    changed = change_files(files, TokenizerChanges(special=special, plain=plain), "x")
    ours = loaded(changed, tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(CHATML))
    theirs.add_tokens([AddedToken("<|turn|>", special=True, normalized=False)])
    theirs.add_tokens([AddedToken("<think>"), AddedToken(word)])
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.convert_tokens_to_ids("<|turn|>"), ours.convert_tokens_to_ids("<think>"), len(ours)) == (512, 513, 514)
    text = f"a<|turn|>{word} <think>b</think><|im_end|>x{word}"
    ids = ours(text)["input_ids"]
    assert ids == theirs(text)["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert json.loads(changed["added_tokens.json"]) == {
        "<|im_end|>": 2,
        "<|turn|>": 512,
        "<think>": 513,
        word: vocabulary[word],
    }
    assert set(json.loads(changed["tokenizer_config.json"])["added_tokens_decoder"]) == {
        "512",
        "513",
        str(vocabulary[word]),
    }


def test_an_end_may_be_a_token_that_is_added(tmp_path: Path) -> None:
    files = read_tokenizer_files(CHATML)
    changed = change_files(files, TokenizerChanges(eos_token="<|stop|>", special=("<|stop|>",)), "x")
    assert loaded(changed, tmp_path).eos_token_id == 512
