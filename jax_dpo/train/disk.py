"""What a disk can refuse, told as a person's mistake or misfortune: no space, no permission, no directory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from jax_dpo.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_DIRECTORY = {errno.ENOTDIR, errno.EEXIST}
# Storage libraries hand on the operating system's words inside errors of their own.
_WORDS = [(os.strerror(code), code) for code in (*_FULL, *_FORBIDDEN, errno.ENOTDIR)]


def disk_error(error: BaseException, path: Path, verb: str) -> UserError | None:
    """The message for `error` or for what caused it, or None where that is nothing of the disk's.

    `verb` is what was to be done with `path`: write, read, delete.
    """
    seen: BaseException | None = error
    while seen is not None:
        code = seen.errno if isinstance(seen, OSError) else None
        if code is None:
            text = str(seen)
            code = next((number for words, number in _WORDS if words in text), None)
        if code in _FULL:
            return no_space(path, os.strerror(code))
        if code in _FORBIDDEN:
            return UserError(
                "no-permission",
                f"{path}: no permission to {verb} it ({os.strerror(code)}). "
                "Give this user the right to, or set output_dir to a directory that is writable.",
            )
        if code in _NO_DIRECTORY:
            return UserError(
                "output-dir-unusable",
                f"{path} cannot be made: a part of this path is a file, not a directory. Set output_dir to another.",
            )
        seen = seen.__cause__ or seen.__context__
    return None


def no_space(path: Path, found: str) -> UserError:
    """`found`: what the disk said, or how much is needed and free."""
    return UserError(
        "no-space-left",
        f"{path}: no space left on its disk ({found}). Free some, or set save_total_limit to keep fewer checkpoints, "
        "or set output_dir to a larger disk.",
    )


def size_text(count: int) -> str:
    """Bytes for a reader: "3.2 MB"."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
