"""Several runs on one page. Oracles: the page as html.parser reads it, the numbers of the records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import report_runs as runs
from report_svg import Svg, assert_inside
from test_html import Page

from jax_dpo.errors import UserError
from jax_dpo.report.compare import names_of, write_comparison


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A healthy run, and one over the bound with another beta and another rate."""
    first, *rest = runs.failing()
    other = {**first, "options": {**first["options"], "learning_rate": 2e-5, "beta": 0.3, "output_dir": "elsewhere"}}
    healthy, *others = runs.healthy()
    place = {**healthy, "options": {**healthy["options"], "output_dir": "here"}}
    return [runs.write(tmp_path / "calm", [place, *others]), runs.write(tmp_path / "wild", [other, *rest])]


@pytest.fixture
def page(folders: list[Path], tmp_path: Path) -> Page:
    return Page(write_comparison(folders, tmp_path / "both.html").read_text(encoding="utf-8"))


def test_the_ends_stand_side_by_side(page: Page, folders: list[Path]) -> None:
    head, calm, wild = page.rows["ends"]
    assert head[:8] == ["Run", "Step", "Loss", "Accuracy", "Margin", "Margin / beta", "KL", "Bound"]
    for row, folder, beta in ((calm, folders[0], 0.1), (wild, folders[1], 0.3)):
        records = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
        last = [r for r in records if r["kind"] == "eval"][-1]
        margin = last["eval_rewards/margins"]
        assert row[:3] == [folder.name, f"{last['step']:,}", f"{last['eval_loss']:.4f}"]
        assert row[4:6] == [f"+{margin:.4f}", f"+{margin / beta:.2f}"]
        assert float(row[6].removesuffix(" over")) == pytest.approx(last["eval_kl_divergence"], abs=1e-4)
    assert calm[6].endswith("over") is False and wild[6].endswith("over")
    assert calm[8].startswith("step 24") and wild[8].startswith("step 250")


def test_only_what_differs_is_listed_and_places_are_no_difference(page: Page) -> None:
    assert [row[0] for row in page.rows["options"]] == ["Option", "learning_rate", "beta"]
    assert page.rows["options"][1:] == [["learning_rate", "5e-6", "2e-5"], ["beta", "0.1", "0.3"]]


def test_verdicts_gates_and_findings_are_told(page: Page) -> None:
    assert [row[:2] for row in page.rows["verdicts"][1:]] == [["calm", "passed"], ["wild", "gate failed"]]
    told = [row[:2] for row in page.rows["findings"]]
    assert ["wild", "KL"] in told and ["wild", "kl-over-bound"] in told and ["calm", "–"] in told


def test_curves_lie_over_each_other_with_their_names(page: Page) -> None:
    charts = re.findall(r"<figure class=\"chart\".*?</figure>", page.source, re.DOTALL)
    assert len(charts) >= 9
    for chart in charts:
        svg = Svg(chart)
        assert_inside(svg)
        (top,) = [a for t, a in svg.elements if t == "svg" and "data-chart" in a]
        assert [c["name"] for c in json.loads(top["data-chart"])] == ["calm", "wild"]
        assert "run0" in chart and "run1" in chart and "last value" not in chart
    kl = next(c for c in charts if 'id="chart-eval-kl"' in c)
    assert "bound 0.1" in kl and 'class="over"' in kl


def test_it_loads_nothing_and_is_valid(page: Page) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.source.replace("// Shows the values", ""))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")


def test_runs_that_sampled_answers_have_the_kl_along_them(tmp_path: Path) -> None:
    plain, detailed = (
        runs.write(tmp_path / name, r)
        for name, r in (("plain", runs.healthy()), ("detailed", runs.in_detail(runs.healthy())))
    )
    title = 'id="chart-eval-kl-on-policy"'
    assert title in write_comparison([plain, detailed], tmp_path / "a.html").read_text()
    assert title not in write_comparison([plain, plain], tmp_path / "b.html").read_text()


def test_two_bounds_are_two_lines(tmp_path: Path) -> None:
    def bounded(target: float) -> Path:
        first, *rest = runs.healthy()
        return runs.write(
            tmp_path / f"{target}", [{**first, "options": {**first["options"], "target_kl": target}}, *rest]
        )

    text = write_comparison([bounded(0.1), bounded(0.05)], tmp_path / "c.html").read_text()
    assert "bound 0.05" in text and "bound 0.1" in text
    assert 'class="over"' not in text.replace('class="fill over"', "")


@pytest.mark.parametrize("count", [2, 9])
def test_runs_of_every_kind(tmp_path: Path, count: int) -> None:
    """Running, without evaluations, empty, of several sets; more of them than there are colours."""
    kinds = [runs.running(), [runs.start()], [], runs.several_sets(), runs.not_finite(), runs.resumed()]
    folders = [runs.write(tmp_path / f"r{i}", kinds[i % len(kinds)]) for i in range(count)]
    page = Page(write_comparison(folders, tmp_path / "c.html").read_text())
    assert len(page.rows["ends"]) == count + 1
    same = Page(write_comparison([folders[0], folders[0]], tmp_path / "same.html").read_text())
    assert "are the same in all of them" in same.sections["options"]


def test_names_are_as_short_as_they_can_be() -> None:
    assert names_of([Path("/a/one"), Path("/b/two")]) == ["one", "two"]
    assert names_of([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert names_of([Path("/a/run"), Path("/a/run"), Path("/b/run")]) == ["a/run (1)", "a/run (2)", "b/run"]


def test_what_cannot_be_read_or_written_is_named(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/run\.jsonl: cannot be read"):
        write_comparison([folders[0], tmp_path / "nowhere"], tmp_path / "c.html")
    with pytest.raises(UserError, match=r"jax-dpo report .*calm .*wild") as error:
        write_comparison(folders, tmp_path / "no folder" / "c.html")
    assert error.value.name == "report-not-writable"


def test_text_cannot_become_markup(tmp_path: Path) -> None:
    first, *rest = runs.healthy()
    evil = {**first, "options": {**first["options"], "run_note": "<img src=x>"}, "model": {"name": "<script>"}}
    folders = [runs.write(tmp_path / "<b>", [evil, *rest]), runs.write(tmp_path / "b", runs.healthy())]
    text = write_comparison(folders, tmp_path / "c.html").read_text()
    assert "<img" not in text and "<b>" not in text and text.count("<script>") == 1
