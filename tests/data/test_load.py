"""Every format gives the same rows; what cannot be read is said with file and line. Oracle: the rows that were written."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ports import held_port

from jax_dpo.data.load import is_stream, list_splits, load_rows, open_stream, split_rows
from jax_dpo.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": "Lindö — 🙂", "chosen": "ja\r\n", "rejected": "nej", "score_chosen": 2.0, "score_rejected": 1.0},
    {"prompt": "b\u2028x", "chosen": '"q", r', "rejected": "", "score_chosen": 3.5, "score_rejected": 1.0},
    {"prompt": "c", "chosen": "y", "rejected": "z", "score_chosen": 1.0, "score_rejected": 1.0},
]
CHAT: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(lines(ROWS), "utf-8")
    rows = load_rows(file)
    assert list(rows.rows) == ROWS and len(rows) == 3
    assert rows.place(2) == (str(file), 3)


def test_jsonl_from_windows(tmp_path: Path) -> None:
    """A byte order mark, CRLF, blank lines and no newline at the end; a row keeps its line number."""
    file = tmp_path / "pairs.jsonl"
    text = "\r\n".join([json.dumps(ROWS[0]), "", json.dumps(ROWS[1]), "  ", json.dumps(ROWS[2])])
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows = load_rows(file)
    assert list(rows.rows) == ROWS
    assert [rows.place(i)[1] for i in range(3)] == [1, 3, 5]


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.json.gz", "pairs.ndjson"])
def test_json_list_or_lines_under_any_json_name(tmp_path: Path, name: str) -> None:
    for text in (json.dumps(ROWS, indent=1), lines(ROWS)):
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        assert list(load_rows(tmp_path / name).rows) == ROWS


@pytest.mark.parametrize(("name", "delimiter"), [("pairs.csv", ","), ("pairs.tsv", "\t")])
def test_csv(tmp_path: Path, name: str, delimiter: str) -> None:
    import csv

    with open(tmp_path / name, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows([*ROWS, ROWS[0] | {"chosen": "long " * 50_000}])
    rows = load_rows(tmp_path / name)
    assert [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows.rows[:3]] == [
        {k: r[k] for k in ("prompt", "chosen", "rejected")} for r in ROWS
    ]
    assert len(rows.rows[3]["chosen"]) == 250_000
    assert rows.rows[1]["score_chosen"] == "3.5" and rows.place(2)[1] == 3


def test_parquet(tmp_path: Path) -> None:
    extra = [r | {"id": i, "messages": [{"role": "user"}]} for i, r in enumerate(ROWS)]
    parquet(tmp_path / "pairs.parquet", extra)
    rows = load_rows(tmp_path / "pairs.parquet")
    assert list(rows.rows) == ROWS  # unused columns are not even read ..
    assert rows.loaded.columns is not None and "messages" in rows.loaded.columns  # .. but known
    parquet(tmp_path / "chat.parquet", CHAT)
    assert list(load_rows(tmp_path / "chat.parquet").rows) == CHAT


def test_parquet_with_mixed_objects(tmp_path: Path) -> None:
    """`datasets` stores objects of differing keys as JSON texts; they come back as objects, without null keys."""
    import datasets

    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]
    other = [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "text"}}]}]
    rows = [CHAT[0] | {"chosen": call}, CHAT[0] | {"chosen": other}]
    (tmp_path / "p.jsonl").write_text(lines(rows))
    made = datasets.Dataset.from_json(str(tmp_path / "p.jsonl"), cache_dir=str(tmp_path / "cache"))
    made.to_parquet(str(tmp_path / "pairs.parquet"))
    got = load_rows(tmp_path / "pairs.parquet").rows
    assert got[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert got[1]["chosen"][0]["tool_calls"][0]["function"]["arguments"] == "text"


def test_saved_datasets(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=made, test_prefs=made.select([2])).save_to_disk(str(tmp_path / "two"))
    assert list(load_rows(tmp_path / "one").rows) == ROWS
    assert list(load_rows(tmp_path / "two", split="test_prefs").rows) == ROWS[2:]
    assert list_splits(tmp_path / "two") == ["test_prefs", "train"]
    with pytest.raises(UserError, match="has the splits test_prefs, train"):
        load_rows(tmp_path / "two")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    with pytest.raises(UserError, match="no complete saved data set"):
        _ = load_rows(tmp_path / "one").rows


def test_python_objects() -> None:
    import datasets

    made = datasets.Dataset.from_list(ROWS).add_column("id", [1, 2, 3])
    rows = load_rows(made)
    assert list(rows.rows) == ROWS and rows.loaded.columns is not None and "id" in rows.loaded.columns
    assert rows.fingerprint == load_rows(made).fingerprint != load_rows(made.select([0])).fingerprint
    assert list(load_rows(datasets.DatasetDict(train=made, test=made.select([1])), split="test").rows) == ROWS[1:2]
    assert list(load_rows(tuple(ROWS), name="mine").rows) == ROWS
    assert load_rows(ROWS, name="mine").place(1) == ("mine", 2)
    assert load_rows(ROWS).fingerprint == load_rows(list(ROWS)).fingerprint != load_rows(ROWS[:2]).fingerprint
    assert list(load_rows(made.to_iterable_dataset()).rows) == ROWS
    assert is_stream(made.to_iterable_dataset()) and not is_stream(made) and not is_stream(ROWS)
    with pytest.raises(UserError, match="of type int"):
        load_rows(3)


def test_directory_by_file_names(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines(ROWS), "utf-8")
    parquet(tmp_path / "test_prefs-00000-of-00002.parquet", ROWS[:2])
    parquet(tmp_path / "test_prefs-00001-of-00002.parquet", ROWS[2:])
    (tmp_path / "val.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "README.md").write_text("# A set\n")
    assert list_splits(tmp_path) == ["test_prefs", "train", "validation"]
    rows = load_rows(tmp_path, split="test_prefs")
    assert list(rows.rows) == ROWS
    assert [(Path(f).name, n) for f, n in map(rows.place, range(3))] == [
        ("test_prefs-00000-of-00002.parquet", 1),
        ("test_prefs-00000-of-00002.parquet", 2),
        ("test_prefs-00001-of-00002.parquet", 1),
    ]
    with pytest.raises(UserError, match=r"no split 'test'\. It has: test_prefs, train, validation") as error:
        load_rows(tmp_path, split="test")
    assert error.value.name == "data-split-missing" and "dataset_test_split" in error.value.message
    (tmp_path / "train.csv").write_text("chosen,rejected\n")
    with pytest.raises(UserError, match=r"train.csv and train.jsonl are both the split 'train'"):
        load_rows(tmp_path, split="train")


def test_directory_with_one_set_is_the_training_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text(lines(ROWS), "utf-8")
    assert list(load_rows(tmp_path, split="train").rows) == ROWS
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no data file"):
        load_rows(tmp_path / "empty")


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_prefs
    path: data/train-*
  - split: test_prefs
    path: [b.jsonl]
- config_name: other
  data_files: b.jsonl
---
text
"""


