"""A port for a test to tell its processes, which no other test is given at the same time."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A free port of this machine, held until the end of the block.

    Let go of at once, it could be given to another test as well before the first one's coordinator listens there (that takes seconds), and
    then one run's processes join the other's. JAX's coordinator listens with SO_REUSEPORT, so it can beside this socket, which does not
    listen; a port that is asked for without a number is never one that is held so.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("localhost", 0))
        yield held.getsockname()[1]
