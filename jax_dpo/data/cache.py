"""Tokenized data sets on disk, found again by their content.

An entry is one file whose name is a hash of everything that decides the ids: rows, tokenizer, versions, format. Options that
only choose or cut rows are not part of it, so changing them tokenizes nothing anew. Arrays are memory-mapped. An entry that
is damaged is made again; a directory that cannot be written costs time, not the run.

A chat template that writes today's date gives the ids of the day they were made, so that a resumed run sees the same data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
import zlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.data.atomic import PART, replacing
from jax_dpo.data.tokens import Facts, TokenTable

# Raise it with every change of the rules that make a TokenTable.
_FORMAT = 6
_MAGIC = b"JAXDPOT1"
_ALIGN = 64
_ARRAYS = {
    "ids": "int32",
    "bounds": "int64",
    "row": "int64",
    "number": "int64",
    "file_of": "int32",
    "twin": "int64",
    "gap": "float64",
    "given": "float64",
    "scored": "uint8",
    "flags": "uint8",
}


def default_cache_dir() -> Path:
    """`$JAX_DPO_CACHE`, else `$XDG_CACHE_HOME/jax_dpo/tokens`, else `~/.cache/jax_dpo/tokens`."""
    if os.environ.get("JAX_DPO_CACHE"):
        return Path(os.environ["JAX_DPO_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jax_dpo" / "tokens"


def entry_key(
    rows_fingerprint: str, tokenizer_key: str, columns: Sequence[str] = (), reading: Sequence[str | bool] = ()
) -> str:
    """The name of the entry for these rows, this tokenizer and the columns that are read of each pair."""
    versions = [_version(name) for name in ("tokenizers", "transformers")]
    parts = [_FORMAT, rows_fingerprint, tokenizer_key, *versions, sorted(columns), list(reading)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


def entry_path(directory: Path, key: str) -> Path:
    """The file of an entry."""
    return directory / f"{key}.tokens"


def read_entry(path: Path) -> TokenTable | None:
    """The table of an entry, its arrays memory-mapped; None where there is no entry or where it is damaged."""
    try:
        data = np.memmap(path, np.uint8, mode="r")
        if len(data) < 24 or bytes(data[:8]) != _MAGIC:
            return None
        size, crc = (int(x) for x in np.frombuffer(data[8:24], np.uint64))
        head = bytes(data[24 : 24 + size])
        if len(head) != size or zlib.crc32(head) != crc:
            return None
        header = json.loads(head)
        arrays = {name: _array(data, 24 + size, name, header["arrays"][name]) for name in _ARRAYS}
        facts = header["facts"]
        facts["invalid"] = [tuple(item) for item in facts["invalid"]]
        return TokenTable(**arrays, facts=Facts(**facts))
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not what was written
        return None


def write_entry(path: Path, table: TokenTable) -> str | None:
    """Write an entry whole or not at all. Returns None, or, where it could not be written, why."""
    arrays = {name: np.ascontiguousarray(getattr(table, name), dtype) for name, dtype in _ARRAYS.items()}
    offset, specs = 0, {}
    for name, array in arrays.items():
        # Offsets count from the end of the header, whose length they are part of.
        specs[name] = {"offset": offset, "shape": list(array.shape), "crc": zlib.crc32(array.data)}
        offset += -(-array.nbytes // _ALIGN) * _ALIGN
    head = json.dumps({"arrays": specs, "facts": dataclasses.asdict(table.facts)}).encode()
    head += b" " * (-(24 + len(head)) % _ALIGN)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        with replacing(path) as file:
            file.write(_MAGIC + np.asarray([len(head), zlib.crc32(head)], np.uint64).tobytes() + head)
            for array in arrays.values():
                if array.size:
                    file.write(array.data.cast("B"))
                file.write(b"\0" * (-array.nbytes % _ALIGN))
    except OSError as error:
        return f"{path.parent}: {error.strerror or error}"
    return None


def _array(data: np.ndarray, base: int, name: str, spec: dict[str, Any]) -> np.ndarray:
    """One array of an entry. Raises `ValueError` where its bytes are not those that were written."""
    dtype = np.dtype(_ARRAYS[name])
    start, size = base + spec["offset"], int(np.prod(spec["shape"])) * dtype.itemsize
    part = np.asarray(data[start : start + size])
    if len(part) != size or zlib.crc32(part.data) != spec["crc"]:
        raise ValueError(f"the bytes of {name} are not those that were written")
    return part.view(dtype).reshape(spec["shape"])


def _remove_leftovers(directory: Path) -> None:
    """Take away what killed runs left half written a day ago or earlier."""
    for part in directory.glob(f"*{PART}"):
        try:
            if time.time() - part.stat().st_mtime > 86400:
                part.unlink()
        except OSError:  # another process was quicker, or the file is not ours
            continue


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
