"""Mixtures of data sets. Oracle: TRL's get_dataset, that is `datasets` itself: load_dataset, select, concatenate_datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jax_dpo.data.mixture import Source, load_mixture
from jax_dpo.errors import UserError


def rows(kind: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{kind}{i}", "chosen": "a", "rejected": "b", "source": kind} for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one.jsonl (23 rows), two.jsonl (11), and a directory with train.jsonl (5) and test.jsonl (2)."""
    found = tmp_path_factory.mktemp("mixture")
    (found / "both").mkdir()
    for name, count in (("one", 23), ("two", 11), ("both/train", 5), ("both/test", 2)):
        text = "".join(json.dumps(row) + "\n" for row in rows(name.rpartition("/")[2], count))
        (found / f"{name}.jsonl").write_text(text)
    return found


def by_datasets(folder: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What TRL does with the entries, by the library that it calls."""
    import datasets

    made = []
    for entry in entries:
        files = entry["data_files"]
        each = datasets.load_dataset(
            "json",
            data_files=files,
            split=entry.get("split", "train"),
            cache_dir=str(folder / "cache"),
        )
        made.append(each.select_columns(entry["columns"]) if "columns" in entry else each)
    shares = [entry.get("fraction") for entry in entries]
    if shares[0] is not None:
        weights = [share / sum(shares) for share in shares]
        total = min(len(d) / w for d, w in zip(made, weights) if w > 0)
        made = [d.select(range(round(w * total))) for d, w in zip(made, weights)]
    return list(datasets.concatenate_datasets(made))


@pytest.mark.parametrize(
    "entries",
    [
        [{}, {}],
        [{"split": "train[:10]"}, {"split": "train[-3:]"}],
        [{"split": "train[10%:55%]"}, {"split": "train[5%:]"}],
        [{"fraction": 0.5}, {"fraction": 0.5}],
        [{"fraction": 3}, {"fraction": 0.7}],
        [{"fraction": 1.0}, {"fraction": 0.0}],
        [{"split": "train[:9]", "fraction": 1.0}, {"fraction": 2.0}],
        [{"columns": ["prompt", "chosen", "rejected"]}, {"columns": ["prompt", "chosen", "rejected"]}],
    ],
)
def test_a_mixture_is_that_of_trl(folder: Path, entries: list[dict[str, Any]]) -> None:
    full = [{"path": "json", "data_files": str(folder / f), **e} for f, e in zip(("one.jsonl", "two.jsonl"), entries)]
    found = load_mixture([Source(**entry) for entry in full])
    assert list(found.rows) == by_datasets(folder, full)


def test_a_source_is_a_file_a_directory_or_a_reader_with_files(folder: Path) -> None:
    one, both = rows("one", 23), [*rows("train", 5), *rows("test", 2)]
    for source in (
        Source(str(folder / "one.jsonl")),
        Source("json", data_dir=str(folder), data_files="one.jsonl"),
        Source("json", data_dir=str(folder), data_files="on*.jsonl"),
        Source(str(folder), data_files=["one.jsonl"]),
        Source(
            "json", data_files={"train": str(folder / "two.jsonl"), "other": str(folder / "one.jsonl")}, split="other"
        ),
    ):
        assert list(load_mixture([source]).rows) == one, source
    assert (
        list(load_mixture([Source(str(folder / "both")), Source(str(folder), data_dir="both", split="test")]).rows)
        == both
    )


def test_rows_keep_their_places(folder: Path) -> None:
    """What is dropped is named by the file that it stands in."""
    found = load_mixture([Source(str(folder / "two.jsonl"), split="train[2:4]"), Source(str(folder / "one.jsonl"))])
    assert found.place(1) == (str(folder / "two.jsonl"), 4)
    assert found.place(2) == (str(folder / "one.jsonl"), 1)
    assert (
        found.fingerprint
        != load_mixture([Source(str(folder / "two.jsonl")), Source(str(folder / "one.jsonl"))]).fingerprint
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"path": "json"}, "path json needs data_files, or data_dir"),
        ({"path": "json", "data_files": "no*.jsonl"}, "no file matches no*.jsonl"),
        ({"path": "nowhere.jsonl"}, "there is no such file or directory"),
        ({"path": "one.jsonl", "split": "validation"}, "has no split 'validation'"),
        ({"path": "one.jsonl", "split": "train[:2]+train[4:]"}, "write several parts as several entries"),
        ({"path": "one.jsonl", "columns": ["prompt", "answer"]}, "has no column 'answer'; it has prompt, chosen"),
        ({"path": "one.jsonl", "split": "train[:0]"}, "has no rows"),
        (
            {"path": "json", "data_files": {"train": "one.jsonl"}, "split": "test"},
            "data_files has no test; it has train",
        ),
        ({"path": "json", "data_files": "one.jsonl", "split": "test"}, "are the split train; found test"),
    ],
)
def test_what_cannot_be_is_refused(
    folder: Path, source: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as refused:
        _ = load_mixture([Source(**source)]).rows
    assert words in refused.value.message
