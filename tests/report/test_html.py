"""report.html from run.jsonl. Oracles: the page as html.parser reads it, the numbers of the records, WCAG's contrast formula."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_runs as runs
from report_svg import Svg, assert_inside

from jax_dpo.errors import UserError
from jax_dpo.report.html import write_report

VOID = {"meta", "link", "br", "hr"}
RUNS = {
    "healthy": runs.healthy(),
    "failing": runs.failing(),
    "running": runs.running(),
    "not finite": runs.not_finite(),
    "resumed": runs.resumed(),
    "several sets": runs.several_sets(),
    "in detail": runs.in_detail(runs.healthy()),
    "several sets in detail": runs.in_detail(runs.several_sets()),
    "only the start": [runs.start()],
    "one step": [runs.start(), runs.train(1)],
    "a lone evaluation": [runs.evaluate(7)],
    "nothing": [],
    "thousands": runs.running(9990, 10_000),
}


class Page(HTMLParser):
    """Elements with attributes, the text of each section and table, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self._stack: list[str] = []
        self._where: list[str] = []
        self.feed(text)
        self.close()
        assert self._stack == [], "a tag is left open"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = {k: v or "" for k, v in attrs}
        self.elements.append((tag, attributes))
        if tag in VOID:
            return
        self._stack.append(tag)
        if tag in ("section", "header", "footer") or attributes.get("class") == "tiles":
            self._where.append(attributes.get("id") or attributes.get("class") or tag)
        elif tag == "div" and self._where and self._where[-1] == "tiles":
            self._where.append("tiles")
        if tag == "tr":
            self.rows.setdefault(self._where[-1], []).append([])
        if tag in ("td", "th"):
            self.rows[self._where[-1]][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._stack and self._stack.pop() == tag, f"{tag} is closed out of order"
        if tag in ("section", "header", "footer") or (tag == "div" and self._where and self._where[-1] == "tiles"):
            self._where.pop()

    def handle_data(self, data: str) -> None:
        where = self._where[-1] if self._where else "page"
        self.sections[where] = self.sections.get(where, "") + data
        if "td" in self._stack or "th" in self._stack:
            self.rows[where][-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag]


def make(folder: Path, records: list[dict]) -> Page:
    return Page(write_report(runs.write(folder, records)).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RUNS)
def test_every_run_gives_a_whole_page_that_loads_nothing(tmp_path: Path, name: str) -> None:
    page = make(tmp_path, RUNS[name])
    assert page.source.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.source.replace("// Shows the values", ""))
    for _, attributes in page.elements:
        assert "src" not in attributes and "style" not in attributes
        assert attributes.get("href", "data:,") == "data:,"
        assert not [k for k in attributes if k.startswith("on")]
    (viewport,) = [a for a in page.of("meta") if a.get("name") == "viewport"]
    assert "width=device-width" in viewport["content"]
    assert page.of("html") == [{"lang": "en"}] and len(page.of("h1")) == 1
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert len(page.source) < 400_000


@pytest.mark.parametrize("name", RUNS)
def test_charts_have_names_descriptions_and_coordinates_inside(tmp_path: Path, name: str) -> None:
    page = make(tmp_path, RUNS[name])
    ids = {a["id"] for _, a in page.elements if "id" in a}
    charts = re.findall(r"<figure class=\"chart\".*?</figure>", page.source, re.DOTALL)
    assert len(charts) == len(page.of("figure"))
    assert (len(charts) > 0) == any(r["kind"] in ("train", "eval") for r in RUNS[name])
    for chart in charts:
        svg = Svg(chart)
        assert_inside(svg)
        (top,) = [a for t, a in svg.elements if t == "svg"]
        assert top["role"] == "img" and {top["aria-labelledby"], top["aria-describedby"]} <= ids
        for curve in json.loads(top["data-chart"]):
            assert len(curve["points"]) <= 400
    for table in re.findall(r"<table.*?</table>", page.source, re.DOTALL):
        assert "<caption>" in table and 'scope="col"' in table and 'scope="row"' in table


