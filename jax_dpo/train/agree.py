"""What one process has found, told to all of them, so that none waits for another that has given up."""

from __future__ import annotations

from jax_dpo.errors import UserError

_TEXT_BYTES = 2048


def first_text(text: str) -> str:
    """The first text of all processes that is not empty, cut at 2048 bytes. All of them call it."""
    import jax

    if jax.process_count() == 1:
        return text
    import numpy as np
    from jax.experimental import multihost_utils

    mine = np.zeros(_TEXT_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    mine[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, _TEXT_BYTES)
    texts = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows)
    return next(filter(None, texts), "")


def raise_together(error: Exception | None) -> None:
    """Raise on every process the error that any of them has; a `UserError` stays one."""
    name = error.name if isinstance(error, UserError) else ""
    message = error.message if isinstance(error, UserError) else str(error)
    text = first_text(f"{name}\n{message}" if error else "")
    if error is not None:
        raise error
    if text:
        name, _, message = text.partition("\n")
        raise UserError(name, message) if name else RuntimeError(message)
