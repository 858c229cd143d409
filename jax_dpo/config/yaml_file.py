"""A YAML file of options: read, or refused with the place of the fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_dpo.errors import UserError


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file, keys with underscores.

    Raises `UserError` for a file that is missing or unreadable, YAML that is broken, a key that stands twice, and for anything
    that is not one flat mapping.
    """
    import yaml

    text = _text(Path(path))
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError("config-broken", f"{path}: {_place(error)}") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or node is None:
        raise UserError("config-broken", f"{path}: found {_kind(found)}, expected lines of `option: value`")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if name in lines:
            raise UserError(
                "config-broken", f"{path}: {name} stands twice, in lines {lines[name]} and {line}; remove one"
            )
        lines[name] = line
    return {str(key).replace("-", "_"): value for key, value in found.items()}


def _text(path: Path) -> str:
    if path.is_dir():
        raise UserError("config-missing", f"{path} is a directory; expected a YAML file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = sorted(item.name for item in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f"; in {path.parent} there are {', '.join(beside[:5])}" if beside else ""
        raise UserError("config-missing", f"{path}: there is no such file{there}") from None
    except UnicodeDecodeError:
        raise UserError("config-broken", f"{path}: is not UTF-8 text; expected a YAML file") from None
    except OSError as error:
        raise UserError("config-missing", f"{path}: cannot be read ({error.strerror})") from None


def _place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{problem}; expected lines of `option: value`"


def _kind(found: Any) -> str:
    return "a list" if isinstance(found, list) else f"the text {str(found)[:40]!r}"
