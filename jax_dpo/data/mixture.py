"""Several data sets as one: TRL's `datasets`, each with its split, columns and share, joined one after the other."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.data.load import Loaded, Rows, digest, load_rows
from jax_dpo.errors import UserError

# What `datasets` calls its readers of files; the files are named in data_files.
BUILDERS = frozenset({"json", "csv", "parquet", "arrow", "text"})
_SLICE = re.compile(r"([\w.\-]+)\[(-?\d+%?)?:(-?\d+%?)?\]")


@dataclass(frozen=True)
class Source:
    """One data set of a mixture; names and meanings are those of TRL's DatasetConfig.

    `path`: a file, a directory, a name on the Hub, or json, csv, parquet with `data_files`. `split` may be a part: `train[:1000]`,
    `train[10%:]`. `columns`: the columns that are read (None: all). `fraction`: its share of the mixture, before they are
    normalised to sum to 1.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | Sequence[str] | Mapping[str, Any] | None = None
    split: str = "train"
    columns: Sequence[str] | None = None
    fraction: float | None = None


def load_mixture(sources: Sequence[Source]) -> Rows:
    """The rows of all sources, one after the other.

    With fractions (all or none have one) the first rows of each are taken, as many of each as its share says, and as many in all as
    there can be without taking any row twice.

    Raises `UserError`: what `load_rows` raises; a split that is cut in a way that is not known; columns that are not there; a share
    so small that nothing is left.
    """
    parts = [_rows_of(source) for source in sources]
    if sources[0].fraction is not None:
        weights = [float(source.fraction or 0) for source in sources]
        shares = [weight / sum(weights) for weight in weights]
        total = min(len(rows) / share for rows, share in zip(parts, shares) if share > 0)
        parts = [rows.select(np.arange(round(share * total)), rows.name) for rows, share in zip(parts, shares)]
    joined = join_rows(parts)
    if not len(joined):
        raise UserError(
            "data-mixture-empty", "The mixture of datasets has no rows: raise the fractions, or look at the files."
        )
    return joined


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Rows of several data sets as one, in the order in which they are given."""
    files = [file for part in parts for file in part.files]
    starts = np.cumsum([0, *(len(part.files) for part in parts[:-1])])

    def load() -> Loaded:
        loaded = [part.loaded for part in parts]
        columns = [part.columns for part in loaded]
        return Loaded(
            [value for part in loaded for value in part.values],
            np.concatenate([part.numbers for part in loaded]),
            np.concatenate([part.file_of + start for part, start in zip(loaded, starts)]).astype(np.int32),
            None if None in columns else tuple(dict.fromkeys(c for part in columns for c in part or ())),
        )

    return Rows(" + ".join(part.name for part in parts), files, digest(*(p.fingerprint.encode() for p in parts)), load)


def _rows_of(source: Source) -> Rows:
    split, first, last = _cut(source)
    paths = _files_of(source)
    if paths is None:
        rows = load_rows(_place(source), split=split, config=source.name)
    else:
        rows = join_rows([load_rows(path, split="train") for path in paths])
        if split != "train" and not isinstance(source.data_files, Mapping):
            raise UserError(
                "data-split-missing",
                f"datasets: files that are named in data_files are the split train; found {split}.",
            )
    if first is not None or last is not None:
        start, stop, _ = slice(_index(first, len(rows)), _index(last, len(rows))).indices(len(rows))
        rows = rows.select(np.arange(start, stop), rows.name)
    return rows if source.columns is None else _with_columns(rows, source.columns)


def _place(source: Source) -> str:
    """Where the data set lies, `data_dir` within it."""
    if source.data_dir is None:
        return source.path
    if source.path in BUILDERS:
        return source.data_dir
    return str(Path(source.path) / source.data_dir)


def _files_of(source: Source) -> list[str] | None:
    """The files that `data_files` names, wild cards filled in; None where it names none."""
    given = source.data_files
    if isinstance(given, Mapping):
        split, _, _ = _cut(source)
        if split not in given:
            raise UserError(
                "data-split-missing", f"datasets: data_files has no {split}; it has {', '.join(map(str, given))}."
            )
        given = given[split]
    if given is None:
        if source.path in BUILDERS and source.data_dir is None:
            raise UserError("data-files-needed", f"datasets: path {source.path} needs data_files, or data_dir.")
        return None
    inside = Path(source.data_dir or ".") if source.path in BUILDERS else Path(source.path) / (source.data_dir or "")
    found: list[str] = []
    for name in [given] if isinstance(given, str) else given:
        path = str(inside / name)
        matching = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
        if not matching:
            raise UserError("data-file-missing", f"datasets: no file matches {path}.")
        found += matching
    return found


def _cut(source: Source) -> tuple[str, str | None, str | None]:
    """(split, first row, end) of a split as `datasets` writes it."""
    if "[" not in source.split and "+" not in source.split:
        return source.split, None, None
    match = _SLICE.fullmatch(source.split.replace(" ", ""))
    if match is None:
        raise UserError(
            "data-split-unknown",
            f"datasets: split {source.split!r}: expected a name, or a part of one such as train[:1000] or train[10%:90%]; write "
            "several parts as several entries.",
        )
    return match[1], match[2], match[3]


def _index(text: str | None, count: int) -> int | None:
    """A row number, or a share of all rows rounded to the nearest, as `datasets` does."""
    if text is None:
        return None
    return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)


def _with_columns(rows: Rows, columns: Sequence[str]) -> Rows:
    """The rows with these columns alone."""

    def load() -> Loaded:
        whole = rows.loaded
        known = whole.columns or tuple(dict.fromkeys(k for v in whole.values if isinstance(v, Mapping) for k in v))
        missing = [column for column in columns if column not in known]
        if missing:
            raise UserError(
                "data-columns-missing",
                f"datasets: {rows.name} has no column {missing[0]!r}; it has {', '.join(known)}.",
            )
        values = [{k: v[k] for k in columns if k in v} if isinstance(v, Mapping) else v for v in whole.values]
        return whole._replace(values=values, columns=tuple(columns))

    return Rows(rows.name, rows.files, digest(rows.fingerprint.encode(), *(c.encode() for c in columns)), load)
