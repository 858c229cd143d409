"""One run at a time in an output directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jax_dpo.errors import UserError
from jax_dpo.sharding.multihost import is_primary
from jax_dpo.train.agree import raise_together
from jax_dpo.trainer.outputs import make_output_dir


@contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Keeps other runs out of the directory while this one lasts; a run that is killed leaves no claim. All processes call it.

    Two runs would write over each other's log and delete each other's checkpoints. On a file system without locks there is no claim.

    Raises:
      UserError: another run is at work there; the directory cannot be made or written to.
    """
    error, held = None, -1
    new = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    if is_primary():
        try:
            make_output_dir(output_dir)
            held = _lock(output_dir)
        except UserError as found:
            error = found
    try:
        raise_together(error)
        yield
    finally:
        if held >= 0:
            os.close(held)
        if is_primary():
            with suppress(OSError):  # what is refused leaves no empty directory, and one with something in it stays
                for folder in new:
                    folder.rmdir()


def _lock(folder: Path) -> int:
    """A descriptor of the directory that holds its lock until it is closed, or -1 where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return -1
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if descriptor < 0:
            return -1
        os.close(descriptor)
        if problem.errno != errno.EWOULDBLOCK:
            return -1  # some network file systems have none
        raise UserError(
            "output-dir-in-use",
            f"Another run is at work in {folder}. Wait until it has ended, stop it (Ctrl-C saves first), or give another --output_dir.",
        ) from problem
    return descriptor
