"""JAX as a run needs it: several processes joined, compiled programs kept for the next run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jax_dpo.config import DPOConfig
from jax_dpo.config.places import cache_root, compile_cache
from jax_dpo.errors import named
from jax_dpo.sharding.multihost import join


def prepare_jax(config: DPOConfig) -> list[str]:
    """Joins the other processes of the run, if there are any, and turns the compile cache on. Returns what the user should know.

    Must come before anything asks for a device.
    """
    import jax

    join(config.coordinator_address, config.num_processes, config.process_id)
    asked = compile_cache(config.compile_cache_dir)
    places = dict.fromkeys((asked, cache_root() / "compiled"))
    problems = {place: _unusable(place) for place in places}
    directory = next((place for place in places if not problems[place]), None)
    said = []
    if problems[asked]:
        instead = "not kept for the next run" if directory is None else f"kept in {directory} instead"
        text = f"the compile cache {asked} {problems[asked]}: compiled programs are {instead}"
        said.append(named("compile-cache-unusable", text))
    if directory is None:
        # JAX took the directory from its own variable, and would try it at every program.
        jax.config.update("jax_compilation_cache_dir", None)
        return said
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    if jax.config.values["jax_compilation_cache_max_size"] != -1 and (orphans := _adopt(directory)):
        text = (
            f"{orphans} entries of the compile cache {directory} had lost their time of use, which keeps JAX from writing to a cache "
            "of limited size: they count as the oldest now"
        )
        said.append(named("compile-cache-mended", text))
    return said


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


def _adopt(directory: Path) -> int:
    """Gives each entry that lacks it a file with its time of use, the earliest there is; returns how many lacked it.

    With a limit on its size JAX reads that file of every entry before it writes, and gives up where one is missing (jax-ml/jax#39880).
    """
    lacking = [
        p for p in directory.glob("*-cache") if not p.with_name(p.name.removesuffix("-cache") + "-atime").exists()
    ]
    for path in lacking:
        path.with_name(path.name.removesuffix("-cache") + "-atime").write_bytes(bytes(8))
    return len(lacking)
