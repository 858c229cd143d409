"""report.html in a real browser. Oracle: Chromium's own layout, colours and pages; the page asks for nothing else.

Run with `-m browser`; skipped, with the reason, where no Chromium is installed. With REPORT_SCREENSHOTS=DIR the pictures
are kept there, to be looked at.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jax_dpo.report.compare import write_comparison
from jax_dpo.report.html import write_report

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BINARY is None, reason="no Chromium is installed (apt-get install chromium)"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
]

# What the page looks like from inside, written where --dump-dom shows it.
PROBE = """
const root = document.documentElement;
const svg = document.querySelector("#chart-kl svg[data-chart]");
const box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * 0.98, clientY: box.top + 60}));
const tip = document.querySelector("#chart-kl .tip");
const tipBox = tip.getBoundingClientRect();
const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest("svg") && !e.closest("thead")
  && e.getBoundingClientRect().right > root.clientWidth + 0.5).map((e) => e.tagName + "." + e.className);
const facts = {
  width: root.clientWidth, scroll: root.scrollWidth, wide,
  tip: tip.textContent, tipInside: tipBox.left >= 0 && tipBox.right <= root.clientWidth,
  columns: getComputedStyle(document.querySelector(".grid")).gridTemplateColumns.split(" ").length,
  paper: getComputedStyle(document.body).backgroundColor,
  requests: performance.getEntriesByType("resource").map((e) => e.name),
  smallest: Math.min(...[...document.querySelectorAll("#curves text")].map((t) => t.getBoundingClientRect().height)),
};
parent.postMessage(JSON.stringify(facts), "*");
"""


def _runs() -> ModuleType:
    path = Path(__file__).parents[1] / "report" / "report_runs.py"
    spec = importlib.util.spec_from_file_location("report_runs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = _runs()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write(tmp_path_factory.mktemp("run"), runs.in_detail(runs.failing()))
    runs.write_dropped(folder)
    return write_report(folder)


def chromium(folder: Path, page: Path, *flags: str) -> str:
    """Runs the browser once on a page, with a profile of its own."""
    profile = folder / "profile"
    command = [str(BINARY), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def look(folder: Path, report: Path, width: int, *flags: str, probe: str = PROBE) -> dict[str, Any]:
    """What the probe finds on a screen of `width` pixels: a frame, since a window is never narrower than 500.

    The probe is one script more than the page's policy lets in, so the policy is taken out.
    """
    text = report.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    (folder / "probed.html").write_text(text.replace("</body>", f"<script>{probe}</script></body>"), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(
        "<!DOCTYPE html><title>-</title><script>onmessage = (e) => { document.title = 'probe ' + e.data; };</script>"
        f'<iframe src="probed.html" style="border:0;width:{width}px;height:900px"></iframe>',
        encoding="utf-8",
    )
    dom = chromium(folder, frame, "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", *flags)
    found = re.search(r"<title>probe (.*?)</title>", dom, re.DOTALL)
    assert found, dom[:500]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize(("width", "columns"), [(360, 1), (390, 1), (800, 2), (1280, 3)])
def test_nothing_is_wider_than_the_screen(tmp_path: Path, report: Path, width: int, columns: int) -> None:
    seen = look(tmp_path, report, width)
    assert seen["width"] == width
    assert seen["scroll"] == width and seen["wide"] == []
    assert seen["columns"] == columns
    assert seen["smallest"] > 8  # the labels of the curves can still be read


@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1280, 3)])
def test_a_comparison_fits_the_screen(tmp_path: Path, width: int, columns: int) -> None:
    names = ("failing", "healthy", "not_finite")
    folders = [runs.write(tmp_path / name, getattr(runs, name)()) for name in names]
    seen = look(tmp_path, write_comparison(folders, tmp_path / "comparison.html"), width)
    assert seen["scroll"] <= seen["width"] and seen["wide"] == []
    assert seen["columns"] == columns and seen["requests"] == []
    assert all(f"{name} " in seen["tip"] for name in names[:1]) and seen["tipInside"]


def test_the_pointer_shows_values_and_nothing_is_fetched(tmp_path: Path, report: Path) -> None:
    seen = look(tmp_path, report, 1280)
    last = runs.failing()[-4]
    assert last["kind"] == "checkpoint"  # the evaluation of step 600 stands before it
    assert seen["tip"].splitlines()[0] == "step 600"
    assert "held-out 0.1600" in seen["tip"] and seen["tipInside"]
    assert look(tmp_path, report, 360)["tipInside"]
    assert seen["requests"] == []


def test_dark_and_light_follow_the_reader(tmp_path: Path, report: Path) -> None:
    assert look(tmp_path, report, 1280, "--blink-settings=preferredColorScheme=1")["paper"] == "rgb(247, 246, 243)"
    assert look(tmp_path, report, 1280, "--blink-settings=preferredColorScheme=0")["paper"] == "rgb(18, 21, 24)"


def test_the_policy_of_the_page_lets_its_own_style_and_script_work(tmp_path: Path, report: Path) -> None:
    dom = chromium(tmp_path, report, "--dump-dom")
    assert dom.count('class="tip"') == 10  # report.js ran: one for each chart
    evil = tmp_path / "evil.html"
    text = report.read_text(encoding="utf-8")
    evil.write_text(text.replace("</main>", "<script>document.title = 'taken'</script></main>"), encoding="utf-8")
    assert "<title>taken" not in chromium(tmp_path, evil, "--dump-dom")


def _pixels(png: Path) -> tuple[int, int, list[bytes]]:
    """Width, height and unfiltered rows of an 8-bit PNG (filters of the PNG specification, 9.2)."""
    data = png.read_bytes()
    at, packed, width, height, depth = 8, b"", 0, 0, 4
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, _, colour = struct.unpack(">IIBB", body[:10])
            depth = {2: 3, 6: 4}[colour]
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    raw, stride, rows, above = zlib.decompress(packed), width * depth, [], bytes(width * depth)
    for y in range(height):
        start = y * (stride + 1)
        row, kind = bytearray(raw[start + 1 : start + 1 + stride]), raw[start]
        for i in range(stride if kind else 0):
            a, b, c = (row[i - depth] if i >= depth else 0), above[i], (above[i - depth] if i >= depth else 0)
            guess = min((a, b, c), key=lambda v: abs(a + b - c - v)) if kind == 4 else (0, a, b, (a + b) // 2)[kind]
            row[i] = (row[i] + guess) & 255
        rows.append(bytes(row))
        above = bytes(row)
    return width, height, rows


@pytest.mark.parametrize(
    ("name", "width", "height", "scheme"), [("light", 1280, 1900, 1), ("dark", 1280, 1900, 0), ("phone", 390, 3600, 1)]
)
def test_it_is_painted(tmp_path: Path, report: Path, name: str, width: int, height: int, scheme: int) -> None:
    png = tmp_path / f"{name}.png"
    flags = (
        f"--screenshot={png}",
        f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    chromium(tmp_path, report, *flags)
    seen_width, seen_height, rows = _pixels(png)
    assert (seen_width, seen_height) == (width, height)
    depth = len(rows[0]) // width
    colours = {row[i : i + 3] for row in rows for i in range(0, len(row), depth)}
    # The ground, the curve of the held-out pairs and the bound, in the colours of report.css.
    for light, dark in (("f7f6f3", "121518"), ("0b62b0", "6db5fb"), ("b3261e", "ff8f85")):
        assert bytes.fromhex(light if scheme else dark) in colours
    if os.environ.get("REPORT_SCREENSHOTS"):
        shutil.copy(png, os.environ["REPORT_SCREENSHOTS"])


def test_it_prints_with_everything_unfolded(tmp_path: Path, report: Path) -> None:
    pdf = tmp_path / "report.pdf"
    chromium(tmp_path, report, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF-")
    pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert 3 <= pages <= 8
    seen = look(tmp_path, report, 800, probe="""
      dispatchEvent(new Event("beforeprint"));
      parent.postMessage(JSON.stringify([...document.querySelectorAll("details")].map((d) => d.open)), "*");
    """)  # fmt: skip
    assert seen == [True, True]
    if os.environ.get("REPORT_SCREENSHOTS"):
        shutil.copy(pdf, os.environ["REPORT_SCREENSHOTS"])
