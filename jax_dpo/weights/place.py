"""Putting a directory into its place whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jax_dpo.errors import UserError


@contextmanager
def placing(out: Path, replace: bool = False, superseded: tuple[str, ...] = ()) -> Iterator[Path]:
    """A new directory beside `out` to write into, which takes the place of `out` when the block ends without an error.

    Where `out` holds files already: with `replace` the whole directory is exchanged; else the new files go in one by one
    over those of the same name, the files named in `superseded` (glob patterns) that are not among the new ones are
    removed, and everything else stays. After an error nothing has changed.
    Raises UserError: no-space-left, no-permission, path-taken (a file is in the way).
    """
    out = Path(os.path.abspath(out))
    new = out.with_name(f".{out.name}.new-{os.getpid()}")
    try:
        if out.exists() and not out.is_dir():
            raise UserError("path-taken", f"{out} is a file; a directory is to be written there. Give another name.")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield new
        _publish(new, out, replace, superseded)
    except OSError as error:
        raise _explained(error, out) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _publish(new: Path, out: Path, replace: bool, superseded: tuple[str, ...]) -> None:
    if not out.exists() or not any(out.iterdir()):
        os.replace(new, out)
        return
    if replace:
        old = out.with_name(f".{out.name}.old-{os.getpid()}")
        os.replace(out, old)
        os.replace(new, out)
        shutil.rmtree(old, ignore_errors=True)
        return
    written = {p.relative_to(new) for p in new.rglob("*") if p.is_file()}
    for file in sorted(written):
        (out / file).parent.mkdir(exist_ok=True)
        os.replace(new / file, out / file)
    for pattern in superseded:
        for file in out.glob(pattern):
            if file.relative_to(out) not in written:
                file.unlink()


def _explained(error: OSError, out: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(out.parent).free / 1e9
        return UserError(
            "no-space-left", f"No space left while writing {out} ({free:.1f} GB free). Nothing was changed there."
        )
    if isinstance(error, (PermissionError, NotADirectoryError)) or error.errno == errno.EROFS:
        return UserError("no-permission", f"{out} cannot be written: {error.strerror} ({error.filename}).")
    return error
