"""`Rows`: the rows of a data set, from a local file or directory, the Hub, or Python objects.

Local files are read with the standard library and pyarrow; `datasets` is imported only for its own directories, its own
objects and the Hub. Rows are read when they are first looked at: a run that finds its tokens in the cache reads none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_dpo.data.directory import directory_splits, is_saved_dataset, saved_dataset_splits
from jax_dpo.data.files import file_format, file_stem, read_file
from jax_dpo.data.formats import columns_to_read
from jax_dpo.data.hub import is_hub_name, load_from_hub
from jax_dpo.data.pairs import READ_COLUMNS
from jax_dpo.errors import UserError


class Loaded(NamedTuple):
    """Rows in memory: the values [N], each row's number [N] int64 in its file, and which file [N] int32 it is from.

    `columns` are the columns of the source where it names them, else None.
    """

    values: Sequence[Any]
    numbers: np.ndarray
    file_of: np.ndarray
    columns: tuple[str, ...] | None


class Rows:
    """The rows of one data set, read at first use.

    `name` is for messages, `files` are the names under which rows are reported, `fingerprint` is a hash of the content:
    equal fingerprints mean equal rows.
    """

    def __init__(self, name: str, files: Sequence[str], fingerprint: str, load: Callable[[], Loaded]) -> None:
        self.name = name
        self.files = tuple(files)
        self.fingerprint = fingerprint
        self._load = load

    @cached_property
    def loaded(self) -> Loaded:
        """The rows; reading happens here. Raises `UserError` where the source is damaged."""
        return self._load()

    @property
    def rows(self) -> Sequence[Any]:
        """The rows as JSON values: objects where the data is sound."""
        return self.loaded.values

    def __len__(self) -> int:
        return len(self.loaded.values)

    def place(self, i: int) -> tuple[str, int]:
        """File and number (from 1; the line in JSONL) of row `i`, by which a person finds it."""
        return self.files[int(self.loaded.file_of[i])], int(self.loaded.numbers[i])

    def select(self, indices: np.ndarray, name: str) -> Rows:
        """The rows of `indices` [M], in that order, under another name."""
        indices = np.asarray(indices, np.int64)

        def load() -> Loaded:
            whole = self.loaded
            values = [whole.values[int(i)] for i in indices]
            return Loaded(values, whole.numbers[indices], whole.file_of[indices], whole.columns)

        return Rows(name, self.files, digest(self.fingerprint.encode(), indices.tobytes()), load)


def load_rows(source: Any, *, split: str | None = None, config: str | None = None, name: str | None = None) -> Rows:
    """The rows of one split of `source`.

    source: a data file, a directory of data files, a `save_to_disk` directory, a name on the Hub, a `datasets.Dataset`, a
        `DatasetDict`, or a list of dicts.
    split: which split; None takes the only one there is. A single file and a plain list are the split `train`.
    config: the configuration, where a data card or the Hub has several.
    name: how messages call the rows; by default the source's own name.

    Raises `UserError`: nothing there, no such split (with the splits there are), a format that is not known. What is wrong
    inside a file shows when the rows are first looked at.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, str | Path):
        return _from_path(source, split, config, name)
    return _from_python(source, split, name)


class Stream(NamedTuple):
    """Rows that are to be taken one by one in their order, as far as they are needed."""

    rows: Rows


def is_stream(source: Any) -> bool:
    """Whether rows are read in their order: a `Stream`, or a data set without a length (`datasets.IterableDataset`)."""
    return isinstance(source, Stream) or (
        type(source).__module__.startswith("datasets.")
        and not isinstance(source, Mapping)
        and not hasattr(source, "__len__")
    )


def stream_rows(source: Any, most: int | None = None) -> Any:
    """The first `most` rows of a stream (None: all), with the columns that are read alone, as `load_rows` takes them."""
    if isinstance(source, Stream):
        rows = source.rows
        return rows if most is None or most >= len(rows) else rows.select(np.arange(most), rows.name)
    return [
        {k: row[k] for k in columns_to_read(list(row), READ_COLUMNS)}
        if isinstance(row, Mapping) and "chosen" in row
        else row
        for row in islice(iter(source), most)
    ]


