"""The attempts at a run (`--retry`) as they lie in its output_dir.

The run that counts lies in output_dir itself, as any run does. One whose gate failed is set aside before the next begins: all that it wrote
moves into `attempt-<k>/`, with a `retry.json` that says what the next one changes. Nothing else is remembered: what is to be done follows
from what lies there, so a process that ends at any point goes on with the same command.

Moving is not one act. It goes through `.attempt-<k>.moving/`, whose retry.json is written first and which gets its last name when it holds
all: one that is found is completed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jax_dpo.errors import UserError
from jax_dpo.report.compare import write_comparison
from jax_dpo.report.html import write_report
from jax_dpo.report.records import read_records
from jax_dpo.train.digest import write_json
from jax_dpo.train.disk import disk_error
from jax_dpo.train.retry import Change
from jax_dpo.trainer import outputs

RETRY, COMPARISON = "retry.json", "comparison.html"
_ATTEMPT = re.compile(r"attempt-(\d+)")
_MOVING = re.compile(r"\.attempt-(\d+)\.moving")


class Attempt(NamedTuple):
    """One that was set aside: its place, and the change that it led to."""

    number: int
    folder: Path
    change: Change

    @property
    def options(self) -> dict[str, Any]:
        """Its options, from its own log."""
        records = read_records(self.folder / "run.jsonl")
        return next((r["options"] for r in records if r["kind"] == "start"), {})


def earlier_attempts(out: Path) -> list[Attempt]:
    """The attempts that were set aside, first one first.

    Raises UserError for a retry.json that cannot be read.
    """
    found = []
    for file in out.glob(f"attempt-*/{RETRY}"):
        try:
            change = Change(**outputs.read_json(file))
            found.append(Attempt(int(file.parent.name.removeprefix("attempt-")), file.parent, change))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                "attempt-broken",
                f"{file}: cannot be read as what an attempt led to ({error}). Expected what --retry writes there. Move {file.parent} "
                "elsewhere to go on without it, or start over with --overwrite_output_dir.",
            ) from error
    return sorted(found)


def set_aside(out: Path, change: Change) -> Path:
    """Moves the run in `out` into the next attempt-<k>/ and returns that. Raises UserError where the disk refuses."""
    taken = [int(found[1]) for folder in out.glob("attempt-*") if (found := _ATTEMPT.fullmatch(folder.name))]
    staging = out / f".attempt-{max(taken, default=0) + 1}.moving"
    try:
        staging.mkdir(exist_ok=True)
        write_json(staging / RETRY, change.to_dict())
    except OSError as error:
        raise disk_error(error, staging, "write") or error from error
    return _complete(out, staging)


def complete_moves(out: Path) -> None:
    """Ends what a process that was killed has begun to set aside. Raises UserError where the disk refuses."""
    for staging in sorted(out.glob(".attempt-*.moving")) if out.is_dir() else []:
        if (staging / RETRY).exists():
            _complete(out, staging)
        else:  # it was killed before anything was moved
            shutil.rmtree(staging, ignore_errors=True)


def clear_attempts(out: Path) -> None:
    """Removes the attempts that were set aside, and the page that compares them."""
    for file in out.glob(f"attempt-*/{RETRY}"):
        shutil.rmtree(file.parent, ignore_errors=True)
    (out / COMPARISON).unlink(missing_ok=True)


def compare_attempts(out: Path) -> Path | None:
    """Writes the page on all attempts, the last of which lies in `out`; None where there is one alone."""
    earlier = earlier_attempts(out)
    if not earlier:
        return None
    folders = [*(a.folder for a in earlier), out]
    return write_comparison(folders, out / COMPARISON, [f"attempt {k}" for k in range(1, len(folders) + 1)])


def _complete(out: Path, staging: Path) -> Path:
    found = _MOVING.fullmatch(staging.name)
    assert found is not None
    target = out / f"attempt-{found[1]}"
    try:
        for entry in outputs.own_entries(out):
            os.replace(entry, staging / entry.name)
        os.replace(staging, target)
    except OSError as error:
        raise disk_error(error, staging, "write") or error from error
    write_report(target)  # its own says that the models lie where they lay
    return target
