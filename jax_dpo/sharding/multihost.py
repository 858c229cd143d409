"""Several processes as one run: who starts them, how they find each other, and what happens when one is lost."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jax_dpo.errors import USER_INPUT, UserError, named

# A process that is gone is noticed after this long; JAX then aborts the others.
HEARTBEAT_SECONDS = 10
JOIN_SECONDS = 120
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def cluster_found() -> str | None:
    """What says that this process is one of several: a name for messages, or None."""
    if os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return "several TPU slices"
    if len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        return "a TPU slice of several hosts"
    if int(os.environ.get("SLURM_NTASKS", "1") or 1) > 1 and os.environ.get("SLURM_PROCID"):
        return "SLURM"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1") or 1) > 1:
        return "Open MPI"
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("JAX_COORDINATOR_PORT"):
        return "the cluster that JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT tells of"
    # A Cloud TPU host sets nothing: JAX asks the machine's metadata, for a slice of one host too.
    if find_spec("libtpu") is not None and any(Path(device).exists() for device in TPU_DEVICES):
        return "Cloud TPU"
    return None


def _from_environment() -> tuple[str, int, int] | None:
    """JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID where all three are set; JAX itself reads the first alone."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, processes, process_id = (os.environ.get(name, "") for name in names)
    if not address or not processes or not process_id:
        return None
    if not processes.isdigit() or not process_id.isdigit():
        raise UserError(
            "cluster-options",
            f"JAX_NUM_PROCESSES is {processes!r} and JAX_PROCESS_ID {process_id!r}: both must be whole numbers, the first the same "
            "for every process, the second its own, from 0 on.",
        )
    return address, int(processes), int(process_id)


