"""A page of ours as a file: one HTML document that loads nothing and lets only its own style and script in."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib import resources
from pathlib import Path

from jax_dpo.errors import UserError
from jax_dpo.report.markup import Markup, el


def document(title: str, body: Markup, made: str) -> str:
    """The whole page as text: `body` is its main element, `made` the sentence at its foot."""
    script = Markup(_asset("report.js"))
    page = el("html", _head(title), el("body", body, el("footer", el("p", made)), el("script", script)), lang="en")
    return "<!DOCTYPE html>\n" + page + "\n"


def write_page(target: Path, text: str, again: str) -> Path:
    """Writes a page in one piece, so that a browser never sees half of it, and returns its path.

    Raises `UserError` where it cannot be written; `again` is the command that makes it.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            "report-not-writable",
            f"{target}: the report cannot be written ({error.strerror}). Free some space or make the directory "
            f"writable, then make it again with `{again}`.",
        ) from error
    return target


def _head(title: str) -> Markup:
    style, script = _asset("report.css"), _asset("report.js")
    # Nothing is loaded from anywhere, and only this style and this script are let in.
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'; img-src data:"
    )
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("link", rel="icon", href="data:,"),
        el("title", title),
        el("style", Markup(style)),
    )


def _asset(name: str) -> str:
    return resources.files("jax_dpo.report").joinpath(name).read_text(encoding="utf-8").strip()


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
