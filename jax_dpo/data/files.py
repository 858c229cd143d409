"""Reading one local data file: JSONL, JSON, CSV or Parquet, with `json`, `csv` and `pyarrow`.

Every row keeps the number under which a person finds it: the line in JSONL, the row (from 1) elsewhere.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_dpo.data.formats import columns_to_read
from jax_dpo.data.pairs import READ_COLUMNS
from jax_dpo.errors import UserError

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}


class FileRows(NamedTuple):
    """Rows of a file, the number of each, and the file's columns where the format names them (else None)."""

    values: list[Any]
    numbers: Sequence[int]
    columns: tuple[str, ...] | None


def file_format(path: Path) -> str | None:
    """`jsonl`, `json`, `parquet` or `csv` by the name's ending (`.gz` may follow, not for Parquet), else None."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    kind = SUFFIXES.get(Path(name[:-3] if packed else name).suffix)
    return None if packed and kind == "parquet" else kind


def file_stem(path: Path) -> str:
    """The file's name without `.gz` and the ending of its format."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return Path(name).stem


def read_file(path: Path) -> FileRows:
    """All rows of a data file.

    Raises `UserError` with file, line or row, and what was found: the file cannot be read, is damaged, or is not what its
    name says.
    """
    kind = file_format(path)
    if kind is None:
        known = ", ".join(SUFFIXES)
        raise UserError("data-file-format", f"{path}: the name's ending says nothing about the format. Known: {known}.")
    try:
        if kind == "parquet":
            return _read_parquet(path)
        text = _read_text(path)
    except OSError as error:
        raise UserError("data-file-unreadable", f"{path} cannot be read: {error.strerror or error}.") from error
    if kind == "csv":
        return _read_csv(path, text)
    return _read_json(path, text)


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                "data-file-damaged", f"{path} is no complete gzip file: {error}. Fetch it again."
            ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            "data-file-encoding",
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8. Save the file as UTF-8 "
            "(for example with `iconv -t UTF-8`).",
        ) from error


def _read_json(path: Path, text: str) -> FileRows:
    if text.lstrip()[:1] == "[":
        return _read_json_list(path, text)
    values: list[Any] = []
    numbers: list[int] = []
    # Only "\n" ends a line: str.splitlines would also cut at characters that may stand inside a JSON text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise _bad_json(path, text, number, line, error) from error
        except RecursionError as error:
            raise UserError("data-json", f"{path}, line {number}: lists or objects are nested too deeply.") from error
        numbers.append(number)
    return FileRows(values, numbers, None)


def _read_json_list(path: Path, text: str) -> FileRows:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "the list"
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(
            "data-json",
            f"{path}, {where}: not valid JSON ({what}). Expected one list of objects, or one object per line.",
        ) from error
    return FileRows(values, range(1, len(values) + 1), None)


def _bad_json(path: Path, text: str, number: int, line: str, error: ValueError) -> UserError:
    column, what = (error.colno, error.msg) if isinstance(error, json.JSONDecodeError) else (1, str(error))
    start = max(0, column - 21)
    found = line[start : column + 20].strip()
    hint = ""
    if text.rstrip().endswith(line.rstrip()) and not line.rstrip().endswith("}"):
        hint = " It is the last line: the file may be incomplete."
    elif number == 1 and line.strip() == "{":
        hint = " The file seems to hold one object over many lines: make it a list of objects."
    return UserError(
        "data-json",
        f"{path}, line {number}, column {column}: not valid JSON ({what}); found {found!r}. "
        f"Expected one JSON object per line.{hint}",
    )


def _read_csv(path: Path, text: str) -> FileRows:
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses answers over 128 KiB
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(reader, None)
        if not header:
            raise UserError("data-empty", f"{path} is empty. Expected a first line with the names of the columns.")
        values = []
        for number, cells in enumerate(filter(None, reader), 1):
            if len(cells) != len(header):
                raise UserError(
                    "data-csv",
                    f"{path}, row {number} (line {reader.line_num}): {len(cells)} fields, the header has {len(header)}. "
                    "A field with a comma or a line break must stand in double quotes.",
                )
            values.append(dict(zip(header, cells)))
    except csv.Error as error:
        raise UserError("data-csv", f"{path}, line {reader.line_num}: not valid CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    return FileRows(values, range(1, len(values) + 1), tuple(header))


def _read_parquet(path: Path) -> FileRows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
            # Only what is used: the other columns of published sets are often larger than the pairs.
            table = file.read(columns=columns_to_read(columns, READ_COLUMNS))
    except pa.ArrowException as error:
        raise UserError("data-file-damaged", f"{path} is no complete Parquet file: {error}. Fetch it again.") from error
    parts = {name: _column_values(table.column(name)) for name in table.column_names}
    values = [dict(zip(parts, cells)) for cells in zip(*parts.values())] if parts else [{}] * table.num_rows
    return FileRows(values, range(1, len(values) + 1), columns)


def _column_values(column: Any) -> list[Any]:
    values = column.to_pylist()
    return [_decode_json(value, column.type) for value in values] if _holds_json(column.type) else values


def _holds_json(kind: Any) -> bool:
    """Whether an Arrow type holds texts that are JSON (`datasets` stores mixed objects so)."""
    return _is_json(kind) or any(_holds_json(kind.field(i).type) for i in range(kind.num_fields))


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.json"


def _decode_json(value: Any, kind: Any) -> Any:
    if value is None:
        return None
    if _is_json(kind):
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, list):
        return [_decode_json(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        return {name: _decode_json(item, kind.field(name).type) for name, item in value.items()}
    return value