def test_data_card_names_the_splits(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-1.jsonl").write_text(lines(ROWS[:1]), "utf-8")
    (tmp_path / "data" / "train-2.jsonl").write_text(lines(ROWS[1:]), "utf-8")
    (tmp_path / "b.jsonl").write_text(lines(ROWS[2:]), "utf-8")
    assert list_splits(tmp_path) == ["test_prefs", "train_prefs"]
    assert list(load_rows(tmp_path, split="train_prefs").rows) == ROWS
    assert list(load_rows(tmp_path, split="train", config="other").rows) == ROWS[2:]
    with pytest.raises(UserError, match="no configuration 'third', only default, other"):
        load_rows(tmp_path, split="train", config="third")
    with pytest.raises(UserError, match=r"no split 'train'\. It has: test_prefs, train_prefs"):
        load_rows(tmp_path, split="train")
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match=r"README.md names 'b.jsonl', but there is no such data file"):
        load_rows(tmp_path, split="test_prefs")
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(UserError, match="head of the data card cannot be read"):
        load_rows(tmp_path, split="test_prefs")


def test_a_file_is_the_training_split_and_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(lines(ROWS), "utf-8")
    for split in (None, "train", "test"):
        assert len(load_rows(tmp_path / "test.jsonl", split=split)) == 3
    with pytest.raises(UserError, match=r"no split 'validation'\. It has: test, train"):
        load_rows(tmp_path / "test.jsonl", split="validation")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"chosen": "a"}\n\n{"chosen": b}\n{}\n', r"a.jsonl, line 3, column 12: not valid JSON.*found"),
        ("a.jsonl", b'{"chosen": "a"}\n{"chosen": "b', r"line 2.*the last line: the file may be incomplete"),
        ("a.jsonl", b'{\n "chosen": "a"\n}\n', "one object over many lines"),
        ("a.json", b'[{"chosen": "a"},\n {"chosen" "b"}]', r"a.json, line 2, column 12: not valid JSON"),
        ("a.jsonl", b'{"chosen": "a"}\n{"chosen": "\xff"}\n', "line 2: byte 0xff is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-9], "no complete gzip file"),
        ("a.parquet", b"PAR1 and no more", "no complete Parquet file"),
        ("a.csv", b"chosen,rejected\na,b\na,b,c\n", r"row 2 \(line 3\): 3 fields, the header has 2"),
        ("a.csv", b'chosen,rejected\na,"b\n', "not valid CSV"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.txt", b"x", r"ending says nothing.*\.jsonl"),
        ("a.jsonl", b"[" * 100_000, "not valid JSON|nested too deeply"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        _ = load_rows(tmp_path / name).rows


@pytest.mark.parametrize("name", ["no/such/place", "missing.jsonl", "./x", "/x/y", "what is this?"])
def test_missing_files_are_not_looked_for_on_the_hub(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match="no such file or directory") as error:
        load_rows(name)
    assert error.value.name == "data-file-missing" and time.perf_counter() - start < 1


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that nothing listens on: one clear error, quickly, and `datasets` is as it was."""
    import datasets.config

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with held_port() as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        start = time.perf_counter()
        with pytest.raises(UserError, match="cannot be reached") as error:
            load_rows("some-owner/some-pairs", split="train")
        assert error.value.name == "hub-unreachable" and time.perf_counter() - start < 5
    assert datasets.config.HF_HUB_OFFLINE is False


def test_hub_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's answers, without a network: splits, and its own errors as messages."""
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    asked: list[Any] = []

    def answer(name: str, config: str | None, streaming: bool = False) -> Any:
        asked.append((name, config))
        if streaming:
            return datasets.IterableDatasetDict(train=made.to_iterable_dataset())
        if name == "no/such":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub.")
        if name == "many/configs":
            raise ValueError("Config name is missing. Please pick one among: ['a', 'b']")
        return datasets.DatasetDict(train_prefs=made, test_prefs=made.select([0]))

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.setattr("jax_dpo.data.hub._connected", lambda: True)
    assert list(load_rows("owner/pairs", split="train_prefs", config="c").rows) == ROWS
    assert asked == [("owner/pairs", "c")]
    assert list_splits("owner/pairs") == ["test_prefs", "train_prefs"]
    with pytest.raises(UserError, match=r"no split 'train'\. It has: test_prefs, train_prefs"):
        load_rows("owner/pairs", split="train")
    with pytest.raises(UserError, match="the Hub answers: Dataset 'no/such' doesn't exist"):
        load_rows("no/such", split="train")
    assert list(open_stream("owner/pairs", split="train")) == ROWS
    assert open_stream("owner/pairs", split="test", missing_ok=True) is None
    with pytest.raises(UserError, match=r"no split 'test'\. It has: train"):
        open_stream("owner/pairs", split="test")
    with pytest.raises(UserError, match="pick one among"):
        load_rows("many/configs", split="train")


@pytest.mark.parametrize("size", [0.3, 4])
def test_split_is_that_of_datasets(size: float) -> None:
    """Oracle: `Dataset.train_test_split` with the same seed."""
    import datasets

    values = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(11)]
    want = datasets.Dataset.from_list(values).train_test_split(test_size=size, seed=7)
    train, test = split_rows(load_rows(values, name="pairs"), size, 7)
    assert list(train.rows) == list(want["train"]) and list(test.rows) == list(want["test"])
    assert train.place(0) == ("pairs", int(train.rows[0]["prompt"]) + 1)
    assert len({train.fingerprint, test.fingerprint, split_rows(load_rows(values), size, 8)[1].fingerprint}) == 3


@pytest.mark.parametrize("size", [0.0, 1.0, 1.5, 11, -1, 12])
def test_split_sizes_that_cannot_be(size: float) -> None:
    with pytest.raises(UserError, match=r"test_split_size is .* has 11 rows"):
        split_rows(load_rows([{"chosen": str(i)} for i in range(11)]), size, 0)


def test_fingerprint_is_the_content(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(lines(ROWS), "utf-8")
    (tmp_path / "c.jsonl").write_text(lines(ROWS[:2]), "utf-8")
    a, b, c = (load_rows(tmp_path / name).fingerprint for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert a == b != c
    assert np.array_equal(load_rows(tmp_path / "a.jsonl").select(np.array([2, 0]), "x").loaded.numbers, [3, 1])
