"""What every test needs before JAX is imported: CPU only, eight virtual devices, no network, one compile cache; and what those share
that run the trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_COMPILE_CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"
_DEVICES = "--xla_force_host_platform_device_count"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
# Processes that a test starts inherit the cache, so that no program is compiled twice in a session.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_COMPILE_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of the eight virtual devices the first alone (with all of them a step would take eight times the pairs), and caches of their own."""
    import jax

    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(jax, "devices", lambda *_: first)
        patch.setattr(jax, "device_count", lambda *_: 1)
        yield


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Programs are compiled without LLVM's optimizations, here and in processes that a test starts: a quarter less time for a whole run.

    What the optimized ones compute is held by the tests of ops, models, losses, steps and meshes, and by .ci/run's demo and comparisons.
    """
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
