"""The only file that speaks to Orbax: items `state` (arrays by name) and `meta` (JSON) of one directory.

What Orbax does not do is done by its callers: it casts another dtype, restores a flipped bit and loses a save at the end
of the interpreter, all without an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COMMIT_SECONDS = 3600  # Orbax gives up after 20 minutes; a 7B state on a slow disk takes longer


def open_checkpointer() -> Any:
    """An `AsyncCheckpointer`. It has threads until its `close`."""
    import orbax.checkpoint as ocp

    _silence()
    handler = ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler())
    return ocp.AsyncCheckpointer(handler, timeout_secs=_COMMIT_SECONDS)


def start_write(checkpointer: Any, directory: Path, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Start to write; returns once the arrays are copied. `checkpointer.wait_until_finished()` has the errors."""
    import orbax.checkpoint as ocp

    stored = {name: array for name, array in arrays.items() if array.size}  # Orbax refuses arrays without elements
    checkpointer.save(
        directory.absolute(),
        args=ocp.args.Composite(state=ocp.args.StandardSave(stored), meta=ocp.args.JsonSave(meta)),
    )


def read(checkpointer: Any, directory: Path, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, meta). `wanted` has shape, dtype and sharding of each array; without a sharding: the first device."""
    import jax
    import orbax.checkpoint as ocp

    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shaped = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first)
        for name, leaf in wanted.items()
    }
    stored = {name: leaf for name, leaf in shaped.items() if leaf.size}
    found = checkpointer.restore(
        directory.absolute(),
        args=ocp.args.Composite(state=ocp.args.StandardRestore(stored), meta=ocp.args.JsonRestore()),
    )
    arrays = dict(found["state"])
    for name, leaf in shaped.items():
        if not leaf.size:
            arrays[name] = jax.numpy.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    return arrays, found["meta"]


def read_meta(checkpointer: Any, directory: Path) -> dict[str, Any]:
    """The JSON item alone."""
    import orbax.checkpoint as ocp

    return checkpointer.restore(directory.absolute(), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _silence() -> None:
    """Keep Orbax's log lines off the terminal: it prints a traceback for an error that is raised anyway."""
    logger = logging.getLogger("absl")
    if not any(isinstance(known, _NotOrbax) for known in logger.filters):
        logger.addFilter(_NotOrbax())


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname
