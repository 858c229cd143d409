"""Safetensors files: an 8-byte length, a JSON header with the place of each tensor, then the numbers.

The header is checked against the size of the file before anything is read, so that a download that broke off is found
at once and by name. Writing goes tensor by tensor: there is never a second copy of the model in memory.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.weights.leaves import DTYPES, FileTensor

CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODE_OF = {name: code for code, name in CODES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; what the safetensors library accepts


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file by name, none of them read yet.

    Raises UserError safetensors-broken (no header, cut off, sizes that do not fit) or tensor-type-unknown.
    """
    size = path.stat().st_size
    file = path.open("rb")
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if start.startswith(b"version "):
        raise _broken(path, "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")
    if size < 8 or length > min(size - 8, _HEADER_LIMIT):
        raise _broken(path, f"has {size} bytes, too few for its own header: it was cut off, or is no safetensors file")
    try:
        header = json.loads(file.read(length))
    except ValueError:
        raise _broken(path, "has a header that is not JSON: it is no safetensors file, or it is damaged") from None
    if not isinstance(header, dict):
        raise _broken(path, "has a header that is no JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(path, file, name, entry, 8 + length, size) for name, entry in header.items()}


def _entry(path: Path, file: Any, name: str, entry: Any, start: int, size: int) -> FileTensor:
    try:
        code, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise _broken(path, f"describes {name} in a way that is not understood: {entry!r}") from None
    if code not in CODES:
        known = ", ".join(CODES)
        raise UserError(
            "tensor-type-unknown", f"{path}: {name} is stored as {code}; the types that can be read are {known}."
        )
    dtype = DTYPES[CODES[code]]
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise _broken(path, f"gives {name} {end - begin} bytes, which do not fit {code} {list(shape)}")
    if start + end > size:
        raise _broken(
            path, f"has {size} bytes, but {name} should end at byte {start + end}: it was cut off; get it again"
        )
    return FileTensor(file, start + begin, shape, dtype)


def _broken(path: Path, what: str) -> UserError:
    return UserError("safetensors-broken", f"{path} {what}.")


class Entry:
    """A tensor to be written: its name and shape, and where its numbers come from."""

    def __init__(self, name: str, shape: Sequence[int], read: Callable[[], np.ndarray]) -> None:
        self.name = name
        self.shape = tuple(int(n) for n in shape)
        self.read = read


def write_file(path: Path, entries: Sequence[Entry], dtype: str) -> int:
    """Writes the tensors, converted to `dtype` one by one, in the order of their names; returns the size of the numbers.

    The file equals that of the safetensors library with metadata {"format": "pt"}. bfloat16 is rounded to nearest, ties
    to even. Raises UserError float16-overflow where a finite number has no finite float16.
    """
    target = DTYPES[dtype]
    ordered = sorted(entries, key=lambda entry: entry.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in ordered:
        end = at + math.prod(entry.shape) * target.itemsize
        header[entry.name] = {"dtype": _CODE_OF[dtype], "shape": list(entry.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for entry in ordered:
            array = entry.read()
            if array.shape != entry.shape:
                raise ValueError(f"{entry.name} is {array.shape}, announced as {entry.shape}")
            out.write(_convert(array, target, entry.name).reshape(-1).view(np.uint8).data)
    return at


def _convert(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        new = np.ascontiguousarray(array.astype(dtype, copy=False))
    if (
        dtype == np.float16
        and array.dtype != np.float16
        and np.isinf(new).sum() > np.isinf(array.astype(np.float32)).sum()
    ):
        raise UserError(
            "float16-overflow",
            f"{name} holds {np.abs(array).max():.4g}, more than float16 can (65504). Write bfloat16 or float32.",
        )
    return new
