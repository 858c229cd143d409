"""Where things are kept between runs, unless an option says otherwise."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """JAX_DPO_CACHE, else jax_dpo in XDG_CACHE_HOME, else ~/.cache/jax_dpo."""
    own = os.environ.get("JAX_DPO_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "jax_dpo"


def compile_cache(directory: str | None = None) -> Path:
    """Directory of compiled programs: the option's, else JAX_COMPILATION_CACHE_DIR, else inside the cache root."""
    chosen = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else cache_root() / "compiled"


def reference_cache(directory: str | None = None) -> Path:
    """Directory of precomputed log-probabilities: inside the directory of the tokens that is told, else inside the cache root."""
    return (Path(directory).expanduser() if directory else cache_root()) / "reference"


def reward_cache(directory: str | None = None) -> Path:
    """Directory of what reward models gave: beside the precomputed log-probabilities."""
    return reference_cache(directory).with_name("rewards")


def token_cache(directory: str | None = None) -> Path:
    """Directory of tokenized data: the option's, else where data/cache.py puts them."""
    from jax_dpo.data.cache import default_cache_dir

    return Path(directory).expanduser() if directory else default_cache_dir()
