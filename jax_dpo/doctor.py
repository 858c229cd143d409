"""`jax-dpo doctor`: what the machine offers (devices, memory, disk, versions, caches, attention), and what is wrong with it.

Every part looks at the machine by itself and returns lines to print and complaints; nothing is written but a file that is removed
again, to see whether a cache takes one.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from jax_dpo.errors import OK, UNEXPECTED, named

GIB = 2**30
MIN_MEMORY_GIB = 4.0

# Parts of the distribution's requirements that are told even where they are fine.
_TOLD = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "datasets", "numpy", "tensorboardX")
_PLUGINS = ("jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin")


@dataclass
class Findings:
    """Lines to print, and sentences on what is wrong (each says what to do)."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def tell(self, name: str, text: str) -> None:
        self.lines.append(f"  {name:<22} {text}")


def examine(places: Mapping[str, Path], *, min_free_gib: float) -> int:
    """Prints what the machine offers and what is wrong with it; returns 0 where nothing is, else 1.

    `places`: directories by name that must take files (caches). `min_free_gib`: free disk space (GiB) that should be there.
    """
    parts: list[tuple[str, Callable[[], Findings]]] = [
        ("versions", versions),
        ("processor and memory", processor),
        ("devices", devices),
        ("disk", lambda: disk(places, min_free_gib)),
    ]
    problems: list[str] = []
    for title, part in parts:
        found = part()
        print(f"{title}:", *found.lines, "", sep="\n")
        problems += found.problems
    if not problems:
        print("nothing is wrong")
        return OK
    print(f"{len(problems)} thing{'s are' if len(problems) > 1 else ' is'} wrong:")
    for problem in problems:
        print(f"  - {problem}")
    return UNEXPECTED


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 10, 2) of "0.10.2.dev1", for comparing with a lower bound."""
    numbers = []
    for part in text.split("."):
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        numbers.append(int(digits.group()))
        if digits.group() != part:
            break
    return tuple(numbers)


def lower_bounds(requirements: Iterable[str]) -> dict[str, str]:
    """{package: lowest version} of requirements such as "jax>=0.10.2"; extras are left out."""
    bounds = {}
    for requirement in requirements:
        found = re.fullmatch(r"\s*([\w.-]+)\s*>=\s*([\w.]+)\s*", requirement)
        if found:
            bounds[found.group(1)] = found.group(2)
    return bounds


def versions() -> Findings:
    """Python and the packages that a run needs, each against the version that jax_dpo was tried with."""
    found = Findings()
    found.tell("python", f"{platform.python_version()}, {sys.executable}")
    try:
        own = metadata.distribution("jax-dpo")
    except metadata.PackageNotFoundError:
        found.problems.append(
            named(
                "package-missing",
                "jax-dpo is not installed, so versions cannot be compared; install it with `pip install -e .`",
            )
        )
        return found
    found.tell("jax-dpo", own.version)
    for name, bound in lower_bounds(own.requires or []).items():
        there = _version(name)
        if there is None:
            found.tell(name, "not installed")
            found.problems.append(
                named("package-missing", f"{name} is not installed; install it with `pip install '{name}>={bound}'`")
            )
        elif version_tuple(there) < version_tuple(bound):
            found.tell(name, f"{there}, older than {bound}")
            found.problems.append(
                named(
                    "package-old",
                    f"{name} {there} is older than {bound}; update it with `pip install '{name}>={bound}'`",
                )
            )
        elif name in _TOLD:
            found.tell(name, there)
    for name in _PLUGINS:
        there = _version(name)
        if there is not None:
            found.tell(name, there)
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor() -> Findings:
    """Cores and memory that this process may use."""
    found = Findings()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found.tell("processor", f"{platform.machine()}, {cores} core{'s' * (cores > 1)} for this process")
    total = memory_bytes()
    if total is None:
        found.tell("memory", "cannot be told")
        return found
    found.tell("memory", f"{total / GIB:.1f} GiB")
    if total < MIN_MEMORY_GIB * GIB:
        found.problems.append(
            named(
                "memory-small",
                f"{total / GIB:.1f} GiB of memory is little: full training takes about 20 bytes a parameter; use a machine with more",
            )
        )
    return found


def memory_bytes(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Bytes of memory that this process may use: the machine's, or its container's limit where that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        limit = cgroup.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def devices() -> Findings:
    """The devices that JAX finds, and the attention that would run on them."""
    found = Findings()
    wanted = os.environ.get("JAX_PLATFORMS")
    if wanted:
        found.tell("JAX_PLATFORMS", wanted)
    try:
        import jax

        there = jax.devices()
    except Exception as error:
        found.tell("devices", "none")
        found.problems.append(named("no-device", f"JAX finds no device: {_one_line(error)}"))
        return found
    kind = there[0].device_kind
    platform_name = there[0].platform
    found.tell("devices", f"{len(there)} x {kind} ({platform_name})")
    if jax.process_count() > 1:
        found.tell("processes", f"{jax.process_count()}, this is {jax.process_index()}")
    limit = (there[0].memory_stats() or {}).get("bytes_limit") if platform_name != "cpu" else None
    if limit:
        found.tell("device memory", f"{limit / GIB:.1f} GiB each")
    dtype = "float32" if platform_name == "cpu" else "bfloat16"
    found.tell("bf16 unset means", dtype)
    found.tell("attention", _attention(platform_name, dtype))
    found.problems += unused_accelerators(platform_name, wanted)
    return found


def _attention(platform_name: str, dtype: str) -> str:
    from jax_dpo.ops.attention.api import choose

    name, reason = choose(platform_name, dtype)
    return f"{name}: {reason}"


def unused_accelerators(platform_name: str, wanted: str | None, root: Path = Path("/dev")) -> list[str]:
    """What is wrong where the machine has a TPU or GPU, or the software for one, and JAX computes on the CPU."""
    if platform_name != "cpu":
        return []
    why = f"JAX_PLATFORMS={wanted} forbids it" if wanted else ""
    complaints = []
    has_gpu = (root / "nvidia0").exists() or (root / "kfd").exists()
    has_tpu = (root / "accel0").exists() or (root / "vfio" / "0").exists()
    if has_gpu:
        complaints.append(
            named(
                "accelerator-unused",
                f"there is a GPU, but JAX computes on the CPU: {why or 'run `pip install jax-dpo[cuda]`'}",
            )
        )
    if has_tpu and importlib.util.find_spec("libtpu") is None:
        complaints.append(
            named(
                "accelerator-unused",
                f"there is a TPU, but JAX computes on the CPU: {why or 'run `pip install jax-dpo[tpu]`'}",
            )
        )
    elif has_tpu:
        complaints.append(
            named(
                "accelerator-unused",
                "there is a TPU, but JAX computes on the CPU: "
                f"{why or 'another process may hold it (`fuser -v /dev/accel0`)'}",
            )
        )
    elif importlib.util.find_spec("libtpu") is not None and not wanted:
        complaints.append(
            named(
                "libtpu-unused",
                "libtpu is installed on a machine without a TPU, so each start looks for one and complains: set JAX_PLATFORMS=cpu or "
                "`pip uninstall libtpu`",
            )
        )
    return complaints


def disk(places: Mapping[str, Path], min_free_gib: float) -> Findings:
    """Free space here, and each cache: where it is, how large, whether it takes files."""
    found = Findings()
    short: dict[str, str] = {}
    for name, path in {"working directory": Path.cwd(), **places}.items():
        parent = nearest_directory(path)
        if parent is None:
            found.tell(name, str(path))
            found.problems.append(
                named("place-unusable", f"{name} {path}: no part of the path is a directory; name another place")
            )
            continue
        free = shutil.disk_usage(parent).free
        size = f", holds {_size(folder_bytes(path))}" if name in places and path.is_dir() else ""
        state = "" if path.is_dir() else ", not made yet"
        found.tell(name, f"{path}{state}{size}, {_size(free)} free")
        complaint = not_writable(parent)
        if complaint:
            found.problems.append(named("place-unusable", f"{name} {path}: {complaint}"))
        if free < min_free_gib * GIB:
            short[str(os.stat(parent).st_dev)] = named(
                "disk-small", f"{path}: {_size(free)} free, {min_free_gib:g} GiB are wanted; free some space"
            )
    found.problems += short.values()
    return found


def nearest_directory(path: Path) -> Path | None:
    """`path`, or the nearest of its parents that exists; None where that is no directory."""
    for candidate in (path, *path.absolute().parents):
        if candidate.exists():
            return candidate if candidate.is_dir() else None
    return None


def not_writable(folder: Path) -> str | None:
    """Why no file can be written in `folder`, or None."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"nothing can be written there ({error.strerror}); name another place"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a directory; what vanishes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())[:300]
