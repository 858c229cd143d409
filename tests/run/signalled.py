"""A process of `jax-dpo` on the first virtual device, which sends itself signals: signalled.py STEP NAME[,NAME ...] ARGV...

They come right after the log line of step STEP; what was being saved by then has been saved.
"""

from __future__ import annotations

import os
import signal
import sys

import jax

from jax_dpo.cli import main
from jax_dpo.train.loop import Loop

step, names, argv = int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
first = jax.devices()[:1]
jax.devices, jax.device_count = lambda *_: first, lambda *_: 1
log = Loop._log


def log_and_signal(self: Loop) -> None:
    log(self)
    if self.progress.step == step:
        self.parts.checkpoints.wait()
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))


Loop._log = log_and_signal  # type: ignore[method-assign]
sys.exit(main(argv))
