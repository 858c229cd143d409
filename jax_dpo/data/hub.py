"""Data sets by name from the Hugging Face Hub, through `datasets`; a clear answer within seconds without a network."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from jax_dpo.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")
_PROBE_SECONDS = 5.0


def is_hub_name(text: str) -> bool:
    """Whether a text can be the name of a data set on the Hub: `name` or `owner/name`."""
    return bool(_NAME.fullmatch(text))


def load_from_hub(name: str, config: str | None, *, streaming: bool = False) -> Any:
    """All splits of a data set on the Hub, as `datasets` gives them (a `DatasetDict`).

    With `streaming` they are read row by row, when they are asked for.
    Without a connection the copy that `datasets` keeps is used, where there is one.
    Raises `UserError`: no connection and no copy; no such data set, configuration or access.
    """
    connected = _connected()
    import datasets

    try:
        with contextlib.nullcontext() if connected else _offline():
            return datasets.load_dataset(name, config, **({"streaming": True} if streaming else {}))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            "hub-data-missing",
            f"{name}: no such file or directory here, and the Hub answers: {error} "
            "Check the name; for a private or gated set run `hf auth login` first.",
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise UserError("hub-unreachable", _unreachable(name)) from error
    except OSError as error:
        if connected:
            raise UserError("hub-data-unusable", f"{name} could not be fetched from the Hub: {error}.") from error
        raise UserError("hub-unreachable", _unreachable(name)) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # `datasets` names the configurations to choose from, or what it cannot read.
        name_of_error = "hub-data-unusable" if connected else "hub-unreachable"
        message = f"{name} cannot be loaded from the Hub: {error}." if connected else _unreachable(name)
        raise UserError(name_of_error, message) from error


def _unreachable(name: str) -> str:
    return (
        f"{name}: there is no such file or directory here, and the Hugging Face Hub ({_endpoint()}) cannot be reached, so it "
        "cannot be fetched from there. Check the path or the network (and HF_HUB_OFFLINE, https_proxy), or use a local file."
    )


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _connected() -> bool:
    """Whether something listens where the Hub is looked for: its own address, or the proxy that leads to it.

    The client libraries try again for half a minute or more before they give up; this asks once.
    """
    if any(
        os.environ.get(v, "").upper() in ("1", "ON", "YES", "TRUE") for v in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    ):
        return False
    url = urllib.parse.urlsplit(_endpoint())
    host, port = url.hostname or "huggingface.co", url.port or (80 if url.scheme == "http" else 443)
    proxy = urllib.request.getproxies().get(url.scheme or "https")
    if proxy and not urllib.request.proxy_bypass(host):
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"http://{proxy}")
        host, port = parts.hostname or host, parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((host, port), timeout=_PROBE_SECONDS):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Make `datasets` and `huggingface_hub` use their local copies alone for the time of the block."""
    import datasets.config
    import huggingface_hub.constants

    switches = [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    before = [getattr(module, attribute) for module, attribute in switches]
    try:
        for module, attribute in switches:
            setattr(module, attribute, True)
        yield
    finally:
        for (module, attribute), value in zip(switches, before):
            setattr(module, attribute, value)
