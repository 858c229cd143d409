"""JAX as a run needs it: several processes joined, compiled programs kept for the next run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jax_dpo.config import DPOConfig
from jax_dpo.config.places import compile_cache
from jax_dpo.errors import named
from jax_dpo.sharding.multihost import join


def prepare_jax(config: DPOConfig) -> list[str]:
    """Joins the other processes of the run, if there are any, and turns the compile cache on. Returns what the user should know.

    Must come before anything asks for a device.
    """
    import jax

    join(config.coordinator_address, config.num_processes, config.process_id)
    directory = compile_cache(config.compile_cache_dir)
    problem = _unusable(directory)
    if problem:
        return [
            named("compile-cache-unusable", f"compiled programs are not kept for the next run: {directory} {problem}")
        ]
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return []


def _unusable(directory: Path) -> str:
    """Why a cache directory cannot be used; empty if it can."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        for entry in os.scandir(directory):
            if entry.is_file() and not os.access(entry.path, os.R_OK):
                return f"holds {entry.name}, which cannot be read"
    except OSError as e:
        return f"cannot be used ({e.strerror})"
    return ""