def test_only_the_pages_own_style_and_script_are_let_in(tmp_path: Path) -> None:
    page = make(tmp_path, RUNS["healthy"])
    (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_a_healthy_run(tmp_path: Path) -> None:
    page = make(tmp_path, runs.healthy())
    assert "trained; all gates passed; exit 0" in page.sections["header"]
    assert page.of("progress") == []
    for text in ("92.0 %", "no preference yet", "± 2.8 points", "+0.3535", "0.0970", "bound 0.1", "0.5319", "96 pairs"):
        assert text in page.sections["tiles"], text
    assert "134.5 M parameters" in page.sections["about"]
    assert "24 steps of 8 pairs = 0.10 epochs" in page.sections["about"]
    assert ["learning_rate", "5e-6"] in page.rows["about"]
    titles = ("Loss", "Reward margin", "Accuracy", "KL", "Rewards", "Gradient norm", "Learning rate", "Beta", "Speed")
    assert all(title in page.sections["curves"] for title in titles)
    assert page.rows["evaluation"][1:] == [
        ["0", "0.6931", "0.0000", "no preference yet", "0.0000", "0.0000", "0.0000"],
        ["6", "0.5998", "+0.1963", "89.0 %", "0.0184", "+0.1551", "-0.0412"],
        ["12", "0.5591", "+0.2890", "90.0 %", "0.0422", "+0.2283", "-0.0607"],
        ["18", "0.5405", "+0.3328", "91.0 %", "0.0687", "+0.2629", "-0.0699"],
        ["24 best", "0.5319", "+0.3535", "92.0 %", "0.0970", "+0.2792", "-0.0742"],
    ]
    assert "checkpoint-24 at step 24, with a score of +0.3535" in page.sections["evaluation"]
    assert page.rows["gates"][2][:4] == ["KL", "passed", "0.097", "0.1"]
    assert page.rows["gates"][4][:4] == ["validation", "not judged", "–", "–"]
    assert "The director has crafted a masterpiece." in page.sections["samples"]
    assert page.rows["dropped"][1:4] == [
        ["train", "small_gap", "11"],
        ["train", "identical", "4"],
        ["train", "duplicate", "3"],
    ]
    assert str(tmp_path / "final") in page.sections["next"] and "load_model(" in page.sections["next"]


def test_a_run_over_its_bound(tmp_path: Path) -> None:
    page = make(tmp_path, runs.failing())
    assert "trained; gate KL failed: 0.160 > 0.1; exit 3" in page.sections["header"]
    kl_gate = page.rows["gates"][2]
    assert kl_gate[1] == "failed" and "Lower learning_rate (5e-6 to 2e-6), or raise beta" in kl_gate[4]
    assert [row[1] for row in page.rows["actions"][1:]] == [
        "learning rate halved, 5e-6 to 2.5e-6",
        "beta raised, 0.1 to 0.15",
        "rolled back from step 450 to step 250",
        "learning rate halved, 2.5e-6 to 1.25e-6",
    ]
    over = [row[0] for row in page.rows["evaluation"] if "over" in row[4]]
    assert over == ["300", "350", "400", "450", "500", "550", "600"]
    charts = {
        m[1]: m[0]
        for m in re.findall(r"(<figure class=\"chart\" id=\"chart-(\w+)\".*?</figure>)", page.source, re.DOTALL)
    }
    numbers = {key: [t for a, t in Svg(text).texts if a.get("class") == "event"] for key, text in charts.items()}
    assert numbers["kl"] == ["1", "2", "3", "4"]
    assert (numbers["rate"], numbers["beta"], numbers["loss"]) == (["1", "3", "4"], ["2", "3"], [])
    assert len(Svg(charts["kl"]).of("line", "bound")) == 1


def test_the_middle_of_a_run(tmp_path: Path) -> None:
    page = make(tmp_path, runs.running())
    assert "running, step 130 of 1,000" in page.sections["header"]
    assert "about 1.7 h left" in page.sections["header"]
    assert page.of("progress")[0]["value"] == "130" and page.of("progress")[0]["max"] == "1000"
    assert "gates" not in page.sections
    assert "resume_from_checkpoint: auto" in page.sections["next"] and "checkpoint-100" in page.sections["next"]


def test_the_start_of_a_run(tmp_path: Path) -> None:
    page = make(tmp_path, [runs.start()])
    assert "running, step 0 of 24" in page.sections["header"]
    assert "No step has been logged yet." in page.sections["curves"]


def test_before_any_evaluation_the_training_batches_speak(tmp_path: Path) -> None:
    page = make(tmp_path, [runs.start(), runs.train(1), runs.train(2)])
    assert "Training batches, logged at step 2" in page.sections["tiles"]
    assert f"{runs.train(2)['loss']:.4f}" in page.sections["tiles"]


def test_what_was_not_finite_is_a_warning_and_a_gap(tmp_path: Path) -> None:
    page = make(tmp_path, runs.not_finite())
    assert "Not finite at step 8, 9, 15: loss, grad_norm, rewards/margins." in page.sections["warnings"]
    (chart,) = re.findall(r"<figure class=\"chart\" id=\"chart-loss\".*?</figure>", page.source, re.DOTALL)
    (path,) = Svg(chart).of("path", "train")
    assert path["d"].count("M") == 3 and len(re.findall("[ML]", path["d"])) == 17


def test_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    page = make(tmp_path, runs.resumed())
    assert "trained; all gates passed; exit 0" in page.sections["header"]
    assert "from checkpoint-12 at step 12" in page.sections["about"]
    stopped = make(tmp_path / "stopped", runs.resumed()[: [r["kind"] for r in runs.resumed()].index("resume")])
    assert "stopped by a signal at step 12 of 24; run it again to go on" in stopped.sections["header"]
    again = make(
        tmp_path / "again", [*runs.healthy(), {"kind": "resume", "step": 24, "time": 1.0, "from": "checkpoint-24"}]
    )
    assert "running, step 24 of 24" in again.sections["header"]  # the verdict was that of the earlier part


def test_several_sets(tmp_path: Path) -> None:
    page = make(tmp_path, runs.several_sets())
    assert page.rows["evaluation"][0][:2] == ["Step", "Set"]
    assert [row[1] for row in page.rows["evaluation"][1:3]] == ["helpful", "harmless"]
    assert "Evaluation at step 24 on helpful, 64 pairs" in page.sections["tiles"]
    (chart,) = re.findall(r"<figure class=\"chart\" id=\"chart-kl\".*?</figure>", page.source, re.DOTALL)
    assert len(Svg(chart).of("path", "eval0")) == len(Svg(chart).of("path", "eval1")) == 1


def test_dropped_rows_are_named(tmp_path: Path) -> None:
    folder = runs.write(tmp_path, runs.healthy())
    runs.write_dropped(folder)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    listed = [row for row in page.rows["dropped"] if len(row) == 4]
    assert listed[0] == ["Row", "Reason", "Detail", "File"]
    assert listed[1] == ["17", "small_gap", "score gap 0.05, at least 0.15 is asked for", "film_reviews/train.jsonl"]
    assert len(listed) == 21


def test_text_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script></style><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='x"

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {(k if key != "changed" else k + evil): spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return value + evil if isinstance(value, str) and key not in ("kind", "set", "reason_", "action") else value

    records = [spoil(r) for r in copy.deepcopy([*runs.failing(), *runs.several_sets()[1:], runs.verdict()])]
    for record in records:
        if record["kind"] == "eval" and "set" in record:
            record["set"] = evil
    (tmp_path / "dropped.jsonl").write_text(json.dumps({"row": evil, "reason": evil, "detail": evil, "file": evil}))
    page = make(tmp_path, records)
    assert "alert(1)" in page.source
    assert len(page.of("script")) == 1 and page.of("img") == []
    assert not [a for _, a in page.elements if any(k.startswith("on") for k in a)]


def test_it_is_replaced_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs.write(tmp_path, runs.running())
    first = write_report(folder).read_text(encoding="utf-8")
    runs.write(folder, runs.healthy())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left") as caught:
        write_report(folder)
    assert caught.value.name == "report-not-writable"
    assert (folder / "report.html").read_text(encoding="utf-8") == first
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "run.jsonl"]


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    assert make(tmp_path, runs.failing()).source == make(tmp_path, runs.failing()).source


def test_without_a_log_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1, 2])
def test_contrast_is_enough_in_light_dark_and_print(theme: int) -> None:
    from importlib import resources

    css = resources.files("jax_dpo.report").joinpath("report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(blocks) == 3
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", blocks[theme]))
    colours = {k: "#" + "".join(c * 2 for c in v[1:]) if len(v) == 4 else v for k, v in colours.items()}
    for text in ("ink", "soft", "bad", "good", "warn", "live", "eval0", "eval1"):
        for ground in ("paper", "card"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for name in ("bad", "good", "warn", "live"):
        assert _contrast(colours[name], colours[f"{name}-back"]) >= 4.5, name
    assert _contrast(colours["ink"], colours["warn-back"]) >= 4.5
    assert _contrast(colours["soft"], colours["grid"]) >= 4.5
    assert _contrast(colours["card"], colours["warn"]) >= 4.5  # the number in a marker
    for line in ("train", "eval0", "eval1", "eval2", "eval3", "chosen", "rejected", "bad"):
        assert _contrast(colours[line], colours["card"]) >= 3.0, line
