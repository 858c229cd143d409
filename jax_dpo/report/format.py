"""Numbers and texts as a person reads them: one spelling in the terminal, the report and the model card."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any

NONE = "–"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, decimals: int = 4) -> str:
    """A metric: fixed decimals in the usual range, thousands with commas, tiny values as powers of ten."""
    x = finite(value)
    if x is None:
        return NONE
    if x == 0:
        return f"{0:.{decimals}f}"
    if abs(x) >= 1000:
        return power(x) if abs(x) >= 1e7 else f"{x:,.0f}"
    if abs(x) >= 100:
        return f"{x:.1f}"
    if abs(x) < 0.5 * 10**-decimals:
        return power(x)
    return f"{x:.{decimals}f}"


def signed(value: Any, decimals: int = 4) -> str:
    """As `number`, with the sign always written."""
    text = number(value, decimals)
    x = finite(value)
    return f"+{text}" if x is not None and x > 0 else text


def power(value: Any) -> str:
    """Three significant digits in the shortest form, `5e-6` rather than `5e-06`; for learning rates."""
    x = finite(value)
    if x is None:
        return NONE
    return re.sub(r"e([+-])0*(\d)", lambda m: "e" + ("-" if m[1] == "-" else "") + m[2], f"{x:.3g}")


def percent(value: Any) -> str:
    """A share between 0 and 1 as percent with one decimal."""
    x = finite(value)
    return NONE if x is None else f"{100 * x:.1f} %"


def whole(value: Any) -> str:
    """A count with commas."""
    x = finite(value)
    return NONE if x is None else f"{x:,.0f}"


def amount(value: Any) -> str:
    """A large count in words of its size: `134.5 M`, `7.24 B`."""
    x = finite(value)
    if x is None:
        return NONE
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(x) >= size:
            scaled = x / size
            return f"{scaled:.2f} {name}" if scaled < 10 else f"{scaled:.1f} {name}"
    return f"{x:.0f}"


def duration(seconds: Any) -> str:
    """A span of time in its two largest units."""
    x = finite(seconds)
    if x is None or x < 0:
        return NONE
    if x < 10:
        return f"{x:.1f} s"
    total = round(x)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 48 * 3600:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def about(seconds: Any) -> str:
    """An expected span of time, rounded so that it does not promise more than it knows."""
    x = finite(seconds)
    if x is None or x < 0:
        return NONE
    if x < 90:
        return f"about {max(1, round(x))} s" if x < 20 else f"about {round(x / 5) * 5} s"
    if x < 90 * 60:
        return f"about {round(x / 60)} min"
    if x < 36 * 3600:
        return f"about {x / 3600:.1f} h"
    return f"about {x / 86400:.1f} days"


def clock(seconds: Any) -> str:
    """Time left, as `4:12` or `1:04:12`."""
    x = finite(seconds)
    if x is None or x < 0:
        return NONE
    total = round(x)
    hours, minutes = divmod(total // 60, 60)
    return f"{hours}:{minutes:02d}:{total % 60:02d}" if hours else f"{minutes}:{total % 60:02d}"


def moment(unix_seconds: Any) -> str:
    """A point in time, UTC, so that a report reads the same wherever it is opened."""
    x = finite(unix_seconds)
    if x is None:
        return NONE
    return datetime.fromtimestamp(x, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")


def plain(text: Any) -> str:
    """Text without control characters: what a model says must not steer a terminal or turn a page around."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text).replace("\r\n", "\n").replace("\r", "\n"))


def option(value: Any) -> str:
    """The value of an option as it would be written in a configuration file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return power(value) if value and (abs(value) < 1e-3 or abs(value) >= 1e6) else f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(option(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {option(v)}" for k, v in value.items()) + "}"
    return plain(value)


def share(part: Any, whole_: Any) -> str:
    """A part of a whole as percent; None where there is no whole."""
    a, b = finite(part), finite(whole_)
    return NONE if a is None or not b else f"{100 * a / b:.2g} %" if a < b else "100 %"
