"""docs/parity.md out of what was compared. It has no date and no time, and differences to one digit: the same run, the same page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from scripts.parity.results import Result

PACKAGES = ("trl", "transformers", "peft", "torch", "jax")

HEAD = """# Equal to TRL: the figures

<!-- Made by `make parity` (scripts/parity). Do not edit. -->

`make parity` runs {names} side by side, each through its public surface, on models, tokenizers and texts that it makes up itself. It
compares the numbers of both and writes this page; it fails where something is further off than the tolerance. No network is needed once
`.venv-parity` is installed.

    make parity                                      # this page
    make parity PARITY_ARGS="--seed 7 --no-page"     # other models, other texts
    make parity PARITY_ARGS="--only lora --no-page"  # cases whose name contains it

Versions: {versions}. Everything is float32 on a CPU; torch runs on one thread. Seed {seed}.

How to read the tables:

- *difference* is the worst over all numbers of the quantity: every logged step, every evaluation, every element of every tensor.
- *TRL from itself* is the same difference between two runs of TRL, the second with eager attention and torch's unfused AdamW. What lies
  in that order is float32's rounding and nobody's fault.
- *tolerance* is about ten times what TRL in float32, TRL with another attention, and TRL in float64 part by. It is never raised to let
  something pass.
- Gradients of this trainer are read from its own weights: one step of Adam with an epsilon of 1e12 and a rate of 1024e12 moves a weight
  by -1024 g. Those of TRL are torch's.
- TRL has no KL. `kl_divergence` is held against full logits of both models in torch, in float64.

## Summary

{summary}
"""

REPLAY = """
## TRL's own recorded run

TRL keeps one recorded run in its repository (`huggingface/trl/tests/invariant/references/dpo.json`): Qwen2.5-0.5B-Instruct on
UltraFeedback, 50 steps of 8 pairs in float32, loss and gradient norm of each step. Whoever has access to the Hub can replay it; it needs
about 12 GB of memory:

    .venv-parity/bin/python scripts/parity/replay_trl.py

It trains by [configs/trl_invariant.yaml](../configs/trl_invariant.yaml), compares every step with the recorded numbers
(`scripts/parity/trl_invariant.json`, with their source), and prints the worst and the mean difference beside the bounds that TRL sets
itself: 1e-4 and 1e-5 for the loss, 1e-2 and 1e-3 for the gradient norm. Model and data can be given as local directories
(`--model`, `--data`). This run has not been made here: there was no access to the Hub. The recipe is tested on a small stand-in.
"""


def page(results: Sequence[Result], seed: int, *, replay: bool = True) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in PACKAGES)
    names = f"jax_dpo and TRL {version('trl')}"
    areas = list(dict.fromkeys(r.case.area for r in results))
    parts = [HEAD.format(names=names, versions=versions, seed=seed, summary=_summary(results))]
    for area in areas:
        parts.append(f"## {area}\n\n{_cases([r for r in results if r.case.area == area])}\n")
    return "\n".join(parts) + (REPLAY if replay else "")


def rounded(x: float) -> str:
    """One digit, rounded up: 0, 3e-6, or a word for what cannot be."""
    if x == 0:
        return "0"
    if not math.isfinite(x):
        return "none to compare"
    power = math.floor(math.log10(x))
    digit = math.ceil(round(x / 10.0**power, 6))
    return f"{digit}e{power}" if digit < 10 else f"1e{power + 1}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _summary(results: Sequence[Result]) -> str:
    """One row for each area and quantity: the worst of all its cases."""
    worst: dict[tuple[str, str, str, float], list] = {}
    for result in results:
        for m in result.measures:
            worst.setdefault((result.case.area, m.quantity, m.how, m.limit), []).append((m, result))
    rows = []
    for (area, quantity, how, limit), found in worst.items():
        at, result = max(found, key=lambda pair: pair[0].share)
        values = sum(m.values for m, _ in found)
        itself = max(r.itself.get(quantity, 0.0) for _, r in found)
        held = "yes" if all(m.holds for m, _ in found) else "**NO**"
        cells = [
            area,
            quantity,
            f"{len(found)}",
            f"{values:,}",
            how,
            rounded(at.difference),
            rounded(itself),
            rounded(limit),
            held,
        ]
        rows.append(cells)
    head = (
        "area",
        "quantity",
        "cases",
        "numbers",
        "difference is",
        "difference",
        "TRL from itself",
        "tolerance",
        "holds",
    )
    return _table(head, rows)


def _cases(results: Sequence[Result]) -> str:
    """One row for each case, with the quantity that comes nearest to its tolerance."""
    rows = []
    for result in results:
        if not result.measures:
            rows.append([_escaped(result.case.name), "", "", "", "", "", f"**NO**: {_escaped(result.failure)}"])
            continue
        m = max(result.measures, key=lambda m: m.share)
        values = sum(m.values for m in result.measures)
        cells = [m.quantity, rounded(m.difference), rounded(result.itself.get(m.quantity, 0.0)), rounded(m.limit)]
        rows.append([_escaped(result.case.name), f"{values:,}", *cells, "yes" if result.holds else "**NO**"])
    head = ("case", "numbers", "nearest to its tolerance", "difference", "TRL from itself", "tolerance", "holds")
    return _table(head, rows)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