def open_stream(source: str, *, split: str, config: str | None = None, missing_ok: bool = False) -> Any:
    """The rows of a data set on the Hub, read one by one in their order; with `missing_ok` None where it has no such split.

    Raises `UserError` as `load_rows` does.
    """
    _check_hub_name(source)
    found = load_from_hub(source, config, streaming=True)
    return None if missing_ok and split not in found else found[_pick(list(found), split, source)]


def list_splits(source: Any, *, config: str | None = None) -> list[str]:
    """The names of the splits that `load_rows` would accept for `source`."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            return sorted(_directory(path, config))
        if path.is_file():
            return _file_splits(path)
        _check_hub_name(str(source))
        return sorted(load_from_hub(str(source), config))
    return sorted(source) if isinstance(source, Mapping) else ["train"]


def split_rows(rows: Rows, test_size: float | int, seed: int) -> tuple[Rows, Rows]:
    """Split rows into a training and a test part, shuffled by `seed`.

    The same rows, in the same order, as `datasets`' `Dataset.train_test_split(test_size=.., seed=..)`.
    test_size: a share in (0, 1), rounded up, or a number of rows.
    Raises `UserError` where a part would be empty.
    """
    n = len(rows)
    count = math.ceil(test_size * n) if 0 < test_size < 1 else int(test_size)
    whole = count == test_size and not (isinstance(test_size, float) and test_size == 1)  # 1.0 would be all of it
    if not 0 < count < n or not (0 < test_size < 1 or whole):
        raise UserError(
            "test-split-size",
            f"test_split_size is {test_size}, {rows.name} has {n} rows: a share between 0 and 1 or a number of rows was "
            "expected, with at least one row left on either side.",
        )
    order = np.random.default_rng(seed).permutation(n)
    return rows.select(order[count:], f"{rows.name} (train part)"), rows.select(
        order[:count], f"{rows.name} (test part)"
    )


def _from_path(source: str | Path, split: str | None, config: str | None, name: str | None) -> Rows:
    path = Path(source).expanduser()
    label = name or str(source)
    if path.is_dir():
        splits = _directory(path, config)
        files = splits[_pick(list(splits), split, label)]
        if is_saved_dataset(path):
            return _saved(files[0], label)
        return _files(files, label)
    if path.is_file():
        if file_format(path) is None:
            read_file(path)  # says which endings are known
        if split is not None:
            _pick(_file_splits(path), split, label)
        return _files([path], label)
    _check_hub_name(str(source))
    loaded = load_from_hub(str(source), config)
    return _from_dataset(loaded[_pick(list(loaded), split, label)], label)


def _directory(path: Path, config: str | None) -> dict[str, list[Path]]:
    return saved_dataset_splits(path) if is_saved_dataset(path) else directory_splits(path, config)


def _file_splits(path: Path) -> list[str]:
    """A file alone is `train`, and also the split that its name says."""
    return list(dict.fromkeys(["train", file_stem(path)]))


def _pick(splits: list[str], split: str | None, label: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is not None and split in splits:
        return split
    known = ", ".join(sorted(splits))
    if split is None:
        raise UserError("data-split-needed", f"{label} has the splits {known}. Say which (dataset_train_split).")
    raise UserError(
        "data-split-missing",
        f"{label} has no split {split!r}. It has: {known}. Set dataset_train_split (for training) or dataset_test_split "
        "(for evaluation) to one of them.",
    )


def _check_hub_name(text: str) -> None:
    """What is neither a file nor a directory here may be a name on the Hub, unless it plainly is a path."""
    looks_like_path = text.startswith((".", "/", "~")) or file_format(Path(text)) is not None or not is_hub_name(text)
    if looks_like_path:
        raise UserError(
            "data-file-missing",
            f"{text}: there is no such file or directory (looked in {Path.cwd()}). Expected a data file, a directory, or "
            "a name on the Hub (owner/name).",
        )


def _files(paths: list[Path], label: str) -> Rows:
    def load() -> Loaded:
        parts = [read_file(path) for path in paths]
        values = parts[0].values if len(parts) == 1 else [value for part in parts for value in part.values]
        numbers = np.concatenate([np.asarray(part.numbers, np.int64) for part in parts])
        file_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.values) for part in parts])
        columns = tuple(dict.fromkeys(c for part in parts for c in part.columns or ()))
        return Loaded(values, numbers, file_of, columns or None)

    return Rows(label, [str(path) for path in paths], _hash_files(paths), load)


def _saved(folder: Path, label: str) -> Rows:
    """A `save_to_disk` folder. Its files are hashed now and read by `datasets` when they are needed."""
    try:
        paths = sorted(folder.glob("*.arrow"))
        state = folder / "state.json"
        if not paths or not state.is_file():
            raise UserError(
                "data-directory-damaged", f"{folder} is no complete saved data set: no *.arrow or state.json."
            )
        fingerprint = _hash_files([*paths, folder / "dataset_info.json", state])
    except OSError as error:
        raise UserError("data-file-unreadable", f"{folder} cannot be read: {error}.") from error

    def load() -> Loaded:
        import datasets
        import pyarrow as pa

        try:
            return _dataset_rows(datasets.load_from_disk(str(folder)))
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError("data-directory-damaged", f"{folder} is no complete saved data set: {error}.") from error

    return Rows(label, [str(folder)], fingerprint, load)


def _from_python(source: Any, split: str | None, name: str | None) -> Rows:
    if isinstance(source, Mapping):
        label = name or "the data set"
        return _from_python(source[_pick(list(source), split, label)], None, name)
    if type(source).__module__.startswith("datasets."):
        if is_stream(source):
            return _python_rows(stream_rows(source), name or "the data set")
        return _from_dataset(source, name or "the data set")
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        values = list(source)
        return _python_rows(values, name or "the data set")
    raise UserError(
        "data-type",
        f"{name or 'the data set'} is of type {type(source).__name__}. Expected a datasets.Dataset, a list of dicts, a file, "
        "a directory, or a name on the Hub.",
    )


def _python_rows(values: list[Any], label: str) -> Rows:
    loaded = Loaded(values, np.arange(1, len(values) + 1), np.zeros(len(values), np.int32), None)
    parts = (json.dumps(value, ensure_ascii=False, default=repr).encode("utf-8", "surrogatepass") for value in values)
    return Rows(label, [label], digest(b"python", *parts), lambda: loaded)


def _from_dataset(dataset: Any, label: str) -> Rows:
    """A `datasets.Dataset`; its own fingerprint follows its content and every change made to it."""
    fingerprint = getattr(dataset, "_fingerprint", None)
    if not isinstance(fingerprint, str):
        return _python_rows(list(dataset), label)
    return Rows(label, [label], digest(b"datasets", fingerprint.encode()), lambda: _dataset_rows(dataset))


def _dataset_rows(dataset: Any) -> Loaded:
    columns = tuple(dataset.column_names)
    if dataset.format["type"] == "custom":  # the user's own transform makes the columns
        values = list(dataset)
        return Loaded(values, np.arange(1, len(values) + 1), np.zeros(len(values), np.int32), None)
    kept = dataset.select_columns(columns_to_read(columns, READ_COLUMNS)).with_format(None)
    values = list(kept) if kept.column_names else [{}] * len(dataset)
    return Loaded(values, np.arange(1, len(values) + 1), np.zeros(len(values), np.int32), columns)


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for path in paths:
        try:
            # The ending decides how the bytes are read, so it belongs to the content.
            digest.update(f"{path.suffix.lower()} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError("data-file-unreadable", f"{path} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()


def digest(*parts: bytes) -> str:
    """A hash of the parts and of where each ends."""
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
