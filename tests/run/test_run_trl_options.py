"""Options that change which pairs are used, when something is logged or evaluated, or how a step is taken: runs beside TRL's own.

Oracle: the logs of TRL 1.16 in tests/golden/trl/runs.json, made by tests/parity/option_runs.py with the same options.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

import option_runs

LOGS = json.loads((tiny.GOLDEN / "trl" / "runs.json").read_text(encoding="utf-8"))
TRAINING = tiny.GOLDEN / "training"
# The bounds of the reference runs: two torch runs part by a tenth of them.
RELATIVE, ABSOLUTE = 5e-5, 5e-5
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGPS = ("logps/chosen", "logps/rejected")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(TRAINING / "start" / "qwen3", tmp_path_factory.mktemp("models") / "start"))
    for file in tiny.TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def test_every_run_has_its_log() -> None:
    assert LOGS.keys() == option_runs.RUNS.keys()


def assert_equal_metrics(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> None:
    """All that both mean alike; TRL's entropy, logits and token accuracy are means of batch means (docs/metrics.md)."""
    for names, bound in ((REWARDS, ABSOLUTE), (LOGPS, 10 * ABSOLUTE)):
        for name in names:
            found = mine[prefix + name]
            assert found == pytest.approx(theirs[prefix + name], abs=bound), (prefix + name, theirs["step"])


QUICK = ("drop_last", "eval_delay", "stream", "short_micro_batch", "windows_over_epochs")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in option_runs.RUNS]
)
def test_a_run_logs_what_trl_logs(name: str, start: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**option_runs.COMMON, **option_runs.RUNS[name]}
    pairs = TRAINING / options.pop("pairs", option_runs.PAIRS)
    given = {"model_name_or_path": start, "dataset_name": pairs, "bf16": False, "output_dir": tmp_path / "out"}
    if "eval_strategy" in options:
        given |= {"eval_dataset": pairs, "eval_weighting": "batches"}
    ended = tiny.jax_dpo("train", *tiny.flags({**given, "gradient_checkpointing": False, **options}))
    assert ended.code in (0, 3), ended.err
    theirs = [e for e in LOGS[name] if "loss" in e]
    ours = tiny.records(tmp_path / "out", "train")
    assert [r["step"] for r in ours] == [e["step"] for e in theirs]
    if (
        name != "stream_that_ends"
    ):  # TRL, which knows no length, counts a third of an epoch a step, and one for each new start
        assert [r["epoch"] for r in ours] == pytest.approx([e["epoch"] for e in theirs])
    for mine, entry in zip(ours, theirs):
        assert mine["loss"] == pytest.approx(entry["loss"], rel=RELATIVE), entry["step"]
        assert mine["grad_norm"] == pytest.approx(entry["grad_norm"], rel=RELATIVE), entry["step"]
        assert mine["learning_rate"] == pytest.approx(entry["learning_rate"], rel=1e-12)
        assert mine["num_tokens"] == entry["num_tokens"]
        assert_equal_metrics(mine, entry)
    (end,) = tiny.records(tmp_path / "out", "end")
    assert end["train_loss"] == pytest.approx(LOGS[name][-1]["train_loss"], rel=RELATIVE)  # of all steps, logged or not
    if "num_tokens" in LOGS[name][-1]:  # steps after the last log line; TRL loses them where an evaluation came last
        assert_equal_metrics(end, LOGS[name][-1])
        assert end["num_tokens"] == LOGS[name][-1]["num_tokens"]
    theirs, ours = [e for e in LOGS[name] if "eval_loss" in e], tiny.records(tmp_path / "out", "eval")
    assert [(r["step"], r["epoch"]) for r in ours] == [(e["step"], pytest.approx(e["epoch"])) for e in theirs]
    for mine, entry in zip(ours, theirs):
        assert mine["eval_loss"] == pytest.approx(entry["eval_loss"], rel=RELATIVE), entry["step"]
        assert mine["eval_num_tokens"] == entry["eval_num_tokens"]
        assert_equal_metrics(mine, entry, "eval_")


def test_an_epoch_without_a_whole_batch_is_refused(start: Path, tmp_path: Path) -> None:
    given = {"model_name_or_path": start, "dataset_name": TRAINING / "pairs7.jsonl", "output_dir": tmp_path / "out"}
    ended = tiny.jax_dpo("train", *tiny.flags({**given, "dataloader_drop_last": True}))
    assert ended.code == 2
    assert "there are 7 pairs, and one batch of all devices takes 8" in ended.err
    assert not (tmp_path / "out").exists()


class Screen(io.StringIO):
    """What redraws lines."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("disabled", [False, True])
def test_disable_tqdm_leaves_the_live_line_out(disabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there from the first thing that takes time, here a data set that is not; hiding the cursor begins it."""
    from jax_dpo.cli import main

    monkeypatch.setenv("TERM", "xterm")
    with redirect_stdout(Screen()) as out, redirect_stderr(io.StringIO()) as err:
        argv = [
            "--model",
            "none",
            "--dataset",
            "./none.jsonl",
            "--output_dir",
            str(tmp_path),
            "--disable_tqdm",
            str(disabled),
        ]
        assert main(["train", *argv]) == 2
    assert "there is no such file" in err.getvalue()
    assert ("\x1b[?25l" in out.getvalue()) is not disabled
