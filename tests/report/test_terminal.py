"""What the terminal shows. Oracle: the text that a recorded console got, on a terminal and on a plain stream."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report_runs as runs

from jax_dpo.report.live_line import LiveLine
from jax_dpo.report.terminal import Quiet, Terminal

_CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def show(records: list[dict], tty: bool, width: int = 100, **options: Any) -> str:
    from rich.console import Console

    file, clock = io.StringIO(), Clock()
    console = Console(file=file, force_terminal=tty, width=width, legacy_windows=False)
    terminal = Terminal(console, output_dir="outputs/demo", clock=clock, **options)
    for record in records:
        terminal.write(record)
        if record["kind"] == "start":
            terminal.compiling("the train step", 12)
            clock.now += 11.2
            terminal.compiled(11.2)
        if record["kind"] == "train":
            clock.now += 6.6
            terminal.progress(record["step"], 24, record)
    terminal.close()
    return file.getvalue()


def test_a_plain_stream_gets_one_line_a_log_record_and_no_control_codes() -> None:
    text = show(runs.healthy(), tty=False)
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    trained = [line for line in lines if re.match(r"step \d+/24 ", line)]
    assert len(trained) == 24
    record = next(r for r in runs.healthy() if r["kind"] == "train" and r["step"] == 12)
    assert trained[11].startswith(
        f"step 12/24  loss {record['loss']:.3f}  margin {record['rewards/margins']:+.3f}  "
        f"acc {100 * record['rewards/accuracies']:.0f}%  KL {record['kl_divergence']:.3f}  1.2 pairs/s  "
    )
    assert trained[11].endswith(" left")
    assert "acc –" in trained[0]  # at the first step all rewards are equal
    assert len([line for line in lines if "  evaluation  " in line]) == 5
    assert "step 0  evaluation  loss 0.6931  margin 0.0000  accuracy no preference yet  KL 0.0000" in lines


def test_what_is_trained_and_how_long_is_said_first() -> None:
    lines = show(runs.healthy(), tty=False).splitlines()
    assert lines[0] == "jax_dpo 0.1.0 on 1 x cpu"
    said = {line.split()[0]: line for line in lines[1:9]}
    assert "SmolLM2-135M-Instruct (llama, 134.5 M parameters, float32)" in said["model"]
    assert "1,890 pairs of 1,908 rows (dropped: 11 small_gap, 4 identical, 3 duplicate)" in said["train"]
    assert "24 steps of 8 pairs = 0.10 epochs, 2 warm-up steps" in said["plan"]
    assert "about 3 min" in said["expected"]
    assert "kl_coef 1" in said["options"]
    assert lines[9].startswith("warning: max_steps 24 is 0.10 epochs")
    assert lines[10:12] == ["compiling the train step, about 12 s", "compiled in 11 s"]


def test_the_verdict_the_places_and_the_headline_come_last() -> None:
    text = show(runs.failing(), tty=False)
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[-1] == "trained; gate KL failed: 0.160 > 0.1; exit 3"
    tail = "\n".join(lines[-40:])
    assert re.search(r"accuracy +no preference yet +92\.0 %", tail)
    assert re.search(r"KL, bound 0\.1 +0\.0000 +0\.1600", tail)
    assert re.search(r"KL +failed +KL 0\.160 of the last evaluation is over the bound 0\.1", tail)
    assert "Lower learning_rate (5e-6 to 2e-6), or raise beta (0.1 to 0.2)." in tail
    assert re.search(r"validation +not judged", tail)
    assert "outputs/demo/final" in tail and "outputs/demo/best (step 250, score +0.2654)" in tail
    assert "outputs/demo/report.html" in tail and "tensorboard --logdir outputs/demo/tensorboard" in tail
    assert "step 350  KL control: beta raised, 0.1 to 0.15 (KL 0.116 of" in text
    assert "step 450  KL control: rolled back from step 450 to step 250" in text
    assert "step 250  saved checkpoint-250, score +0.2654, the best so far" in text
    assert "step 600  saved checkpoint-600, no score: KL is over its bound" in text


def test_samples_stand_side_by_side() -> None:
    lines = show(runs.healthy(), tty=False).splitlines()
    at = next(i for i, line in enumerate(lines) if "Talk about the story." in line)
    assert lines[at + 1].split() == ["reference", "policy"]
    assert re.match(r"The story is a beautifully .+  The story is a predictable", lines[at + 3])


def test_a_terminal_gets_a_live_line_and_tables() -> None:
    raw = show(runs.healthy(), tty=True)
    text = _CODES.sub("", raw)
    assert "\x1b[?25l" in raw and raw.count("\x1b[?25h") == raw.count("\x1b[?25l")  # the cursor comes back
    assert "compiling the train step, about 12 s" in text
    assert "12/24  loss " in text and " pairs/s  " in text and " left" in text
    assert "step 12/24" not in text  # no line of its own for a log record
    assert re.search(r"step +loss +margin +accuracy +KL", text)
    assert re.search(r"\n +12 +0\.5591 +\+0\.2890 +90\.0 % +0\.0422\n", text.replace("\r", "\n"))
    assert text.rstrip().splitlines()[-1] == "trained; all gates passed; exit 0"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_live_line_fits_the_width(width: int) -> None:
    from rich.console import Console

    clock = Clock()
    line = LiveLine(clock)
    line.move(999, 1000, runs.train(12, step_time=3.0))
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
    console.print(line)
    shown = _CODES.sub("", console.file.getvalue()).rstrip("\n")  # type: ignore[attr-defined]
    assert len(shown.rstrip()) < width and "\n" not in shown
    assert "999/1000" in shown and "KL 0." in shown and "left" in shown
    assert ("pairs/s" in shown) == (width >= 80)
    assert width < 120 or "━━━━━━━━" in shown


def test_time_left_follows_the_steps_done() -> None:
    clock = Clock()
    line = LiveLine(clock)
    line.move(1, 11, {"step_time": 2.0})
    assert dict(line.pieces())["left"] == "0:20 left"
    clock.now += 15.0  # an evaluation came between
    line.move(2, 11, {"step_time": 2.0})
    assert dict(line.pieces())["left"] == "2:15 left"
    clock.now += 5.0
    assert dict(line.pieces())["left"] == "2:10 left"


def test_metrics_that_lag_keep_their_last_value() -> None:
    line = LiveLine(Clock())
    line.move(1, 10, {"loss": 0.5, "kl_divergence": 0.01})
    line.move(2, 10, {"loss": 0.4})
    assert dict(line.pieces())["loss"] == "loss 0.400"
    assert dict(line.pieces())["kl"] == "KL 0.010"


def test_a_resumed_run_compares_with_its_first_evaluation() -> None:
    records = runs.resumed()
    cut = next(i for i, r in enumerate(records) if r["kind"] == "resume")
    text = show(records[cut:], tty=False, history=records[:cut])
    assert text.startswith("going on from checkpoint-12, after step 12\n")
    assert re.search(r"before \(step 0\) +after \(step 24\)", text)


def test_several_sets_are_told_apart() -> None:
    plain = show([*runs.several_sets(), runs.verdict()], tty=False)
    assert "step 8  evaluation harmless  loss" in plain
    assert "Held-out pairs (helpful)" in plain and "Held-out pairs (harmless)" in plain
    assert re.search(r"\n +8  harmless +0\.", _CODES.sub("", show(runs.several_sets(), tty=True)).replace("\r", "\n"))


def test_a_stop_says_how_to_go_on() -> None:
    text = show(runs.resumed()[:16], tty=False) + show([*runs.running(), runs.end(130, "signal")], tty=False)
    last = text.splitlines()[-1]
    assert (
        last
        == "stopped by a signal at step 130 of 1000; saved as checkpoint-100; run the same command again to go on; exit 75"
    )


def test_what_a_model_says_cannot_steer_the_terminal() -> None:
    record = runs.samples()
    record["samples"] = [
        {"prompt": "p", "reference": "\x1b[2Jgone [bold]x[/bold]", "policy": [{"role": "a", "content": "\x07"}]}
    ]
    text = show([record], tty=False)
    assert "\x1b" not in text and "\x07" not in text
    assert "\ufffd[2Jgone [bold]x[/bold]" in text


def test_a_stream_that_cannot_hold_a_character_gets_another() -> None:
    from rich.console import Console

    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii", errors="strict"), force_terminal=False, width=100)
    terminal = Terminal(console)
    record = runs.samples()
    record["samples"][0]["policy"] = "好 – ü"
    for r in (runs.start(), runs.train(1), record, runs.verdict()):
        terminal.write(r)
    terminal.close()
    console.file.flush()
    assert raw.getvalue().decode("ascii").rstrip().endswith("trained; all gates passed; exit 0")


def test_a_closed_pipe_ends_the_show_and_not_the_run(tmp_path: Path) -> None:
    script = (
        "import report_runs as runs, sys\n"
        "from jax_dpo.report.terminal import Terminal\n"
        "terminal = Terminal()\n"
        "for record in runs.failing():\n"
        "    terminal.write(record)\n"
        "terminal.close()\n"
        "print('went on', file=sys.stderr)\n"
    )
    paths = os.pathsep.join([str(Path(runs.__file__).parent), *sys.path])
    read, write = os.pipe()
    os.close(read)  # as `| head` does once it has enough
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
        text=True,
        check=False,
        timeout=60,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "went on\n")


def test_an_exit_that_is_not_the_pipes_is_not_swallowed() -> None:
    from rich.console import Console

    class Leaving(io.StringIO):
        def write(self, text: str) -> int:
            raise SystemExit(75)

    with pytest.raises(SystemExit):
        Terminal(Console(file=Leaving(), force_terminal=False)).write(runs.start())


def test_force_color_puts_no_codes_into_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal = Terminal()
    for record in runs.healthy():
        terminal.write(record)
    terminal.close()
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.endswith("trained; all gates passed; exit 0\n")


def test_quiet_is_quiet(capsys: pytest.CaptureFixture) -> None:
    quiet = Quiet()
    for record in runs.healthy():
        quiet.write(record)
    quiet.compiling("the step", 3.0)
    quiet.compiled(3.0)
    quiet.busy("evaluating")
    quiet.progress(1, 2, {})
    quiet.close()
    assert capsys.readouterr() == ("", "")


def test_an_estimate_is_not_shown_as_the_kl() -> None:
    """Where the reference is not in the step there is no KL of it, and its place stays empty."""
    line = LiveLine(Clock())
    line.move(1, 10, {"loss": 0.5, "kl_estimate": -0.25})
    assert not any("KL" in text or "0.25" in text for _, text in line.pieces())
    exact = LiveLine(Clock())
    exact.move(1, 10, {"loss": 0.5, "kl_divergence": 0.25})
    assert dict(exact.pieces())["kl"] == "KL 0.250"


@pytest.mark.parametrize("tty", [False, True])
def test_an_evaluation_that_sampled_says_so(tty: bool) -> None:
    text = _CODES.sub("", show(runs.in_detail(runs.healthy()), tty=tty)).replace("\r", "\n")
    value = r"0\.1261 ± 0\.0097"
    assert re.search(
        rf"\n +24 .* 0\.0970 +{value}\n" if tty else rf"\nstep 24 .*  KL 0\.0970  on policy {value}\n", text
    )
