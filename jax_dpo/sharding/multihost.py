"""Several processes as one run: who starts them, how they find each other, and what happens when one is lost."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path

from jax_dpo.errors import UserError

# A process that is gone is noticed after this long; the others then end by themselves (JAX aborts them and says why).
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


def join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the run's other processes, once; does nothing where there is only this one.

    Raises:
      UserError: options that are given only in part; not all processes came in time.
    """
    import jax

    told = (coordinator, processes, process_id)
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
    began = time.monotonic()
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process_id,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=30,
        )
    except Exception as e:
        where = coordinator or f"the coordinator of {cluster}"
        raise UserError(
            "cluster-not-joined",
            f"Process {process_id if process_id is not None else '?'} of {processes or 'the run'} waited "
            f"{time.monotonic() - began:.0f} s at {where} and not all came ({type(e).__name__}: {str(e).splitlines()[0]}). "
            "Two usual causes: the command was started on one host only (start it on all of them), or a firewall closes the "
            "coordinator's port (open it between the hosts).",
        ) from e


def leave() -> None:
    """Ends the connection to the other processes, if there is one."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def is_primary() -> bool:
    """Whether this process writes reports and models."""
    import jax

    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """All processes meet here before any goes on."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
