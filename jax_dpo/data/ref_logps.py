"""Log-probabilities that a reference gives the answers of a data set, on disk: computed once, found again by what they depend on.

An entry is a directory named by its key. Each file in it holds the pairs of one range, is whole or absent, and names its range and its
key, so that a computation that was interrupted goes on where it stopped, whatever the size of its pieces. A file that is damaged is
left out and computed anew.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from jax_dpo.data.atomic import replacing

_MAGIC = b"JAXDPOR1"
_SUFFIX = ".logps"


class RefLogps:
    """The entry `key` below `directory`, of `pairs` pairs."""

    def __init__(self, directory: Path, key: str, pairs: int) -> None:
        self.folder, self.key, self.pairs = directory / key, key, pairs
        self.damaged: list[Path] = []

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """(log-probabilities [N, 2] of chosen and rejected, float32; which pairs are known [N], bool). `damaged` names files left out."""
        values, known = np.zeros((self.pairs, 2), np.float32), np.zeros(self.pairs, bool)
        self.damaged = []
        try:
            files = sorted(self.folder.glob(f"*{_SUFFIX}"))
        except OSError:
            return values, known
        for file in files:
            part = self._part(file)
            if part is None:
                self.damaged.append(file)
                continue
            start, rows = part
            values[start : start + len(rows)] = rows
            known[start : start + len(rows)] = True
        return values, known

    def _part(self, file: Path) -> tuple[int, np.ndarray] | None:
        """(first pair, their log-probabilities [n, 2]) of a file; None where it is not what was written."""
        try:
            data = file.read_bytes()
            if data[:8] != _MAGIC or zlib.crc32(data[12:]) != int.from_bytes(data[8:12], "little"):
                return None
            head, _, body = data[12:].partition(b"\n")
            facts = json.loads(head)
            start, rows = int(facts["start"]), np.frombuffer(body, "<f4").reshape(-1, 2)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        fits = facts.get("key") == self.key and start >= 0 and start + len(rows) <= self.pairs
        return (start, rows) if fits and len(rows) else None

    def write(self, start: int, rows: np.ndarray) -> str | None:
        """Keeps the log-probabilities [n, 2] of the pairs from `start` on. Returns None, or why they could not be kept."""
        body = (
            json.dumps({"key": self.key, "start": start}).encode() + b"\n" + np.ascontiguousarray(rows, "<f4").tobytes()
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / f"{start:09d}-{start + len(rows):09d}{_SUFFIX}") as file:
                file.write(_MAGIC + zlib.crc32(body).to_bytes(4, "little") + body)
        except OSError as error:
            return f"{self.folder}: {error.strerror or error}"
        return None
