"""Checkpoints on disk: saved in the background, complete or absent, checked before they are restored.

`output_dir/checkpoint-<step>/` holds Orbax's items `state` (arrays) and `meta` (JSON), a `trainer_state.json` with the
keys of Hugging Face's trainers, and `digest.json`. All of it is written to `.checkpoint-<step>.saving` and renamed once
it is whole, so whoever walks `checkpoint-*` never meets half a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from jax_dpo.errors import UserError, named
from jax_dpo.train import orbax_items
from jax_dpo.train.agree import first_text, raise_together
from jax_dpo.train.digest import (
    DIGEST,
    compare_arrays,
    damage,
    named_leaves,
    plain,
    read_digest,
    write_digest,
    write_json,
)
from jax_dpo.train.disk import disk_error, no_space, size_text

TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)$")
# Names that only this module gives: half-written, half-deleted. Orbax adds a suffix to the first while it writes.
_LITTER = re.compile(r"\.checkpoint-\d+\.(saving|replaced|deleted)(\.orbax-checkpoint-tmp.*)?$")


class Latest(NamedTuple):
    """What a run can go on from: the step, and a sentence for each newer checkpoint that was passed over."""

    step: int | None
    skipped: list[str]


class Checkpoints:
    """The checkpoints below one `output_dir`. On several hosts all processes make the same calls in the same order.

    Args:
        output_dir: a directory that all hosts see; made with the first save.
        save_total_limit: how many of the newest are kept beside the protected ones; None or 0 keeps all.
        primary: whether this process writes JSON files, renames and deletes (one process of a run does).
        say: told, in the calling thread, what a person should know (a directory was set aside, or not deleted).
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        save_total_limit: int | None,
        primary: bool = True,
        say: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.save_total_limit = save_total_limit
        self._primary = primary
        self._say = say
        self._orbax: Any = None
        self._thread: threading.Thread | None = None
        self._saving: int | None = None
        self._failure: BaseException | None = None
        self._notes: list[str] = []
        self._tidied = False
        self._checked: Path | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close() if error is None else self._close_alone()

    def path(self, step: int | str | Path) -> Path:
        """The directory of a step; a path is taken as it is."""
        return Path(step) if isinstance(step, str | Path) else self.output_dir / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in rising order. What has no `digest.json` is not one."""
        try:
            names = os.listdir(self.output_dir)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError as error:
            raise disk_error(error, self.output_dir, "read") or error from error
        found = [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]
        return sorted(step for step in found if (self.path(step) / DIGEST).is_file())

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        trainer_state: Mapping[str, Any],
        *,
        protect: Collection[int] = (),
    ) -> None:
        """Start to save, and return once the arrays are copied: they may be donated right after.

        A save of before is awaited first, and its failure raised. When this one is complete, older checkpoints are
        deleted except the newest `save_total_limit` and those of the steps in `protect`. A complete checkpoint of the
        same step is replaced; anything else of that name is set aside as `incomplete-checkpoint-<step>`, not deleted.

        Args:
            state: a tree of arrays, sharded or not. Paths of its leaves are the names in the checkpoint.
            meta: plain data (numpy scalars are made plain); keys are strings.
            trainer_state: what `trainer_state.json` is to hold.
            protect: steps that rotation leaves alone: the best, the newest one within the KL bound.

        Raises:
            UserError: no space left, no permission, `output_dir` is no directory.
        """
        self.wait()
        meta, trainer_state = plain(meta), plain(trainer_state)
        arrays = named_leaves(state)
        raise_together(self._prepare(step, arrays) if self._primary else None)
        self._checked = None
        self._saving = step
        try:
            orbax_items.start_write(self._checkpointer(), self._hidden(step, "saving"), arrays, meta)
        except Exception as error:
            self._failure = error
            self._discard(step)
            self.wait()
        kinds = {name: (str(leaf.dtype), list(leaf.shape)) for name, leaf in arrays.items()}
        self._thread = threading.Thread(
            target=self._finish, args=(step, kinds, trainer_state, frozenset(protect)), name="jax-dpo-checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Block until no save is under way.

        Raises:
            UserError: the save failed for want of space or permission; says where and what to do.
            RuntimeError: it failed otherwise.
        """
        step, failure = self._settle()
        if step is None:
            return
        error = _save_error(failure, self.path(step)) if failure is not None else None
        if error is not None and not isinstance(failure, _PrimaryOnly):
            raise error  # Orbax's commit fails on all processes, or on none
        raise_together(error)

    def restore(self, step: int | str | Path, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint back: (state, meta).

        Args:
            step: a step, or the path of a checkpoint.
            abstract: a tree as it was saved, whose leaves have `shape`, `dtype` and `sharding` (`jax.ShapeDtypeStruct`,
                or arrays); the arrays come back with these shardings, whatever they were saved with. No sharding is the
                first device.

        Raises:
            UserError: it is not there, a file is damaged (named), or its arrays are not those of `abstract` (named).
        """
        import jax

        self.wait()
        directory = self.path(step)
        if self._checked != directory:
            raise_together(_damaged(directory, self._damage(directory), self.steps()))
        self._checked = None
        wanted = named_leaves(abstract)
        written = (read_digest(directory) or {}).get("arrays", {})
        compare_arrays(directory, written, wanted)
        arrays, meta = orbax_items.read(self._checkpointer(), directory, wanted)
        return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted]), meta

    def read_meta(self, step: int | str | Path) -> dict[str, Any]:
        """The `meta` of a checkpoint without its arrays: what a run needs to know before it makes its state."""
        self.wait()
        directory = self.path(step)
        raise_together(_damaged(directory, self._damage(directory), self.steps()))
        self._checked = directory
        return orbax_items.read_meta(self._checkpointer(), directory)

    def read_trainer_state(self, step: int | str | Path) -> dict[str, Any]:
        """What `trainer_state.json` of a checkpoint holds."""
        directory = self.path(step)
        try:
            return json.loads((directory / TRAINER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError("checkpoint-damaged", f"{directory / TRAINER_STATE} cannot be read: {error}") from error

    def latest_good(self) -> Latest:
        """The newest checkpoint that is whole, for a run that goes on. What a killed save left is cleaned away first."""
        self.wait()
        if self._primary:
            self._tidy()
        steps = first_text(",".join(map(str, self.steps())) if self._primary else "")
        skipped: list[str] = []
        for step in sorted(map(int, filter(None, steps.split(","))), reverse=True):
            problem = first_text(self._damage(self.path(step)))
            if not problem:
                self._checked = self.path(step)
                return Latest(step, skipped)
            skipped.append(f"{self.path(step)} is passed over: {problem}")
        return Latest(None, skipped)

    def delete_after(self, step: int) -> list[int]:
        """Delete the complete checkpoints of later steps, which a rollback abandons, newest first; returns the steps."""
        self.wait()
        later = [other for other in self.steps() if other > step]
        raise_together(None)  # all have looked before one deletes
        error = None
        if self._primary:
            for other in reversed(later):
                try:
                    self._delete(other)
                except OSError as failed:
                    error = disk_error(failed, self.path(other), "delete")
                    error = error or UserError("checkpoint-not-deleted", f"{self.path(other)}: {failed}")
                    break
        raise_together(error)
        return later

    def close(self) -> None:
        """Wait for the last save, raise its failure, and end Orbax's threads. May be called again."""
        try:
            self.wait()
        finally:
            self._end_orbax()

    def _close_alone(self) -> None:
        """Let the last save end where an error ends the run: that one is raised, a failure of the save only told.

        Nothing is exchanged with other processes, which know nothing of the error and would not answer.
        """
        step, failure = self._settle()
        if step is not None and failure is not None:
            self._say(str(_save_error(failure, self.path(step))))
        self._end_orbax()

    def _end_orbax(self) -> None:
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None

    def _settle(self) -> tuple[int | None, BaseException | None]:
        """Wait for the thread; the step that it saved, if any, and its failure."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        step, self._saving = self._saving, None
        failure, self._failure = self._failure, None
        notes, self._notes = self._notes, []
        for note in notes:
            self._say(note)
        return step, failure

    def _checkpointer(self) -> Any:
        if self._orbax is None:
            self._orbax = orbax_items.open_checkpointer()
        return self._orbax

    def _hidden(self, step: int, what: str) -> Path:
        return self.output_dir / f".checkpoint-{step}.{what}"

    def _prepare(self, step: int, arrays: Mapping[str, Any]) -> UserError | None:
        """Make the place for a save, on the primary; returns what stands in its way."""
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if not os.access(self.output_dir, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._tidy()
            self._discard(step)
            free = shutil.disk_usage(self.output_dir).free
        except OSError as error:
            return disk_error(error, self.output_dir, "write") or UserError(
                "output-dir-unusable", f"{self.output_dir} cannot be used: {error.strerror or error}."
            )
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.values())
        if free >= needed:
            return None
        return no_space(self.path(step), f"the checkpoint needs {size_text(needed)}, {size_text(free)} are free")

    def _finish(
        self, step: int, arrays: dict[str, tuple[str, list[int]]], trainer_state: Any, protect: frozenset[int]
    ) -> None:
        """Runs in the background: await Orbax's commit, write our files, move the whole into place, rotate."""
        try:
            self._orbax.wait_until_finished()
        except BaseException as error:
            self._failure = error
            self._discard(step)
            return
        if not self._primary:
            return
        try:
            staged = self._hidden(step, "saving")
            write_json(staged / TRAINER_STATE, trainer_state)
            write_digest(staged, step=step, arrays=arrays)
            self._move_in(step)
        except BaseException as error:
            self._failure = _PrimaryOnly(error)
            self._discard(step)
            return
        try:
            self._rotate(step, protect)
        except Exception as error:  # the new checkpoint is whole: old ones that stay are no reason to end a run
            self._notes.append(
                named("old-checkpoints-kept", f"Old checkpoints in {self.output_dir} were not deleted: {error}")
            )

    def _move_in(self, step: int) -> None:
        final, replaced = self.path(step), self._hidden(step, "replaced")
        if os.path.lexists(final):
            if _is_ours(final):
                os.rename(final, replaced)
            else:
                aside = self.output_dir / f"incomplete-{final.name}"
                number = 1
                while os.path.lexists(aside):
                    number += 1
                    aside = self.output_dir / f"incomplete-{final.name}-{number}"
                os.rename(final, aside)
                self._notes.append(
                    named(
                        "checkpoint-set-aside",
                        f"{final} was not a complete checkpoint of this program: it is now {aside}.",
                    )
                )
        os.rename(self._hidden(step, "saving"), final)
        shutil.rmtree(replaced, ignore_errors=True)

    def _rotate(self, newest: int, protect: frozenset[int]) -> None:
        if not self.save_total_limit or self.save_total_limit < 0:
            return
        older = [step for step in self.steps() if step != newest]
        beside = self.save_total_limit - 1
        keep = {*(older[-beside:] if beside else []), *protect}
        for step in older:
            if step in keep:
                continue
            try:
                self._delete(step)
            except OSError as error:
                self._notes.append(
                    named("old-checkpoints-kept", f"{self.path(step)} could not be deleted: {error.strerror or error}.")
                )

    def _delete(self, step: int) -> None:
        """Delete a checkpoint that this program made; the rename first, so that no half of it is ever listed."""
        if _is_ours(self.path(step)):
            hidden = self._hidden(step, "deleted")
            shutil.rmtree(hidden, ignore_errors=True)
            os.rename(self.path(step), hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def _discard(self, step: int) -> None:
        """Remove what a save that failed or was killed left for this step."""
        if self._primary:
            for left in self.output_dir.glob(f".checkpoint-{step}.saving*"):
                if _LITTER.fullmatch(left.name):
                    shutil.rmtree(left, ignore_errors=True)

    def _tidy(self) -> None:
        """Once: finish a save that was killed between two renames, and remove what other killed ones left."""
        if self._tidied:
            return
        self._tidied = True
        for left in sorted(self.output_dir.glob(".checkpoint-*")):
            if not _LITTER.fullmatch(left.name):
                continue
            final = left.with_name(left.name.removeprefix(".").partition(".")[0])
            if left.suffix == ".saving" and read_digest(left) and not os.path.lexists(final):
                with contextlib.suppress(OSError):
                    os.rename(left, final)
            else:
                shutil.rmtree(left, ignore_errors=True)

    def _damage(self, directory: Path) -> str:
        import jax

        return damage(directory, part=jax.process_index(), parts=jax.process_count())


class _PrimaryOnly(Exception):
    """A failure after Orbax's commit, which only the primary knows of."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _save_error(failure: BaseException, path: Path) -> Exception:
    failure = failure.cause if isinstance(failure, _PrimaryOnly) else failure
    error = disk_error(failure, path, "write")
    if error is None:
        other = RuntimeError(f"{path} could not be saved: {type(failure).__name__}: {str(failure)[:500]}")
        other.__cause__ = failure
        return other
    return error


def _damaged(directory: Path, problem: str, steps: list[int]) -> UserError | None:
    if not problem:
        return None
    others = ", ".join(f"checkpoint-{step}" for step in steps if f"checkpoint-{step}" != directory.name)
    found = f"Other checkpoints there: {others}." if others else "There is no other checkpoint."
    if not directory.is_dir():
        return UserError("checkpoint-missing", f"{directory}: {problem}. {found}")
    return UserError(
        "checkpoint-damaged",
        f"{directory} cannot be restored: {problem}. {found} "
        "Name another one, or move this one away and start the run again.",
    )


def _is_ours(path: Path) -> bool:
    return not path.is_symlink() and read_digest(path) is not None
