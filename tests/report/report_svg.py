"""A reader of the charts, independent of what draws them."""

from __future__ import annotations

import re
from html.parser import HTMLParser

# The view box that report.css and report.js reckon with.
WIDTH, HEIGHT = 360.0, 204.0


class Svg(HTMLParser):
    """The elements of the chart itself (not of the legend), with their attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[dict[str, str], str]] = []
        self._inside = False
        self._open: dict[str, str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = dict(attrs)
        if tag == "svg":
            self._inside = "data-chart" in attributes
        if self._inside:
            self.elements.append((tag, attributes))
            self._open = attributes if tag == "text" else None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.texts.append((self._open, data))
            self._open = None

    def of(self, tag: str, cls: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and cls in (a.get("class") or "").split()]


def assert_inside(svg: Svg) -> None:
    """No coordinate lies outside the view box, and none is missing or not a number."""
    box = next(a for t, a in svg.elements if t == "svg")["viewbox"]
    assert box == f"0 0 {WIDTH:g} {HEIGHT:g}"
    for tag, a in svg.elements:
        for name in ("x", "x1", "x2", "cx"):
            assert name not in a or 0 <= float(a[name]) <= WIDTH, (tag, a)
        for name in ("y", "y1", "y2", "cy"):
            assert name not in a or 0 <= float(a[name]) <= HEIGHT, (tag, a)
        for x, y in re.findall(r"[ML]([^ ]+) ([^ ]+)", a.get("d", "")):
            assert 0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT
    for attributes, label in svg.texts:
        width = 6.2 * len(label)
        start = {"end": 1.0, "middle": 0.5}.get(attributes.get("text-anchor", ""), 0.0)
        left = float(attributes["x"]) - start * width
        assert left >= -1 and left + width <= WIDTH + 1, label
