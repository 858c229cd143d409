"""Parameters that are read only when, and only as far as, they are asked for.

A `Leaf` is what one path of the parameter tree holds: its shape and dtype are known at once, its numbers stay on disk
until `read`. A host of a pod reads the slices of its own devices and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType
from typing import IO, Any, Protocol

import ml_dtypes
import numpy as np

Index = tuple[slice | int | EllipsisType, ...]

# The types that weights may be stored in, by the name that config.json uses.
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Leaf(Protocol):
    """One array of numbers somewhere."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, index: Index = ()) -> np.ndarray:
        """A new array with the part `leaf[index]`; the whole array for an empty index."""
        ...


@dataclass(frozen=True)
class FileTensor:
    """A plain array inside a file, row-major, from byte `offset` on.

    The file stays open, so that a directory that is replaced later does not change what is read.
    """

    file: IO[bytes]
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        return np.array(self.view()[index])

    def view(self) -> np.ndarray:
        """The array mapped into memory, not copied: pages come in as they are touched."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        mapped = np.memmap(self.file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)
        return mapped.view(np.ndarray)


@dataclass(frozen=True)
class Stacked:
    """Equal tensors as one leaf: those of all layers, [L, ...], or inside a layer those of all experts, [E, ...]. Only those asked for
    are read."""

    parts: tuple[Leaf, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        found = {part.dtype for part in self.parts}
        return found.pop() if len(found) == 1 else np.dtype(np.float32)

    def read(self, index: Index = ()) -> np.ndarray:
        first, *rest = full_index(index, len(self.shape))
        inner = tuple(rest)
        if isinstance(first, int):
            return self.parts[first].read(inner).astype(self.dtype, copy=False)
        chosen = self.parts[first]
        if not chosen:
            return np.zeros((0, *self.parts[0].read(inner).shape), self.dtype)
        head = chosen[0].read(inner)
        out = np.empty((len(chosen), *head.shape), self.dtype)
        out[0] = head
        for i, part in enumerate(chosen[1:], 1):
            out[i] = part.read(inner)
        return out


@dataclass(frozen=True)
class InMemory:
    """A leaf whose numbers are there already."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        return np.array(self.array[index])


@dataclass(frozen=True)
class Cut:
    """A range of the first axis of a leaf's part at `place`."""

    leaf: Leaf
    place: tuple[int, ...]
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.leaf.shape[len(self.place) + 1 :])

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        first, *rest = full_index(index, len(self.shape))
        at = range(self.start, self.stop)[first]
        if isinstance(at, range):
            at = slice(at.start, at.stop, at.step)  # type: ignore[assignment]
        return self.leaf.read((*self.place, at, *rest))  # type: ignore[arg-type]


def full_index(index: Index, ndim: int) -> list[slice | int]:
    """`index` with one entry for each of `ndim` axes."""
    given = list(index)
    if Ellipsis in given:
        at = given.index(Ellipsis)
        given[at : at + 1] = [slice(None)] * (ndim - len(given) + 1)
    given += [slice(None)] * (ndim - len(given))
    return [entry for entry in given if not isinstance(entry, EllipsisType)]


def part_of(value: Any, place: tuple[int, ...]) -> np.ndarray:
    """The tensor at a place of a leaf, a numpy array or a jax array, as numpy; the whole for ()."""
    return value.read(place) if hasattr(value, "read") else np.asarray(value[place] if place else value)


def layer_of(value: Any, layer: int | None) -> np.ndarray:
    """One layer (or, for None, the whole) of a leaf, a numpy array or a jax array, as numpy."""
    return part_of(value, () if layer is None else (layer,))
