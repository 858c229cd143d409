"""The study's page out of logs. Oracle: logs written here, whose numbers are known."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from scripts import kl_study
from scripts.kl_study_page import ended, picture, reward_picture, table


def log(kls: list[float], accuracy: float, actions: int = 0) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"kind": "start", "step": 0, "data": {"eval": {"eval": {"kept": 100}}}}]
    for i, kl in enumerate(kls):
        numbers = {"eval_kl_divergence": kl, "eval_rewards/margins": 0.3, "eval_rewards/accuracies": accuracy}
        numbers |= {"eval_kl_on_policy/sequence": 20 * kl, "eval_kl_on_policy/sequence_se": kl}
        answers = [{"answer": f"{-0.1 * i}"}, {"answer": f"{-0.1 * i - 0.2}"}]
        records.append({"kind": "eval", "step": 6 * i, **numbers, "sampled": answers})
    return [*records, *({"kind": "kl_action", "step": 6} for _ in range(actions)), {"kind": "verdict", "step": 18}]


def test_a_run_is_read_from_its_log() -> None:
    run = ended("actions", 5e-6, 0.1, 42, log([0.0, 0.2, 0.07], 0.9, actions=2), float)
    assert (run.kl, run.highest_kl, run.actions, run.pairs) == (0.07, 0.2, 2, 100)
    assert run.error == pytest.approx(0.03)
    assert "| actions | 5e-6 | 0.1 | 0.0700 | 0.2000 | +0.300 | 90.0% +- 3.0% | 2 |" in table([run])
    over = ended("off", 5e-6, 0.1, 42, log([0.0, 0.2], 0.9), float)
    assert "**0.2000**" in table([over])


def test_the_picture_has_every_run_on_both_panels() -> None:
    runs = [
        ended(c, rate, 0.1, 42, log([0.0, 0.05 * i], 0.9), float)
        for c in ("off", "actions")
        for i, rate in ((1, 5e-6), (9, 1e-4))
    ]
    drawn = ET.fromstring(picture(runs))
    svg = "{http://www.w3.org/2000/svg}"
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in drawn.iter(f"{svg}circle")]
    assert len(circles) == 8
    bound = next(float(x.attrib["y1"]) for x in drawn.iter(f"{svg}line") if "stroke-dasharray" in x.attrib)
    kls = circles[:4]
    assert [y < bound for _, y in kls] == [False, True, False, True], "a KL over the bound is drawn above it"


def test_the_runs_are_those_that_the_issue_of_rates_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = kl_study.all_runs()
    assert len({run.name for run in runs}) == len(runs)
    assert kl_study.RATES[-1] / kl_study.RATES[0] == pytest.approx(30)
    for control in kl_study.CONTROLS:
        rates = {run.rate for run in runs if run.control == control and run.seed == 42}
        assert rates == set(kl_study.RATES) - ({kl_study.LOWEST} if control == "actions" else set())
    # The page is made of what is there.
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(kl_study, "ROOT", tmp_path)
    file = tmp_path / "docs" / "kl-study.jsonl"
    found = {
        r.name: ended(r.control, r.rate, r.beta, r.seed, log([0.0, 0.3], 0.8), float) for r in runs[:5] + runs[-1:]
    }
    kl_study.write_results(file, found)
    assert kl_study.results(file) == found
    assert kl_study.main(["--page", "--results", str(file)]) == 0
    page = (tmp_path / "docs" / "kl-study.md").read_text()
    assert page.count("**0.3000**") == 6, "in bold, since it is over the bound"
    assert "100 pairs" in page and "kl-study-reward.svg" in page
    for name in ("kl-study.svg", "kl-study-reward.svg"):
        ET.parse(tmp_path / "docs" / name)


def test_the_reward_of_sampled_answers_over_their_kl() -> None:
    """Two answers at each evaluation with the sentiments -0.1 i and -0.1 i - 0.2: reward 0.1 i + 0.1, standard error 0.1."""
    free = ended("off", 5e-6, 0.1, 42, log([0.0, 0.05, 0.2], 0.9), float)
    assert [p.reward for p in free.points] == pytest.approx([0.1, 0.2, 0.3])
    assert [p.reward_se for p in free.points] == pytest.approx([0.1] * 3)
    assert [p.kl for p in free.points] == pytest.approx([0.0, 1.0, 4.0])
    held = ended("trust_region", 5e-6, 0.1, 42, log([0.0, 0.09], 0.9), float)
    drawn = ET.fromstring(reward_picture([free, held], 5e-6))
    svg = "{http://www.w3.org/2000/svg}"
    places = [float(c.attrib["cx"]) for c in drawn.iter(f"{svg}circle")]
    assert (places[2] - places[0]) / (places[1] - places[0]) == pytest.approx(4.0, abs=0.01)
    assert len(list(drawn.iter(f"{svg}polygon"))) == 1


def test_a_command_is_one_that_the_command_line_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the parser of the command itself."""
    from jax_dpo.config import parse

    monkeypatch.chdir(kl_study.ROOT)
    for run in kl_study.all_runs():
        python, dash, package, command, *words = run.command(tmp_path)
        assert (package, command) == ("jax_dpo", "train")
        _, config = parse(words)
        assert (config.learning_rate, config.beta, config.seed) == (run.rate, run.beta, run.seed)
        assert config.kl_trust_region == (run.control == "trust_region")
        assert bool(config.kl_actions) == (run.control in ("actions", "penalty_and_actions"))