def join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the run's other processes, once; does nothing where there is only this one.

    Where no argument is given, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID stand for them.

    Raises:
      UserError: options that are given only in part; the port is another run's. Where not all processes come in JOIN_SECONDS the process
        ends, saying so.
    """
    import jax

    told = (coordinator, processes, process_id)
    if all(x is None for x in told) and (found := _from_environment()) is not None:
        coordinator, processes, process_id = told = found
    cluster = cluster_found()
    if all(x is None for x in told) and cluster is None:
        return
    if any(x is not None for x in told) and any(x is None for x in told):
        raise UserError(
            "cluster-options",
            f"coordinator_address {coordinator}, num_processes {processes}, process_id {process_id}: give all three, "
            "the same address and number to every process and each its own process_id, or none where the cluster is recognised.",
        )
    if jax.distributed.is_initialized():
        return
    # JAX shares its port with whoever asks for it (SO_REUSEPORT): the processes of two runs would join each other's and end both.
    if process_id == 0 and coordinator is not None and _answers(coordinator):
        raise UserError(
            "coordinator-port-in-use",
            f"coordinator_address {coordinator}: something listens there already, mostly another run on this machine, whose processes "
            "would be mixed up with this one's. Give this run another port, the same to all of its processes.",
        )
    # JAX ends a process whose peers do not come with an abort and a stack trace, so this clock runs out first.
    clock = threading.Timer(
        JOIN_SECONDS, _give_up, (coordinator or f"the coordinator of {cluster}", processes, process_id)
    )
    clock.daemon = True
    clock.start()
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process_id,
            initialization_timeout=JOIN_SECONDS + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=30,
        )
    except Exception as e:
        raise UserError(
            "cluster-not-joined",
            f"The processes of this run cannot be joined at {coordinator or f'the coordinator of {cluster}'}: {e} Give "
            "every process --coordinator_address, --num_processes and its own --process_id (or JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID).",
        ) from e
    finally:
        clock.cancel()
    if jax.process_count() > 1:
        _leave_a_word(jax.process_index(), jax.process_count())


def _recognised() -> tuple[str | None, int | None, int | None]:
    """What JAX has found out by itself (address, processes, this one's id), where it says so."""
    try:
        from jax._src.distributed import global_state as state

        return state.coordinator_address, state.num_processes or None, state.process_id
    except (ImportError, AttributeError):  # no public name tells it before all have joined
        return None, None, None


def _give_up(where: str, processes: int | None, process_id: int | None) -> None:
    """Says who is missing and ends the process, which is waiting inside JAX and could not be told."""
    if processes is None:
        address, processes, process_id = _recognised()
        where = address or where
    joined = _connections(where) if process_id == 0 else None
    if process_id not in (0, None) and not _answers(where):
        found = "nobody answers there, so process 0 is not running, or a firewall closes the port"
    elif joined is not None and processes is not None:
        found = f"{joined} of {processes} joined"
    else:
        found = "not all joined"
    print(
        named(
            "cluster-not-joined",
            f"error: process {process_id if process_id is not None else '?'} of {processes or 'the run'} waited {JOIN_SECONDS} s at "
            f"{where}: {found}. Start the command on all hosts, each with its own process_id, and open the port between them.",
        ),
        file=sys.stderr,
        flush=True,
    )
    os._exit(USER_INPUT)


def _answers(where: str) -> bool:
    """Whether somebody listens at `host:port`."""
    host, _, port = where.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def _connections(where: str) -> int | None:
    """How many connections this machine's port of `host:port` has: one for each process that came. None where Linux does not say."""
    port, established = where.rpartition(":")[2], "01"
    if not port.isdigit():
        return None
    lines: list[str] = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines += Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
    fields = [line.split() for line in lines]
    return sum(f[1].endswith(f":{int(port):04X}") and f[3] == established for f in fields) or None


_GO_ON = (
    "Checkpoints are whole: start the same command on all hosts again, with --resume_from_checkpoint auto, and the run goes on from "
    "the last one."
)
# What the transports of JAX's collectives say of a peer that is gone.
_PEER_LOST = re.compile(
    r"Gloo .* failed|Connection (reset|closed)|Socket closed|heartbeat|NCCL.*(remote|connection)", re.I | re.S
)


def lost_peer(error: BaseException) -> str | None:
    """The message for an error of a collective whose peer is gone; None for any other error, and in a run of one process."""
    import jax

    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return None
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError") or not _PEER_LOST.search(str(error)):
        return None
    return named(
        "process-lost",
        f"error: process {jax.process_index()} of {jax.process_count()} ends in the middle of the run because another process is lost "
        f"({str(error).splitlines()[0][:160]}). {_GO_ON}",
    )


_shell: subprocess.Popen[bytes] | None = None


def _leave_a_word(process_id: int, processes: int) -> None:
    """Starts a shell that explains the end of this process if it ends without a word of its own.

    JAX aborts a process whose peer is lost: nothing in Python runs then, and what it prints is a stack trace. The shell waits for a
    line; where its pipe closes without one, it speaks.
    """
    global _shell
    shell = shutil.which("sh")
    if shell is None:
        return
    text = named(
        "process-lost",
        f"error: process {process_id} of {processes} has ended in the middle of the run: it was killed, or JAX ended it because "
        f"another process is lost (not heard of for {HEARTBEAT_SECONDS} s; the lines above name it as a task). {_GO_ON}",
    )
    script = 'read -r line || printf "%s\\n" "$0" >&2'
    _shell = subprocess.Popen([shell, "-c", script, text], stdin=subprocess.PIPE, start_new_session=True)
    atexit.register(say_nothing)


def say_nothing() -> None:
    """This process ends by itself and has said why: the shell of `_leave_a_word` need not."""
    global _shell
    shell, _shell = _shell, None
    if shell is not None and shell.stdin is not None:
        try:
            shell.stdin.write(b"\n")
            shell.stdin.close()
        except OSError:
            return
        shell.wait(timeout=5)


def abandon(code: int) -> None:
    """After an error: ends the process at once where it is one of several, which know nothing of the error and would not answer.

    They are told by JAX, which misses this one. Does nothing in a run of one process.
    """
    import jax

    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    say_nothing()
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(2)  # the others lose their coordinator with it: whoever has found the same error may say so first
    os._exit(code)


def leave() -> None:
    """Ends the connection to the other processes, if there is one."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    say_nothing()


def is_primary() -> bool:
    """Whether this process writes reports and models."""
    import jax

    return jax.process_index() == 0


def from_primary(number: int) -> int:
    """The primary's number, on every process; all of them call it."""
    import jax

    if jax.process_count() == 1:
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def array_from_primary(x: Any) -> Any:
    """The primary's numpy array, on every process; all of them call it with the same shape and dtype."""
    import jax

    if jax.process_count() == 1:
        return x
    import numpy as np
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(x))


def wait_for_all(what: str) -> None:
    """All processes meet here before any goes on."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
