"""SIGTERM and SIGINT: the first asks the run to save and end, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from jax_dpo.errors import STOPPED
from jax_dpo.sharding.multihost import say_nothing

_ASKED = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Listens while it is open; outside the main thread, where signals cannot be taken, it hears nothing.

    Opened after `jax.distributed.initialize`, which takes SIGTERM for itself.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._votes: Any = None
        self._count: Any = None
        self._place: Any = None

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
            say_nothing()
            os._exit(STOPPED)
        self.signal = number

    def asked(self) -> bool:
        """Whether this process, or with several processes any of them, was asked to stop; all get the same answer.

        Asked once a step. With several processes the answer is that of the step before: its vote is counted on the devices behind
        the step itself, and nobody waits for it.
        """
        import jax

        if jax.process_count() == 1:
            return self.signal is not None
        before, self._votes = self._votes, self._vote()
        return before is not None and int(before) > 0

    def _vote(self) -> Any:
        """Starts to count, over all devices, those whose process was asked to stop."""
        import jax
        import numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec

        if self._count is None:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,), devices=jax.devices())
            self._place = NamedSharding(mesh, PartitionSpec("all"))
            self._count = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        mine = np.full((1,), self.signal is not None, np.int32)
        return self._count(jax.make_array_from_callback((jax.device_count(),), self._place, lambda _: mine))

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal is not None else "a signal on another host"
