"""`make demo`, step by step, with the command line and the downloads replaced: what is kept, what is begun again, how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax_dpo.cli
from jax_dpo import errors
from jax_dpo.config import parse
from scripts.demo import fetch, pairs, run


class CommandLine:
    """Stands for `jax_dpo.cli.main`: writes what the commands would write, returns the codes given for `train`."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.train_code = errors.OK
        self.convert_code = errors.OK
        self.signal: int | None = None

    def __call__(self, argv: list[str]) -> int:
        self.calls.append(argv)
        if argv[0] == "convert":
            out = Path(argv[2])
            out.mkdir()  # the real one refuses a directory that is there, too
            (out / "model.safetensors").write_bytes(b"weights")
            return self.convert_code
        assert argv[:2] == ["train", "configs/demo.yaml"]
        out = Path(argv[argv.index("--output_dir") + 1] if "--output_dir" in argv else "demo/run")
        out.mkdir(parents=True)
        if self.signal:
            os.kill(os.getpid(), self.signal)
        (out / "final").mkdir()
        (out / "verdict.json").write_text(json.dumps({"headline": "trained; all gates passed"}))
        (out / "run.jsonl").write_text(json.dumps({"kind": "start"}) + "\n")
        return self.train_code

    @property
    def commands(self) -> list[str]:
        return [call[0] for call in self.calls]


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    fake = CommandLine()
    monkeypatch.setattr(jax_dpo.cli, "main", fake)
    return fake


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for the demo; its downloads are there, its pairs are counted and not made."""
    monkeypatch.chdir(tmp_path)
    found = fetch.Fetched(tmp_path / "model.gguf", tmp_path / "ratings.txt", tmp_path / "judge.whl")
    monkeypatch.setattr(fetch, "fetch", lambda folder: found)
    counts = {"sentences": 8436, "train.jsonl": 1995, "test.jsonl": 96, "held_out.jsonl": 104}
    monkeypatch.setattr(pairs, "write_pairs", lambda ratings, folder: counts)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def test_the_second_demo_keeps_the_model_and_starts_training_over(root: Path, command_line: CommandLine) -> None:
    assert run.main([], root) == errors.OK
    (root / "demo" / "run" / "old").touch()
    assert run.main([], root) == errors.OK
    assert command_line.commands == ["convert", "train", "train"]
    assert not (root / "demo" / "run" / "old").exists()
    assert not (root / "demo" / "model.partial").exists()


def test_options_go_to_training(root: Path, command_line: CommandLine) -> None:
    assert run.main(["--max_steps", "5", "--use_peft"], root) == errors.OK
    assert command_line.calls[-1] == ["train", "configs/demo.yaml", "--max_steps", "5", "--use_peft"]


@pytest.mark.parametrize("damage", ["cut", "gone", "no marker", "another version", "not JSON"])
def test_a_conversion_that_is_not_whole_is_made_again(root: Path, command_line: CommandLine, damage: str) -> None:
    assert run.main([], root) == errors.OK
    weights, marker = root / "demo" / "model" / "model.safetensors", root / "demo" / "model" / run.MARKER
    match damage:
        case "cut":
            weights.write_bytes(b"wei")
        case "gone":
            weights.unlink()
        case "no marker":
            marker.unlink()
        case "another version":
            marker.write_text(json.dumps(json.loads(marker.read_text()) | {"jax_dpo": "0.0.0"}))
        case "not JSON":
            marker.write_text("{")
    assert run.main([], root) == errors.OK
    assert command_line.commands == ["convert", "train"] * 2
    assert weights.read_bytes() == b"weights"


def test_what_a_kill_left_of_a_conversion_is_cleared_away(root: Path, command_line: CommandLine) -> None:
    partial = root / "demo" / "model.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"wei")
    assert run.main([], root) == errors.OK
    assert not partial.exists()


def test_a_failed_conversion_ends_the_demo_and_leaves_nothing(root: Path, command_line: CommandLine) -> None:
    command_line.convert_code = errors.USER_INPUT
    assert run.main([], root) == errors.USER_INPUT
    assert command_line.commands == ["convert"]
    assert [path.name for path in (root / "demo").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("trained", "demo"),
    [
        (errors.OK, errors.OK),
        (errors.GATE_FAILED, errors.OK),
        (errors.USER_INPUT, errors.USER_INPUT),
        (errors.UNEXPECTED, errors.UNEXPECTED),
        (errors.STOPPED, errors.STOPPED),
    ],
)
def test_the_demo_ends_well_once_the_model_is_trained(
    root: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str], trained: int, demo: int
) -> None:
    command_line.train_code = trained
    assert run.main([], root) == demo
    assert ("trained; all gates passed" in capsys.readouterr().out) == (demo == errors.OK)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, errors.STOPPED), (signal.SIGINT, 130)])
def test_a_signal_ends_the_demo_with_its_code(
    root: Path, command_line: CommandLine, number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    command_line.signal = number
    assert run.main([], root) == code
    assert "run it again" in capsys.readouterr().err
    command_line.signal = None
    assert run.main([], root) == errors.OK


def test_another_folder_is_the_users_own(
    root: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    own = root / "demo" / "run"
    assert run.main([], root) == errors.OK
    assert run.main(["--output_dir", "elsewhere"], root) == errors.OK
    assert "elsewhere/report.html" in capsys.readouterr().out
    assert own.is_dir()


def test_two_demos_do_not_run_at_once(
    root: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    with run.only_one(root / "demo"):
        assert run.main([], root) == errors.USER_INPUT
    assert "another demo" in capsys.readouterr().err
    assert command_line.calls == []


def test_a_full_disk_is_told_in_a_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(folder: Path) -> fetch.Fetched:
        raise OSError(28, "No space left on device", str(folder / "a.whl"))

    monkeypatch.setattr(fetch, "fetch", full)
    assert run.main([], root) == errors.USER_INPUT
    assert "No space left on device: " in capsys.readouterr().err


def test_samples_are_judged(
    root: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = {"prompt": "p", "reference": "fine", "policy": "dull"}
    monkeypatch.setattr(run.judge, "last_samples", lambda records: [sample])
    monkeypatch.setattr(run.judge, "load_judge", lambda wheel: lambda text: {"fine": 0.5, "dull": -0.5}[text])
    assert run.main([], root) == errors.OK
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line.startswith(("  reference", "  policy"))] == ["+0.50", "-0.50"]


def test_the_configuration_is_valid_and_points_into_the_demo() -> None:
    script, config = parse([str(run.ROOT / run.CONFIG)])
    assert (script.model_name_or_path, config.output_dir) == ("demo/model", "demo/run")
    assert (script.dataset_name, script.eval_dataset) == ("demo/data/train.jsonl", "demo/data/test.jsonl")
    assert config.max_steps * config.per_device_train_batch_size == 192
    assert config.max_steps % config.eval_steps == 0 and config.eval_steps == config.save_steps
