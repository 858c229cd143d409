"""The KL of single answers as a person sees it. Oracle: the records of a made-up run."""

from __future__ import annotations

import re
from pathlib import Path

import report_runs as runs

from jax_dpo.report import sections
from jax_dpo.report.html import page
from jax_dpo.report.kl_section import kl_detail
from jax_dpo.report.summary import on_policy_text, summarise


def cells(text: str, caption: str) -> list[list[str]]:
    """The rows of the table with this caption."""
    inside = next(t for t in re.findall(r"<table.*?</table>", text, re.S) if caption in t)
    body = inside.split("<tbody>")[1]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", body, re.S)]


def test_by_position_and_over_the_answers_of_the_last_evaluation() -> None:
    text = str(kl_detail(summarise(runs.in_detail(runs.healthy()))))
    assert "Evaluation at step 24" in text
    assert cells(text, "by position") == [
        ["1", "0.2182", "96", "0.2668", "96"],  # 2.5 times 0.9 and 1.1 times 0.097
        ["2 to 4", "0.1397", "288", "0.1707", "288"],
        ["5 to 8", "0.0960", "310", "0.1174", "310"],
        ["9 to 16", "0.0679", "77", "–", "0"],
    ]
    rows = {row[0]: row[1:] for row in cells(text, "over the answers")}
    assert rows["All, per token"] == ["0.0970", "0.0776", "0.1649", "0.3007"]
    assert rows["All, per answer"] == ["2.9100", "2.3280", "4.9470", "9.0210"]
    assert rows["Chosen, per token"] == ["0.0873", "0.0698", "0.1484", "0.2706"]
    assert rows["Rejected, per answer"][0] == "3.2010"


def test_sampled_answers_beside_those_of_the_data() -> None:
    run = summarise(runs.in_detail(runs.healthy()))
    curves, text = str(sections.curves(run)), str(kl_detail(run))
    assert "KL where the policy goes" in curves
    assert "answers it samples: from 0.0000 at step 0 to 0.1261 at step 24" in curves
    assert "answers of the data: from 0.0000 at step 0 to 0.0970 at step 24" in curves
    assert "0.1261 ± 0.0097 nats per token, 5.0440 ± 0.3880 nats per answer of 40.0 tokens" in text
    assert on_policy_text(runs.detailed(runs.evaluate(24))) == "0.1261 ± 0.0097"
    farthest = cells(text, "Sampled answers with the highest KL")
    assert farthest == [
        ["prompt 4", "answer 4", "0.8000"],
        ["prompt 3", "answer 3", "0.6000"],
        ["prompt 2", "(empty)", "0.4000"],
    ]


def test_several_sets_have_their_own(tmp_path: Path) -> None:
    text = page(summarise(runs.in_detail(runs.several_sets())), tmp_path)
    assert "helpful: from 0.0000 at step 0 to 0.1261 at step 24" in text
    assert "At step 24 on harmless the KL along answers that the policy samples is 0.0650" in text
    assert "Evaluation at step 24 on helpful" in text and "<summary>Evaluation at step 24 on harmless</summary>" in text


def test_runs_without_it_and_runs_that_evaluated_nothing() -> None:
    assert kl_detail(summarise([runs.start(), runs.train(1), runs.evaluate(1)])) is None
    assert on_policy_text(runs.evaluate(1)) == "" and on_policy_text(None) == ""
    profile = runs.detailed(runs.evaluate(24))["kl_profile"]
    text = str(kl_detail(summarise([runs.start(), runs.train(3, kl_profile=profile, kl_sequence=1.25)])))
    assert "Training batches, logged at step 3" in text and "samples" not in text
    assert {row[0]: row[1] for row in cells(text, "over the answers")}["All, per answer"] == "1.2500"
