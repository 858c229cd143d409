"""GGUF files: metadata, then a table of tensors, then their blocks.

The table is read here, and not with the `gguf` package's reader, so that a file that is cut off or holds an unknown type is
named with the place and the tensor, and a vocabulary of 150,000 words does not take seconds. Types and the arithmetic of
dequantising are the package's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from jax_dpo.errors import UserError
from jax_dpo.weights.leaves import Index, full_index

VERSIONS = (2, 3)
# Every type that the package can turn into float32.
KNOWN_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
    *("MXFP4", "NVFP4"),
)
# Scalars by their code in the file; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file as float32, dequantised when it is read and only in the rows asked for.

    `rows` gives, for each row of the result, the row in the file (None: the same); quantised blocks lie within rows.
    """

    file: IO[bytes]
    offset: int
    shape: tuple[int, ...]
    kind: str
    row_bytes: int
    rows: np.ndarray | None = None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, index: Index = ()) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape, np.float32)[index]
        *lead, columns = self.shape
        stored = np.memmap(self.file, np.uint8, "r", self.offset, (*lead, self.row_bytes)).view(np.ndarray)
        if not lead:
            return _floats(stored[None], self.kind)[0][index].copy()
        first, *rest = full_index(index, len(self.shape))
        chosen = stored[first if self.rows is None else self.rows[first]]
        flat = chosen.reshape(-1, self.row_bytes)
        values = _floats(flat, self.kind).reshape(*chosen.shape[:-1], columns)
        keep = () if isinstance(first, int) else (slice(None),)
        return values[(*keep, *rest)]


def _floats(rows: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        return np.array(dequantize(np.ascontiguousarray(rows), GGMLQuantizationType[kind]), np.float32)


@dataclass(frozen=True)
class GgufFile:
    """Metadata by key, tensors by their GGUF names."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Reads the metadata and the table of tensors.

    Raises UserError: gguf-broken, tensor-type-unknown.
    """
    reader = _Reader(path)
    metadata = {}
    magic = reader.take(4, "the first four bytes")
    if magic != b"GGUF":
        why = (
            "is a Git LFS pointer, not the file itself" if magic == b"vers" else f"begins with {magic!r}, not with GGUF"
        )
        reader.fail(why)
    version = reader.number("I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "is written big-endian" if swapped in VERSIONS else f"is GGUF version {version}"
        reader.fail(f"{what}; versions 2 and 3 in little-endian order can be read")
    tensor_count, key_count = reader.number("Q", "the tensor count"), reader.number("Q", "the key count")
    for i in range(key_count):
        key = reader.text(f"metadata key {i + 1} of {key_count}")
        metadata[key] = reader.value(reader.number("I", key), key)
    table = [reader.tensor(i, tensor_count) for i in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        reader.fail(f"has general.alignment {alignment!r}")
    start = -(-reader.file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, code, offset in table:
        tensors[name] = _tensor(reader, name, shape, code, start + offset)
    return GgufFile(path, metadata, tensors)


def _tensor(reader: _Reader, name: str, shape: tuple[int, ...], code: int, offset: int) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(code).name if code in set(GGMLQuantizationType) else str(code)
    if kind not in KNOWN_TYPES:
        raise UserError(
            "tensor-type-unknown",
            f"{reader.path}: {name} has type {kind}; the types that can be read are {', '.join(KNOWN_TYPES)}.",
        )
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if not shape or shape[-1] % block:
        reader.fail(f"gives {name} the shape {list(shape)}, whose rows are no multiple of {kind}'s {block} numbers")
    row_bytes = shape[-1] // block * block_bytes
    end = offset + math.prod(shape[:-1]) * row_bytes
    if end > reader.size:
        reader.fail(f"has {reader.size} bytes, but {name} should end at byte {end}: it was cut off; get it again")
    return GgufTensor(reader.file, offset, shape, kind, row_bytes)


class _Reader:
    """Reads one value after the other; a file that ends too early is an error that says where."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.file = path.open("rb")

    def fail(self, what: str) -> NoReturn:
        raise UserError("gguf-broken", f"{self.path} {what}.")

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.file.tell():
            self.fail(f"has {self.size} bytes and ends inside {what}: it was cut off, or it is damaged")
        return self.file.read(count)

    def number(self, form: str, what: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return self.fail(f"has {what} that is not UTF-8: it is damaged")

    def value(self, code: int, key: str) -> Any:
        if code in _SCALARS:
            return self.number(_SCALARS[code], key)
        if code == _STRING:
            return self.text(key)
        if code != _ARRAY:
            self.fail(f"has {key} of the unknown kind {code}: it is damaged, or newer than this reader")
        inner, count = self.number("I", key), self.number("Q", key)
        if inner in _SCALARS:
            form = np.dtype("<" + _SCALARS[inner]) if inner != 7 else np.dtype(np.bool_)
            return np.frombuffer(self.take(count * form.itemsize, key), form).tolist()
        if count > self.size:
            self.fail(f"says that {key} has {count} entries: it is damaged")
        return [self.value(inner, key) for _ in range(count)]

    def tensor(self, i: int, count: int) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (slowest axis first), type code and offset of the next entry of the table."""
        name = self.text(f"the entry of tensor {i + 1} of {count}")
        rank = self.number("I", name)
        if rank > 8:
            self.fail(f"gives {name} {rank} dimensions: it is damaged")
        shape = tuple(self.number("Q", name) for _ in range(rank))
        code, offset = self.number("I", name), self.number("Q", name)
        return name, shape[::-1], code, offset
