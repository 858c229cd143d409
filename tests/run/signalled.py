"""A process of `jax-dpo` on the first virtual device, which sends itself signals: signalled.py STEP[:TIME] NAME[,NAME ...] ARGV...

They come right after the log line of step STEP, when it is written for the TIMEth time (a rollback repeats steps); what was being saved
by then has been saved.
"""

from __future__ import annotations

import os
import signal
import sys

import jax

from jax_dpo.cli import main
from jax_dpo.train.loop import Loop

step, _, time = sys.argv[1].partition(":")
names, argv = sys.argv[2].split(","), sys.argv[3:]
logged: list[int] = []
first = jax.devices()[:1]
jax.devices, jax.device_count = lambda *_: first, lambda *_: 1
log = Loop._log


def log_and_signal(self: Loop) -> None:
    log(self)
    logged.append(self.progress.step)
    if self.progress.step == int(step) and logged.count(int(step)) == int(time or 1):
        self.parts.checkpoints.wait()
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))


Loop._log = log_and_signal  # type: ignore[method-assign]
sys.exit(main(argv))
