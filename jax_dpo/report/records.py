"""run.jsonl: the one account of a run, a JSON object a line. Reports, curves and cards are made from it alone."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jax_dpo.errors import UserError

Record = dict[str, Any]

KINDS = ("start", "train", "eval", "nonfinite", "kl_action", "checkpoint", "samples", "resume", "verdict", "end")
# What belongs to a step, and is undone with it.
_OF_A_STEP = ("train", "eval", "nonfinite", "kl_action", "checkpoint", "samples", "verdict")
_NO_METRIC = ("kind", "step", "time", "set", "non_finite", "epoch", "reason", "seconds", "kl_profile", "sampled")


class RunLog:
    """Appends records to `path` and takes back those of abandoned steps.

    A record reaches the file whole: one write call a line, and a write that fails half-way is cut off again. What a
    killed process left of a line is removed when the log is opened. Raises `UserError` where the file cannot be
    opened or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _mend(self.path)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _not_writable(self.path, error) from error

    def append(self, record: Mapping[str, Any]) -> Record:
        """Writes one record and returns it as it was written.

        `kind` and `step` must be there, `time` (unix seconds) is added where it is missing. Scalars of numpy and JAX
        become plain numbers. A value that is not finite is written as null, and its name is listed in `non_finite`.
        Raises `ValueError` for a record without `kind` or `step`.
        """
        if record.get("kind") not in KINDS or record.get("step") is None:
            raise ValueError(f"a record has one of the kinds {', '.join(KINDS)}, and a step; this one is {record!r}")
        head = {"kind": record["kind"], "step": int(record["step"]), "time": record.get("time") or time.time()}
        clean = json_ready({**head, **{k: v for k, v in record.items() if k not in head}})
        self._write((json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n").encode())
        return clean

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            while written < len(line):  # a disk that is nearly full takes a part, and then says why
                written += os.write(self._file, line[written:])
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, size)
            raise _not_writable(self.path, error) from error

    def records(self) -> list[Record]:
        """All records so far, in the order of the file."""
        return read_records(self.path)

    def truncate_after(self, step: int) -> int:
        """Takes back what was recorded of steps after `step`, and returns how many records went.

        Used where a run resumes from, or rolls back to, the state after `step`. The actions on KL up to the last
        rollback stay: they happened, and their new values hold on after it. For a rollback, append its `kl_action`
        first and call this then. The file is replaced in one piece.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        parsed = [_parse(line) for line in lines]
        rollbacks = [i for i, r in enumerate(parsed) if r is not None and r.get("action") == "rollback"]
        settled = rollbacks[-1] if rollbacks else -1
        kept = []
        for i, (line, record) in enumerate(zip(lines, parsed)):
            history = record is not None and record.get("kind") == "kl_action" and i <= settled
            if record is None or history or record.get("kind") not in _OF_A_STEP or record.get("step", 0) <= step:
                kept.append(line)
        gone = len(lines) - len(kept)
        if gone:
            self._replace(b"".join(kept))
        return gone

    def _replace(self, content: bytes) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            os.close(self._file)  # it still points at the file that was replaced
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _not_writable(self.path, error) from error

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a run.jsonl. A last line that is torn (its writer was killed, or is writing just now) is left out.

    Raises `UserError` where the file is missing, or where another line than the last is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            "run-log-missing",
            f"{path}: cannot be read ({error.strerror}). Expected the run.jsonl that a training run writes into its "
            "output_dir: give the directory of a run.",
        ) from error
    records = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif i + 1 < len(lines):
            raise UserError(
                "run-log-broken",
                f"{path}: line {i + 1} is not a JSON object ({line[:60].decode(errors='replace')!r}). Every line is "
                "one record of the run; remove this line to use the others.",
            )
    return records


def log_history(records: Iterable[Record]) -> list[dict[str, Any]]:
    """TRL's `trainer.state.log_history`: one dict a log line, its metrics first, then `epoch` and `step`.

    A value that was not finite is NaN here, as in TRL. The dict of the finished run has `train_runtime` (seconds), `train_loss`
    and the metrics of the steps after the last log line.
    """
    history = []
    epoch: Any = None
    for record in records:
        kind = record.get("kind")
        if kind in ("train", "eval"):
            metrics = {k: v for k, v in record.items() if k not in _NO_METRIC}
        elif kind == "end" and record.get("reason") == "done":
            metrics = {k: v for k, v in record.items() if k not in _NO_METRIC}
            metrics = {"train_runtime": record.get("seconds"), **metrics}
        else:
            continue
        metrics.update({k: math.nan for k in record.get("non_finite", ()) if k in metrics})
        epoch = record.get("epoch", epoch)
        history.append({**metrics, **({} if epoch is None else {"epoch": epoch}), "step": record["step"]})
    return history


def json_ready(record: Mapping[str, Any]) -> Record:
    """The record as JSON can hold it: plain types, no NaN or infinity; `non_finite` has the dotted names of those."""
    lost: list[str] = [*record.get("non_finite", ())]
    clean = {str(k): _plain(v, str(k), lost) for k, v in record.items() if k != "non_finite"}
    return {**clean, "non_finite": lost} if lost else clean


def _plain(value: Any, name: str, lost: list[str]) -> Any:
    if isinstance(value, str):  # a lone surrogate, which a decoder may leave, is no UTF-8
        return value.encode("utf-8", "replace").decode()
    if value is None or (isinstance(value, (bool, int)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        lost.append(name)
        return None
    if isinstance(value, enum.Enum):
        return _plain(value.value, name, lost)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{name}.{k}", lost) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{name}.{i}", lost) for i, v in enumerate(value)]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # numpy and JAX, scalars and arrays
        return _plain(value.tolist(), name, lost)
    return _plain(str(value), name, lost)


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _mend(path: Path) -> None:
    """Ends the last line of a log whose writer was killed: completes it, or cuts it off where it is torn."""
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        content = file.read()
        start = content.rfind(b"\n") + 1
        if start == len(content):
            return
        if _parse(content[start:]) is None:
            file.truncate(start)
        else:
            file.write(b"\n")


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(
        "run-log-not-writable",
        f"{path}: the log of the run cannot be written ({error.strerror}). Free some space, or name an output_dir "
        "that can be written to; the same command then goes on from the last checkpoint.",
    )
