"""Starts processes of `jax-dpo train` that are one run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tiny
from ports import held_port

COMMAND = "import sys; from jax_dpo.cli import main; sys.exit(main())"


class Ended(NamedTuple):
    """What a process came to."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Cluster:
    """The folder of all its files, and the options of every run."""

    folder: Path
    options: Mapping[str, Any]

    def start(
        self, out: Path, *, processes: int = 2, only: int | None = None, before: str = "", **changes: Any
    ) -> Running:
        """Starts the processes of a run (or one of them); `before` is run in each ahead of the command."""
        held = ExitStack()
        port = held.enter_context(held_port())
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}",
            "JAX_DPO_CACHE": str(self.folder / "cache"),
        }
        started = []
        for i in range(processes) if only is None else [only]:
            place = {"coordinator_address": f"localhost:{port}", "num_processes": processes, "process_id": i}
            flags = tiny.flags({**self.options, **changes, "output_dir": out, **(place if processes > 1 else {})})
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", f"{before}\n{COMMAND}", "train", *flags],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                    cwd=self.folder,
                )
            )
        return Running(started, held)

    def run(self, out: Path, **how: Any) -> list[Ended]:
        return self.start(out, **how).wait()


class Running(NamedTuple):
    """Processes that were started, and what keeps their port theirs until they have ended."""

    processes: list[subprocess.Popen[str]]
    held: ExitStack

    def wait(self, seconds: float = 200) -> list[Ended]:
        """Waits for all of them; whoever has not ended by then is killed, and the test fails."""
        until = time.monotonic() + seconds
        try:
            return [self._ended(p, max(1.0, until - time.monotonic())) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()
            self.held.close()

    @staticmethod
    def _ended(process: subprocess.Popen[str], seconds: float) -> Ended:
        out, err = process.communicate(timeout=seconds)
        return Ended(process.returncode, out, err)

    def wait_for_step(self, out: Path, step: int, seconds: float = 200) -> None:
        """Waits until the log of the run has a record of this step."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (out / "run.jsonl").exists() and any(r["step"] >= step for r in tiny.records(out, "train")):
                return
            assert all(p.poll() is None for p in self.processes), "a process ended before that step"
            time.sleep(0.05)
        raise AssertionError(f"no record of step {step} within {seconds} s")
