"""Snapshots of models on the Hugging Face Hub, and short words where the Hub cannot be had."""

from __future__ import annotations

import os
import re
from pathlib import Path

from jax_dpo.errors import UserError

# What is fetched: weights in safetensors, config, tokenizer. Never pickles, and no second copy of the weights under the
# names of the model's makers.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_UNWANTED = ["consolidated*", "original/*", "onnx/*"]


def name_of(path: Path) -> str:
    """What others know a model by: the Hub's name for a snapshot in its cache, which is on this machine alone, else the path."""
    inside = re.search(r"(?:^|/)models--([^/]+)/snapshots/[^/]+$", path.as_posix())
    return inside[1].replace("--", "/", 1) if inside else str(path)


def snapshot(name: str, revision: str | None) -> Path:
    """The local snapshot of a repository: from the cache where it is complete and the network is missing, else fetched.

    Raises UserError: hub-unreachable, hub-not-found, hub-gated.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, etag_timeout=5
            )
        )
    except GatedRepoError:
        raise UserError(
            "hub-gated",
            f"The Hub gives out {at} only to those who accepted its terms: accept them there, then log in with `hf auth login`.",
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UserError(
            "hub-not-found",
            f"{at} is neither a local path nor a repository on the Hugging Face Hub (or it is private: log in with `hf auth login`).",
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = (
            "HF_HUB_OFFLINE is set"
            if offline
            else f"there is no network to the Hub ({type(error.__cause__ or error).__name__})"
        )
        raise UserError(
            "hub-unreachable",
            f"{at} is no local path, {why}, and it is not in the local cache. Give a local directory, or fetch it first on a "
            f"machine with a network: hf download {name}",
        ) from None
