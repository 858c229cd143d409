"""What `jax-dpo tune` shows: a line for each trial as it ends, then the proposal in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_dpo.report import format as fmt
from jax_dpo.report.terminal import Terminal

_WIDTHS = (13, 8, 7, 10, 9, 9, 8, 10)
FAR = 10.0  # times the bound: what is beyond is no number that trials near the bound could tell
_HEAD = ("learning rate", "beta", "steps", "KL", "accuracy", "margin", "loss", "gradient")


class TuneScreen(Terminal):
    """Shows trials on the terminal; where lines can be redrawn, also what is being done."""

    _heads = 0

    def trial(self, trial: Mapping[str, Any]) -> None:
        """One line; the head stands before the first."""
        if not self._heads:
            self._say("".join(f"{name:>{width}}" for name, width in zip(_HEAD, _WIDTHS)))
        self._heads += 1
        cells = (
            fmt.power(trial["learning_rate"]),
            f"{trial['beta']:g}",
            str(trial["steps"]),
            fmt.number(trial["kl"]),
            fmt.number(trial["accuracy"], 3),
            fmt.signed(trial["logratio_margin"], 2),
            fmt.number(trial["loss"], 3),
            fmt.number(trial["grad_norm"], 2),
        )
        line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS))
        self._say(line + (f"  {trial['trouble']}" if trial["trouble"] else ""))

    def result(self, report: Mapping[str, Any], command: str) -> None:
        """What is proposed and how sure that is."""
        self.close()
        self._say("")
        for line in sentences(report):
            self._say(line)
        self._say("")
        self._print(self._text(f"  {command}"), soft_wrap=True)  # one line, to be copied

    def wrote(self, path: Path) -> None:
        self._say("")
        self._say(f"{path}: the trials and the proposal")

    def close(self) -> None:
        self._end_line()


def sentences(report: Mapping[str, Any]) -> list[str]:
    """The proposal, what it rests on, and what it does not know."""
    p, ends, total = report["proposal"], report["ends"], report["planned_steps"]
    found = [
        f"Learning rate {fmt.power(p['learning_rate'])}, beta {p['beta']:g}. After the planned {total:,} steps the held-out KL is expected "
        f"at {fmt.number(p['kl'], 3)} nats per token (target_kl {report['target_kl']:g}, aimed at {report['aim']:.3g})."
    ]
    others = [
        f"at {words} ({fmt.power(ends[name]['learning_rate'])}) {_end(ends[name]['kl'], report['target_kl'])}"
        for name, words in (("configured", "the configured rate"), ("doubled", "twice the proposed one"))
        if name in ends
    ]
    found.append(f"The same run would end {', '.join(others)}.")
    found += [_certainty(report), f"Beta: {p['why_beta']}."]
    return found + [f"Note: {note}" for note in report["notes"]]


def _end(kl: float, target: float) -> str:
    return f"at {fmt.number(kl)}" if kl <= FAR * target else "far above the bound"


def _certainty(report: Mapping[str, Any]) -> str:
    law, trials, steps, total = report["law"], len(report["trials"]), report["trial_steps"], report["planned_steps"]
    if steps >= total:
        text = f"How sure: each of the {trials} trials is the whole planned run, so only what lies between their rates is a guess."
    else:
        low, high = report["proposal"]["learning_rate"], report["proposal"]["likely_rate"]
        text = (
            f"How sure: {trials} trials of {steps} steps at higher rates stand for {total:,} steps, as if every step went the same way. "
            "They know nothing of what comes later: pairs that are seen again, a loss that turns."
        )
        if high > 1.3 * low:
            text += f" Part of the steps undo each other, by which the aim may be reached only at {fmt.power(high)}."
    if law["noise"] > 0.25:
        text += (
            f" They lie {100 * law['noise']:.0f} % off the law that was fitted to them, so this is an order of magnitude; more steps a "
            "trial (--trial_steps) or more held-out pairs (--trial_pairs) help."
        )
    return text
