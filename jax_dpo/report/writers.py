"""Where the records of a run go besides the terminal: run.jsonl, TensorBoard, wandb where it is installed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax_dpo.errors import UserError
from jax_dpo.report import format as fmt
from jax_dpo.report import summary
from jax_dpo.report.records import Record, RunLog, json_ready

_NO_METRIC = frozenset({"kind", "step", "time", "set", "non_finite"})
TARGETS = ("none", "tensorboard", "wandb", "all")


class Writer(Protocol):
    """Takes the records of a run one by one."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Appends every record to a `RunLog`."""

    def __init__(self, log: RunLog) -> None:
        self.log = log

    def write(self, record: Record) -> None:
        self.log.append(record)

    def close(self) -> None:
        self.log.close()


class Writers:
    """The log first, then everything else, so that nothing is shown that is not written down."""

    def __init__(self, log: RunLog, others: Sequence[Writer] = ()) -> None:
        self.log = log
        self.others = list(others)

    def write(self, record: Mapping[str, Any]) -> Record:
        """Appends the record to the log and hands it on as it was written, which it returns."""
        written = self.log.append(record)
        for writer in self.others:
            writer.write(written)
        return written

    def close(self) -> None:
        for writer in self.others:
            writer.close()
        self.log.close()


class TensorBoardWriter:
    """Event files in `directory`: metric m of training as `m/train`, of evaluation as `m/eval`, side by side.

    With several evaluation sets the latter is `m/eval_<set>`. An action on KL is a text and its new value a scalar,
    `kl_action/<option>`. After a resumption or a rollback TensorBoard forgets the steps that were given up.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        from tensorboardX import SummaryWriter

        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(directory), flush_secs=30)
        except OSError as error:
            raise UserError(
                "tensorboard-not-writable",
                f"{directory}: no event file can be written there ({error.strerror}). Free some space, name an "
                "output_dir that can be written to, or leave tensorboard out of report_to.",
            ) from error

    def write(self, record: Record) -> None:
        kind, step, time = record["kind"], record["step"], record.get("time")
        if kind in ("train", "eval"):
            for tag, value in scalars(record):
                self._writer.add_scalar(tag, value, step, walltime=time)
        elif kind == "start":
            self._text("options", _listing(summary.part(record, "options")), step, time)
        elif kind == "resume":
            self._forget_after(step)
        elif kind == "kl_action":
            self._action(record)
        elif kind == "samples":
            self._text("samples", _samples(record), step, time)
        elif kind == "verdict":
            self._text("verdict", str(record.get("headline", "")), step, time)
        if kind in ("eval", "verdict", "end", "kl_action"):
            self._writer.flush()

    def _action(self, record: Record) -> None:
        step, option, new = record["step"], record.get("option"), fmt.finite(record.get("new"))
        if record.get("action") == "rollback" and new is not None:
            step = int(new)
            self._forget_after(step)
        text = f"step {record['step']}: {summary.action_text(record)}. {record.get('reason') or ''}"
        self._text("kl_action", text, step, record.get("time"))
        if option and new is not None:
            self._writer.add_scalar(f"kl_action/{option}", new, step, walltime=record.get("time"))

    def _text(self, tag: str, text: str, step: int, time: float | None) -> None:
        self._writer.add_text(tag, fmt.plain(text), step, walltime=time)

    def _forget_after(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        began = SessionLog(status=SessionLog.START)
        self._writer.file_writer.add_event(Event(step=step + 1, session_log=began), step + 1)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases, with the names that Hugging Face's trainers use there: `train/m` and `eval/m`.

    The environment variable WANDB_PROJECT wins over `project`; entity and mode are what wandb reads from its own.
    """

    def __init__(
        self, directory: str | os.PathLike[str], run_name: str | None = None, project: str | None = None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "wandb-missing",
                "report_to: wandb is asked for, but it is not installed. Install it, or leave it out of report_to.",
            ) from error
        self._run: Any = wandb.init(
            dir=str(directory), name=run_name, project=os.environ.get("WANDB_PROJECT") or project
        )
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def write(self, record: Record) -> None:
        kind, step = record["kind"], record["step"]
        if kind == "start":
            self._run.config.update(json_ready(summary.part(record, "options")), allow_val_change=True)
        elif kind == "train":
            self._log(step, {f"train/{name}": value for name, value in metrics(record)})
        elif kind == "eval":
            self._log(step, {f"eval/{name.removeprefix('eval_')}": value for name, value in metrics(record)})
        elif kind == "kl_action" and record.get("option") and fmt.finite(record.get("new")) is not None:
            self._log(step, {f"kl_action/{record['option']}": float(record["new"])})
        elif kind == "verdict":
            self._run.summary["verdict"] = record.get("headline")

    def _log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "train/global_step": step})

    def close(self) -> None:
        self._run.finish()


def open_writers(
    report_to: str | Sequence[str] | None,
    output_dir: str | os.PathLike[str],
    run_name: str | None = None,
    project: str | None = None,
) -> list[Writer]:
    """The writers that `report_to` names: "none", "tensorboard", "wandb", or "all" that are installed.

    TensorBoard's files lie in `output_dir`/tensorboard. Raises `UserError` for an unknown name, or for wandb where it
    is asked for and not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    unknown = [n for n in names if n not in TARGETS]
    if unknown:
        raise UserError(
            "report-to-unknown",
            f"report_to: {unknown[0]!r} is not known. Expected one or more of {', '.join(TARGETS)}.",
        )
    writers: list[Writer] = []
    if "tensorboard" in names or "all" in names:
        writers.append(TensorBoardWriter(Path(output_dir) / "tensorboard"))
    if "wandb" in names or ("all" in names and _installed("wandb")):
        writers.append(WandbWriter(output_dir, run_name, project))
    return writers


def metrics(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a training or evaluation record by name; NaN for one that was not finite."""
    lost = record.get("non_finite", ())
    for name, value in record.items():
        number = math.nan if name in lost else fmt.finite(value)
        if name not in _NO_METRIC and number is not None:
            yield name, number


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The same under TensorBoard's tags."""
    name = record.get("set")
    for metric, value in metrics(record):
        if record["kind"] == "train":
            yield f"{metric}/train", value
        elif name:
            yield f"{metric.removeprefix('eval_').removeprefix(f'{name}_')}/eval_{name}", value
        else:
            yield f"{metric.removeprefix('eval_')}/eval", value


def _listing(options: Mapping[str, Any]) -> str:
    return "\n".join(f"    {name}: {fmt.option(value)}" for name, value in options.items())


def _samples(record: Record) -> str:
    def quoted(name: str, text: Any) -> str:
        body = "\n".join("    " + line for line in fmt.plain(text).splitlines())
        return f"{name}\n\n{body}"

    listed = [
        "\n\n".join(quoted(key, summary.said(sample.get(key))) for key in ("prompt", "reference", "policy"))
        for sample in record.get("samples") or []
    ]
    return "\n\n---\n\n".join([str(record.get("title") or ""), *listed])


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
