"""HTML in which text cannot become markup: every string is escaped unless an element made it."""

from __future__ import annotations

from html import escape

from jax_dpo.report.format import plain

_VOID = frozenset({"br", "hr", "link", "meta"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def el(tag: str, *children: str | None, **attributes: str | int | float | bool | None) -> Markup:
    """An element. Strings among the children are escaped, `Markup` is taken as it is, None is left out.

    Attribute names: `cls` is `class`, an underscore is a hyphen. None and False leave an attribute out, True gives it
    without a value.
    """
    text = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _VOID:
        return Markup(f"<{tag}{text}>")
    return Markup(f"<{tag}{text}>{join(*children)}</{tag}>")


def join(*children: str | None) -> Markup:
    """The children one after the other, escaped as in `el`."""
    return Markup("".join(c if isinstance(c, Markup) else escape(plain(c)) for c in children if c is not None))


def _attribute(name: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = "class" if name == "cls" else name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    if isinstance(value, float):
        value = f"{value:.1f}".removesuffix(".0")
    return f' {name}="{escape(plain(value), quote=True)}"'
