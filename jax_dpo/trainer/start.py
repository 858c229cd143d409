"""Where a run begins: at its start, or where the run that is in its directory stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_dpo.config import DPOConfig
from jax_dpo.errors import UserError, named
from jax_dpo.report.records import json_ready, read_records
from jax_dpo.report.terminal import Display
from jax_dpo.sharding.multihost import from_primary, is_primary
from jax_dpo.train.agree import raise_together
from jax_dpo.train.checkpoint import Checkpoints
from jax_dpo.train.parts import Parts
from jax_dpo.train.progress import Progress
from jax_dpo.train.state import TrainState
from jax_dpo.trainer import outputs
from jax_dpo.trainer.attempts import clear_attempts, earlier_attempts


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint's step, at the beginning (None), or not at all, since it is finished."""

    step: int | None = None
    path: Path | None = None
    finished: bool = False
    passed_over: tuple[str, ...] = ()
    """what is wrong with newer checkpoints, a sentence each"""

    def restore(self, parts: Parts, abstract: TrainState, notes: list[str]) -> tuple[TrainState, Progress]:
        """State and progress of the checkpoint; what the log says of later steps is taken back. `notes` are for the user to read."""
        assert self.step is not None
        where = self.path if self.path is not None else self.step
        state, meta = parts.checkpoints.restore(where, abstract)
        progress = Progress.from_meta(meta)
        progress.keep_saved(parts.checkpoints.steps())
        if self.path is None or self.path.parent.resolve() == parts.checkpoints.output_dir.resolve():
            parts.writers.log.truncate_after(self.step)
        notes = [*notes, *(named("checkpoint-passed-over", text) for text in self.passed_over)]
        record = {"kind": "resume", "step": self.step, "from": f"checkpoint-{self.step}"}
        parts.display.write(parts.writers.write({**record, "warnings": notes} if notes else record))
        return state, progress


def resume_step(
    out: Path, wanted: bool | str | Path | None, config: DPOConfig, run: Mapping[str, Any], display: Display
) -> Start:
    """Decides where the run begins, and makes the output directory ready for it. All processes of a run call it.

    Raises:
      UserError: a run is there and nothing says what to do with it; nothing to resume from; a damaged checkpoint.
    """
    error, decision = None, FRESH
    if is_primary():
        try:
            decision = _decide(out, wanted, config, run)
        except UserError as found:
            error = found
    raise_together(error)
    decision = from_primary(decision)
    if decision == FINISHED:
        return Start(finished=True)
    start = Start() if decision == FRESH else _checkpoint(out, wanted)
    if is_primary():
        try:
            if start.step is None and outputs.holds_run(out):
                outputs.clear_run(out)  # a run that was stopped before its first checkpoint starts over
            outputs.make_output_dir(out)
        except UserError as found:
            error = found
    raise_together(error)
    return start


FRESH, FINISHED, RESUME = 0, 1, 2


def _decide(out: Path, wanted: bool | str | Path | None, config: DPOConfig, run: Mapping[str, Any]) -> int:
    """What is to be done with the directory, from what lies in it: one process looks."""
    if config.overwrite_output_dir:
        outputs.clear_run(out)
        clear_attempts(out)
    if wanted is None or wanted is False:
        outputs.refuse_second_run(out, attempts=bool(earlier_attempts(out)))
        return FRESH
    if wanted == "auto" and outputs.holds_run(out):
        changed = _differences(out, run)
        if changed:
            raise UserError(
                "output-dir-other-run",
                f"{out} holds a run of other options: {'; '.join(changed)}. To go on with these options all the same: "
                "--resume_from_checkpoint true. To start over: --overwrite_output_dir. To keep it: another --output_dir.",
            )
        if outputs.finished(out):
            return FINISHED
    return RESUME


def _checkpoint(out: Path, wanted: bool | str | Path | None) -> Start:
    """The checkpoint to go on from: the one that is named, or the newest that is whole; every process checks its part."""
    if wanted not in (True, "auto"):
        path = Path(str(wanted))
        with Checkpoints(path.parent, save_total_limit=None, primary=is_primary()) as checkpoints:
            return Start(int(checkpoints.read_meta(path)["step"]), path.absolute())
    with Checkpoints(out, save_total_limit=None, primary=is_primary()) as checkpoints:
        found = checkpoints.latest_good()
    if found.step is None and found.skipped:
        # To start over would delete what may be of use to somebody.
        raise UserError(
            "no-checkpoint-whole",
            f"No checkpoint of {out} can be gone on from. {' '.join(found.skipped)} To start over: --overwrite_output_dir. To keep it: "
            "another --output_dir.",
        )
    if found.step is None and wanted is True:
        raise UserError(
            "nothing-to-resume",
            f"resume_from_checkpoint is true, but there is nothing to go on from in {out}. It has no complete checkpoint. "
            "Leave it out to start, or write auto to start where there is nothing.",
        )
    return Start(found.step, passed_over=tuple(found.skipped))


def _differences(out: Path, run: Mapping[str, Any]) -> list[str]:
    """How a run that is there differs from this one, option by option; where it lies does not count."""
    then = run_of(out)
    if then is None:
        return []
    now = json_ready(run)
    found = option_differences(then["options"], now["options"])
    return found + [f"another {key}" for key in ("model", "reference", "adapter", "data") if now[key] != then.get(key)]


def run_of(folder: Path) -> dict[str, Any] | None:
    """What a run said at its start of what makes it this run (`Run.identity`); None where there is none."""
    if not (folder / "run.jsonl").exists():
        return None
    start = next((r for r in read_records(folder / "run.jsonl") if r["kind"] == "start"), None)
    return None if start is None else start.get("run")


def option_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The options of two runs that differ, in words; where a run lies does not count."""
    ignored = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir", "report_to", "compile_cache_dir"}
    ignored |= {"dataset_cache_dir", "coordinator_address", "num_processes", "process_id"}
    names = sorted({*now, *then} - ignored)
    return [f"{n} {then.get(n)} there, {now.get(n)} now" for n in names if now.get(n) != then.get(n)]
