"""The second run reads its tokens back. Oracle: the tokens of a run without a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_dpo.data.cache import default_cache_dir, entry_key, read_entry, write_entry
from jax_dpo.data.load import load_rows
from jax_dpo.data.prepare import DataOptions, PreparedData, prepare
from jax_dpo.data.tokenize import tokenizer_fingerprint
from jax_dpo.errors import UserError

CHATML = Path(__file__).parent.parent / "golden" / "tokenizers" / "chatml"
KEY = tokenizer_fingerprint(CHATML)
ROWS: list[dict[str, Any]] = [
    {"prompt": f"question {i} ", "chosen": "yes " * (i + 1), "rejected": "no", "score_chosen": i, "score_rejected": 1}
    for i in range(9)
] + [{"prompt": "x", "chosen": None, "rejected": "y"}]


class Loader:
    """A tokenizer loader that counts."""

    calls = 0

    def __call__(self) -> Any:
        from transformers import AutoTokenizer

        self.calls += 1
        return AutoTokenizer.from_pretrained(str(CHATML))


def run(directory: Path, loader: Loader, rows: Any = ROWS, **options: Any) -> PreparedData:
    return prepare(rows, loader, tokenizer_key=KEY, options=DataOptions(cache_dir=directory, **options))


def same(a: PreparedData, b: PreparedData) -> bool:
    tables = (a.pairs.table, b.pairs.table)
    arrays = all(
        np.array_equal(getattr(tables[0], n), getattr(tables[1], n), equal_nan=n in ("gap", "given"))
        for n in ("ids", "bounds", "row", "number", "file_of", "twin", "gap", "given", "flags")
    )
    return arrays and tables[0].facts == tables[1].facts and a.drops == b.drops and a.counts == b.counts


def entry(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def test_second_run_tokenizes_nothing(tmp_path: Path) -> None:
    loader = Loader()
    fresh = run(tmp_path, loader, use_cache=False)
    first, second = run(tmp_path, loader), run(tmp_path, loader)
    assert (first.from_cache, second.from_cache, loader.calls) == (False, True, 2)
    assert same(first, fresh) and same(second, fresh)
    assert second.pairs.table.ids.dtype == np.int32
    assert list(second.pairs.rows()) == list(fresh.pairs.rows())


def test_options_that_only_choose_or_cut_share_an_entry(tmp_path: Path) -> None:
    loader = Loader()
    run(tmp_path, loader)
    data = run(tmp_path, loader, max_length=8, drop_rows=("invalid", "small_gap"), truncation_mode="keep_end")
    assert data.from_cache and loader.calls == 1
    assert data.pairs.sequence_lengths().max() == 8
    assert data.dropped == {"small_gap": 2, "invalid": 1}
    with pytest.raises(UserError, match="row 10: chosen is null"):
        run(tmp_path, loader, drop_rows=())


def test_columns_that_are_read_belong_to_the_key(tmp_path: Path) -> None:
    loader = Loader()
    rows = [{**row, "weight": i / 2, "beta": "0.5"} for i, row in enumerate(ROWS)]  # a CSV file has numbers as text
    plain = run(tmp_path, loader, rows)
    assert plain.pairs.given("weight") is None
    read = [run(tmp_path, loader, rows, columns=("weight", "beta")) for _ in range(2)]
    assert [d.from_cache for d in read] == [False, True] and loader.calls == 2
    for data in read:
        np.testing.assert_array_equal(data.pairs.given("weight"), np.arange(9, dtype=np.float32) / 2)
        np.testing.assert_array_equal(data.pairs.given("beta"), np.full(9, 0.5, np.float32))
        assert data.pairs.given("label") is None
    assert run(tmp_path, loader, rows, columns=("beta", "weight")).from_cache  # in whatever order they are named


def test_what_makes_the_ids_makes_the_key() -> None:
    keys = {entry_key("a", "t"), entry_key("b", "t"), entry_key("a", "u"), entry_key("at", "")}
    assert len(keys) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "head", "other"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    loader = Loader()
    first = run(tmp_path, loader)
    path = entry(tmp_path)
    good = path.read_bytes()
    at = good.rindex(first.pairs.table.ids[:8].tobytes())
    bad = {
        "flip": good[: at + 2] + bytes([good[at + 2] ^ 1]) + good[at + 3 :],
        "cut": good[:-200],
        "empty": b"",
        "head": good[:60] + b"?" + good[61:],
        "other": b"something else",
    }[damage]
    path.unlink()  # the first run still has the old file mapped
    path.write_bytes(bad)
    again = run(tmp_path, loader)
    assert loader.calls == 2 and same(again, first)
    assert any("damaged" in warning for warning in again.warnings)
    assert entry(tmp_path).read_bytes() == good
    assert run(tmp_path, loader).from_cache


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    loader = Loader()
    data = run(tmp_path / "file" / "cache", loader)
    assert len(data.pairs) == 9 and not data.from_cache
    assert any("not kept for the next run" in warning for warning in data.warnings)


def test_no_part_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle; and what a killed run left a day ago goes away, what is new stays."""
    table = run(tmp_path / "a", Loader()).pairs.table
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    for part in (old, new):
        part.write_text("half")
    os.utime(old, (0, 0))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax_dpo.data.atomic.os.replace", full)
    assert "No space left" in str(write_entry(tmp_path / "x.tokens", table))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "new.part"]


def test_an_empty_table(tmp_path: Path) -> None:
    data = run(tmp_path, Loader(), rows=ROWS[-1:])
    assert len(data.pairs) == 0 and data.pairs.lengths().shape == (0, 3)
    table = read_entry(entry(tmp_path))
    assert table is not None and len(table) == 0
    assert table.facts.invalid == [(0, 0, 1, "chosen is null")]


def test_the_cache_is_used_without_transformers(tmp_path: Path) -> None:
    """In a new process, from a file: neither transformers nor datasets nor jax is imported, and no row is read."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    first = run(tmp_path / "cache", Loader(), rows=file)
    program = f"""
import sys
from jax_dpo.data.load import load_rows
from jax_dpo.data.prepare import DataOptions, prepare
from jax_dpo.data.tokenize import tokenizer_fingerprint
rows = load_rows({str(file)!r})
data = prepare(rows, lambda: 1 / 0, tokenizer_key=tokenizer_fingerprint({str(CHATML)!r}),
               options=DataOptions(cache_dir={str(tmp_path / "cache")!r}))
assert data.from_cache and "loaded" not in vars(rows)
assert not {{"transformers", "datasets", "jax", "pyarrow"}} & set(sys.modules)
print(len(data.pairs), data.drops[0].row, data.pairs.table.ids.sum())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["9", "10", str(first.pairs.table.ids.sum())]


def test_renamed_files_share_an_entry_and_keep_their_names(tmp_path: Path) -> None:
    loader = Loader()
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    run(tmp_path / "cache", loader, rows=tmp_path / "a.jsonl")
    data = run(tmp_path / "cache", loader, rows=load_rows(tmp_path / "b.jsonl"))
    assert data.from_cache and data.drops[0].file.endswith("b.jsonl")


def test_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAX_DPO_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("JAX_DPO_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "jax_dpo" / "tokens"


def test_without_a_key_the_tokenizer_is_asked(tmp_path: Path) -> None:
    loader = Loader()
    for expected in (False, True):
        data = prepare(ROWS, loader, options=DataOptions(cache_dir=tmp_path))
        assert data.from_cache is expected
    assert loader.calls == 2
