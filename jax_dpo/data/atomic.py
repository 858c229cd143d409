"""Files that are whole or absent."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in place of `path`, which appears, or changes, only when the block ends well.

    What is written lies beside it under a name that ends in `PART` until then. Raises `OSError` as `open` does.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}{PART}")
    try:
        with open(part, "xb") as file:
            yield file
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
