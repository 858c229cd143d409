"""The command line as a user meets it: commands, help, exit codes. The work behind the commands is replaced by fakes."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jax_dpo.cli import main
from jax_dpo.cli.commands import COMMANDS
from jax_dpo.errors import Stopped, UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TRAIN = ["train", "--model", "m", "--dataset", "d"]


class Fakes:
    """Stands in for what the commands call, and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.result: Any = 0
        self.error: BaseException | None = None

    def named(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            if self.error is not None:
                raise self.error
            return self.result

        return call


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    modules = {
        "jax_dpo.trainer": ("run_training", "run_evaluation", "run_check", "run_generate", "run_tune"),
        "jax_dpo.policy": ("convert",),
        "jax_dpo.report.html": ("write_report",),
        "jax_dpo.report.compare": ("write_comparison",),
        "jax_dpo.doctor": ("examine",),
    }
    for module, names in modules.items():
        fake = types.ModuleType(module)
        for name in names:
            setattr(fake, name, made.named(name))
        monkeypatch.setitem(sys.modules, module, fake)
    return made


def test_train_hands_over_what_was_parsed(fakes: Fakes) -> None:
    fakes.result = 3
    assert main([*TRAIN, "--beta", "0.2", "--use_peft"]) == 3
    ((name, (script, config), _),) = fakes.calls
    assert (name, script.model_name_or_path, script.dataset_name, script.use_peft) == ("run_training", "m", "d", True)
    assert config.changed() == {"beta": 0.2}


def test_the_other_commands_hand_over_what_was_parsed(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", "m", "--eval_dataset", "e.jsonl"]) == 0
    assert main(["check", "d.jsonl", "--model", "m", "--max_length", "64"]) == 0
    assert main(["convert", "a.gguf", "b", "--dtype", "bfloat16"]) == 0
    assert main(["generate", "--model", "m", "--prompt", "one", "two", "--temperature", "0.5"]) == 0
    fakes.result = Path("run/report.html")
    assert main(["report", "run", "other"]) == 0
    names = [name for name, _, _ in fakes.calls]
    reports = ["write_report", "write_report", "write_comparison"]
    assert names == ["run_evaluation", "run_check", "convert", "run_generate", *reports]
    assert fakes.calls[0][1][0].eval_dataset == "e.jsonl"
    assert (fakes.calls[1][1][0].dataset_name, fakes.calls[1][1][1].max_length) == ("d.jsonl", 64)
    assert fakes.calls[2][1] == ("a.gguf", "b", "bfloat16")
    assert fakes.calls[3][1:] == (
        ("m", ["one", "two"]),
        {"adapter": None, "max_new_tokens": 128, "temperature": 0.5, "top_p": 1.0, "seed": 42},
    )
    both = (["run", "other"], "comparison.html")
    assert [call[1] for call in fakes.calls[4:]] == [(Path("run"),), (Path("other"),), both]
    assert capsys.readouterr().out == "b: written\n" + 3 * "run/report.html\n"
    fakes.calls.clear()
    assert main(["report", "run"]) == 0
    assert [name for name, _, _ in fakes.calls] == ["write_report"], "one run alone is compared with nothing"


def test_tune_takes_its_own_options_out_of_the_command_line(fakes: Fakes) -> None:
    own = ["--trial-steps=20", "--trial_rates", "1e-6", "2e-6", "--kl_share", "0.9"]
    assert main(["tune", "--learning_rate", "1e-6", *TRAIN[1:], *own, "--kl_actions", "rollback", "--beta=0.2"]) == 0
    ((name, (script, config, rest), given),) = fakes.calls
    assert (name, script.model_name_or_path, config.beta) == ("run_tune", "m", 0.2)
    assert rest == [*TRAIN[1:], "--kl_actions", "rollback"]
    assert given == {
        "trial_steps": 20,
        "trial_pairs": 64,
        "trial_rates": [1e-6, 2e-6],
        "trial_betas": [],
        "kl_share": 0.9,
        "tune_report": None,
    }


def test_doctor_gets_the_places_of_the_caches(fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_DPO_CACHE", str(tmp_path))
    fakes.result = 1
    assert main(["doctor"]) == 1
    assert main(["doctor", "--compile_cache_dir", "here"]) == 1
    places = [call[1][0] for call in fakes.calls]
    assert places[0] == {"compile cache": tmp_path / "compiled", "token cache": tmp_path}
    assert places[1]["compile cache"] == Path("here")


@pytest.mark.parametrize(
    ("error", "code", "words", "traceback"),
    [
        (UserError("file-missing", "pairs.jsonl: not there"), 2, "error: pairs.jsonl: not there [file-missing]\n", False),
        (KeyboardInterrupt(), 130, "interrupted\n", False),
        (Stopped("stopped by SIGTERM, saved at step 5"), 75, "stopped by SIGTERM, saved at step 5\n", False),
        (MemoryError(), 1, "error: out of memory\n", False),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"), 1, "--micro_batch_tokens", False),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "error: out/x: there is no space left", False),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: out: permission denied", False),
        (OSError(errno.EROFS, "Read-only file system"), 2, "error: the file system is read-only", False),
        (ValueError("bad shape"), 1, "Please report it", True),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "Please report it", True),
    ],
)  # fmt: skip
def test_what_ends_a_command_decides_message_and_exit_code(
    fakes: Fakes, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str, traceback: bool
) -> None:
    fakes.error = error
    assert main(TRAIN) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert ("Traceback" in err) == traceback


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["zzz"], "the commands are train, evaluate"),
        (["train"], "2 options cannot be used"),
        (["train", "--model", "m"], "dataset_name: is needed"),
        ([*TRAIN, "--lerning_rate", "1"], "--lerning_rate: there is no such option; did you mean learning_rate?"),
        ([*TRAIN, "--warmup_ratio", "0.1"], "warmup_steps: 0.1"),
        ([*TRAIN, "-lr", "1"], "options begin with two dashes"),
        ([*TRAIN, "--beta"], "beta: needs a value"),
        ([*TRAIN, "extra"], "unexpected argument 'extra'"),
        (["train", "missing.yaml"], "missing.yaml: there is no such file"),
        (["evaluate", "--model", "m"], "eval_dataset: is needed"),
        (["check", "--model", "m"], "dataset_name: is needed"),
        (["convert", "a"], "OUT: is missing"),
        (["convert", "a", "b", "c"], "'c': is more than is expected"),
        (["convert", "a", "b", "--dtype", "int4"], "expected one of auto, float32, bfloat16, float16"),
        (["convert", "a", "b", "--dtyp", "auto"], "did you mean dtype?"),
        (["generate", "--model", "m"], "prompt: is needed"),
        (["generate", "--model", "m", "--prompt", "x", "--top_p", "0"], "(0, 1]"),
        (["report"], "RUN_DIR: is missing"),
        (["doctor", "--min_free_gib", "none"], "expected a number"),
    ],
)
def test_wrong_input_is_one_message_and_exit_2(
    fakes: Fakes, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert fakes.calls == [] and out == ""
    assert err.startswith("error: ") and err.count("error: ") == 1
    assert words in err


def test_no_command_shows_the_commands_and_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "usage: jax-dpo COMMAND" in err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["-h"], ["help"]):
        assert main(argv) == 0
        shown = capsys.readouterr().out
        for name, command in COMMANDS.items():
            assert name in shown and command.summary in shown
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jax-dpo ")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_examples_and_all_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--model", "m", "--help"]) == 0
    shown = capsys.readouterr().out
    assert main(["help", name]) == 0
    assert capsys.readouterr().out == shown
    for example in COMMANDS[name].examples:
        assert example in shown
    if name == "train":
        from jax_dpo.config.flags import option_types

        for option in option_types(*COMMANDS[name].options):
            assert f"--{option} " in shown


@pytest.mark.parametrize(
    "example", [example for command in COMMANDS.values() for example in command.examples], ids=lambda text: text[:40]
)
def test_the_examples_of_the_help_run(
    example: str, fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(CONFIGS, tmp_path / "configs")
    (tmp_path / "run.yaml").write_text("model_name_or_path: ./model\ndataset_name: pairs.jsonl\n")
    monkeypatch.chdir(tmp_path)
    program, *argv = shlex.split(example)
    assert program == "jax-dpo"
    assert main(argv) == 0, capsys.readouterr().err
    assert len({name for name, _, _ in fakes.calls} - {"write_comparison"}) == 1


def test_a_reader_that_leaves_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        argv = [sys.executable, "-m", "jax_dpo", "train", "--help"]
        ended = subprocess.run(argv, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False, timeout=30)
    finally:
        os.close(write_end)
    assert (ended.returncode, ended.stderr) == (141, "")
