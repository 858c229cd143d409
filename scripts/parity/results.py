"""A case and what came of it, read from the files that both sides have left."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scripts.parity.cases import Case
from scripts.parity.compare import Measure, measures

SIDES = ("ours", "theirs", "again")


@dataclass
class Result:
    """Measures of a case, or why there are none."""

    case: Case
    measures: list[Measure] = field(default_factory=list)
    itself: dict[str, float] = field(default_factory=dict)
    """quantity -> how far TRL is from itself"""
    failure: str = ""

    @property
    def holds(self) -> bool:
        return bool(self.measures) and not self.failure and all(m.holds for m in self.measures)


def finished(folder: Path, file: str) -> bool:
    """Whether all sides have left their numbers, or their failure, of a case."""
    return all(any((folder / f"{file}.{side}.{end}").exists() for end in ("npz", "txt")) for side in SIDES)


def result_of(case: Case, folder: Path) -> Result:
    """Compares what lies in `folder` of a case."""
    sides = []
    for side in SIDES:
        failed = folder / f"{case.file}.{side}.txt"
        if failed.exists():
            return Result(case, failure=f"{side}: {failed.read_text(encoding='utf-8').strip().splitlines()[-1]}")
        with np.load(folder / f"{case.file}.{side}.npz") as arrays:
            sides.append(dict(arrays))
    ours, theirs, again = sides
    return Result(case, measures(case, ours, theirs), {m.quantity: m.difference for m in measures(case, again, theirs)})


def line(result: Result) -> str:
    """A case in one line, with what is over its limit, or else what is nearest to it."""
    name = f"{result.case.area}: {result.case.name}"
    if result.failure:
        return f"FAIL  {name}: {result.failure}"
    told = result.measures if not result.holds else [max(result.measures, key=lambda m: m.share)]
    words = [
        f"{m.quantity} {m.difference:.1e} of {m.limit:.0e} (TRL from itself {result.itself.get(m.quantity, 0.0):.1e}; {m.note})"
        for m in told
        if result.holds or not m.holds
    ]
    return f"{'ok  ' if result.holds else 'FAIL'}  {name}: {'; '.join(words)}"
