"""Safetensors in and out. Oracle: the safetensors library, byte for byte."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_dpo.errors import UserError
from jax_dpo.weights.leaves import DTYPES, FileTensor, InMemory, Stacked, full_index
from jax_dpo.weights.safetensors_file import Entry, read_header, write_file


def arrays(dtype: str = "float32") -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"b.weight": (5, 3), "a.weight": (4,), "a.bias": (), "c\u00e9": (2, 3, 4), "empty": (0, 3)}
    return {name: random.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_written_as_the_library_writes(dtype: str, tmp_path: Path) -> None:
    data = arrays(dtype)
    save_file(data, tmp_path / "library", metadata={"format": "pt"})
    entries = [Entry(name, x.shape, lambda x=x: x) for name, x in data.items()]
    size = write_file(tmp_path / "ours", entries, dtype)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    assert size == sum(x.nbytes for x in data.values())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_read_what_the_library_wrote(dtype: str, tmp_path: Path) -> None:
    data = arrays(dtype)
    save_file(data, tmp_path / "file")
    found = read_header(tmp_path / "file")
    assert set(found) == set(data)
    for name, x in data.items():
        assert found[name].shape == x.shape and found[name].dtype == x.dtype
        assert found[name].read().tobytes() == x.tobytes()
    part = found["c\u00e9"].read((slice(1, 2), ..., slice(0, 4, 2)))
    assert part.flags.writeable and part.tobytes() == data["c\u00e9"][1:2, ..., 0:4:2].tobytes()


def test_bfloat16_is_rounded_to_nearest_even(tmp_path: Path) -> None:
    """Oracle: the rounding rule on the bits."""
    values = np.random.default_rng(1).standard_normal(4096).astype(np.float32)
    values[:4] = [
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-8 + 2**-20,
        -(1 + 2**-8),
    ]  # two ties, one just above, one negative tie
    bits = values.view(np.uint32).astype(np.uint64)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    write_file(tmp_path / "file", [Entry("x", values.shape, lambda: values)], "bfloat16")
    assert np.array_equal(read_header(tmp_path / "file")["x"].read().view(np.uint16), expected)


def test_float16_that_would_overflow_is_refused(tmp_path: Path) -> None:
    values = np.float32([1.0, 70000.0])
    with pytest.raises(UserError, match=r"w holds 7e\+04.*bfloat16") as caught:
        write_file(tmp_path / "file", [Entry("w", values.shape, lambda: values)], "float16")
    assert caught.value.name == "float16-overflow"


def test_broken_files_are_named(tmp_path: Path) -> None:
    save_file(arrays(), tmp_path / "good")
    whole = (tmp_path / "good").read_bytes()
    cases = {
        "cut": (whole[:-5], "c\u00e9 should end at byte"),
        "cut-in-header": (whole[:60], "too few for its own header"),
        "empty": (b"", "has 0 bytes"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "noise": (b"\x10" + bytes(7) + b"x" * 30, "not JSON"),
        "type": (whole.replace(b'"F32"', b'"I32"', 1), "stored as I32"),
        "size": (whole.replace(b"[5,3]", b"[5,9]"), "b.weight"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_header(tmp_path / name)
        assert words in str(caught.value) and str(tmp_path / name) in str(caught.value), caught.value


def test_a_file_replaced_after_opening_does_not_change_what_is_read(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "file")
    tensor = read_header(tmp_path / "file")["x"]
    save_file({"more": np.ones(9, np.float32), "x": np.ones(3, np.float32)}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "file")
    assert np.array_equal(tensor.read(), np.zeros(3, np.float32))


INDICES = [
    (),
    (1,),
    (slice(0, 2),),
    (slice(None), 2),
    (..., slice(1, 3)),
    (slice(2, 0, -1), slice(1, 2), 0),
    (-1, ..., 1),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_stacked_leaves_index_as_numpy_does(index: tuple, tmp_path: Path) -> None:
    whole = np.random.default_rng(2).standard_normal((3, 4, 5)).astype(np.float32)
    leaf = Stacked(tuple(InMemory(x) for x in whole))
    assert leaf.shape == whole.shape
    assert np.array_equal(leaf.read(index), whole[index])


class Counting:
    shape, dtype = (2, 2), np.dtype(np.float32)

    def __init__(self) -> None:
        self.reads = 0

    def read(self, index: tuple = ()) -> np.ndarray:
        self.reads += 1
        return np.zeros(self.shape, self.dtype)[index]


def test_only_the_layers_asked_for_are_read() -> None:
    layers = tuple(Counting() for _ in range(4))
    Stacked(layers).read((slice(1, 3), slice(0, 1)))
    assert [layer.reads for layer in layers] == [0, 1, 1, 0]
    assert Stacked(layers).read((slice(2, 2),)).shape == (0, 2, 2)


def test_layers_of_different_types_come_as_float32() -> None:
    parts = (InMemory(np.ones(2, ml_dtypes.bfloat16)), InMemory(np.ones(2, np.float32)))
    leaf = Stacked(parts)
    assert leaf.dtype == leaf.read().dtype == leaf.read((0,)).dtype == np.float32


def test_full_index() -> None:
    assert full_index((..., 1), 3) == [slice(None), slice(None), 1]
    assert full_index((2,), 2) == [2, slice(None)]


def test_the_library_reads_ours(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_file(tmp_path / "file", [Entry("x", x.shape, lambda: x)], "float32")
    assert np.array_equal(load_file(tmp_path / "file")["x"], x)
    assert isinstance(read_header(tmp_path / "file")["x"], FileTensor)
