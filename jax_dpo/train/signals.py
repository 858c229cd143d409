"""SIGTERM and SIGINT: the first asks the run to save and end, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from jax_dpo.errors import STOPPED

_ASKED = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Listens while it is open; outside the main thread, where signals cannot be taken, it hears nothing.

    Opened after `jax.distributed.initialize`, which takes SIGTERM for itself.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._hear) for s in _ASKED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is not None:
            os._exit(STOPPED)
        self.signal = number

    def asked(self) -> bool:
        """Whether this process, or with several processes any of them, was asked to stop; all get the same answer."""
        import jax

        if jax.process_count() == 1:
            return self.signal is not None
        import numpy as np
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(self.signal is not None)).any())

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal is not None else "a signal on another host"
