"""The study behind docs/kl-control.md: the demo's model and pairs at learning rates up to thirty times too high, held in several ways.

    make demo                                   # once: makes the model and the pairs
    .venv/bin/python scripts/kl_study.py        # about three hours on 2 cores; begun again, it goes on where it was

Each run is a `jax-dpo train` of its own in outputs/kl_study; of what it writes, run.jsonl and verdict.json are kept. `--page` writes
docs/kl-study.md and docs/kl-study.svg out of the runs that are there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.kl_study_page import ended, picture, table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "kl_study"
CONFIG = "configs/demo.yaml"
KEPT = ("run.jsonl", "verdict.json")

LOWEST, FACTOR = 5e-6, 30.0  # the rate that just reaches the bound, and how far above it the highest is
RATES = tuple(float(f"{LOWEST * FACTOR ** (i / 4):.2g}") for i in range(5))
BETA, OTHER_BETA = 0.1, 0.3
SEEDS = (42, 1, 2)

COMMON: dict[str, Any] = {
    "kl_coef": 0,
    "kl_actions": [],
    "eval_on_start": False,
    "eval_steps": 6,
    "save_steps": 6,
    "save_total_limit": 1,
    "generate_samples": 0,
    "report_to": "none",
}
ACTIONS: dict[str, Any] = {"kl_actions": ["halve_lr", "raise_beta", "rollback"]}
REGION: dict[str, Any] = {"kl_trust_region": True}
SAMPLED: dict[str, Any] = {"eval_on_policy_prompts": 64, "eval_on_policy_tokens": 40}
CONTROLS: dict[str, dict[str, Any]] = {
    "off": SAMPLED | {"eval_on_start": True},
    "actions": ACTIONS,
    "trust_region": REGION | SAMPLED,
}
"""what is switched on, by the name of the control; each is run at every rate"""

PENALTIES: dict[str, dict[str, Any]] = {
    "penalty_token_1": {"kl_coef": 1.0, "kl_reduction": "token"},
    "penalty_token_100": {"kl_coef": 100.0, "kl_reduction": "token"},
    "penalty_sequence_0.3": {"kl_coef": 0.3, "kl_reduction": "sequence"},
    "penalty_sequence_1": {"kl_coef": 1.0, "kl_reduction": "sequence"},
}
"""the penalty alone, at a rate that breaks the bound without it"""

HEAD = """# The study: learning rates up to thirty times too high

<!-- Made by `scripts/kl_study.py --page`. Do not edit. -->

    make demo
    .venv/bin/python scripts/kl_study.py         # trains, about three hours on 2 cores; goes on where it was
    .venv/bin/python scripts/kl_study.py --page  # this page

The demo's model (SmolLM2-135M-Instruct) and pairs, and its configuration (`configs/demo.yaml`: 24 steps of 8 pairs, cosine, beta 0.1,
float32) but for what is said. Evaluated every 6 steps on {pairs} pairs that are never trained on. Learning rates: {rates}; the
lowest is the one that just reaches the bound of 0.1 nats per token. *KL at the end* is that of the last evaluation, bold where it is over
the bound, *highest* that of all that were not rolled back; accuracies have their standard error.

![KL at the end and held-out accuracy over the learning rate](kl-study.svg)

"""


@dataclass(frozen=True)
class Run:
    """One training: a control at a rate, a beta and a seed."""

    control: str
    rate: float
    beta: float = BETA
    seed: int = SEEDS[0]
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        return f"{self.control}-lr{self.rate:g}-beta{self.beta:g}-seed{self.seed}"

    def command(self, folder: Path) -> list[str]:
        given = {**COMMON, **self.options, "learning_rate": self.rate, "beta": self.beta, "seed": self.seed}
        given |= {"output_dir": folder / self.name, "resume_from_checkpoint": "auto"}
        words: list[str] = []
        for name, value in given.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(v) for v in values or ["none"])]
        return [sys.executable, "-m", "jax_dpo", "train", CONFIG, *words]


def all_runs() -> list[Run]:
    """In the order of what they say most about."""
    every = [Run(control, rate, options=options) for control, options in CONTROLS.items() for rate in RATES]
    every += [Run(control, RATES[2], options=options) for control, options in PENALTIES.items()]
    claims = [c for c in CONTROLS if c != "actions"]
    again = itertools.product(claims, (RATES[0], RATES[2], RATES[4]))
    every += [Run(c, rate, OTHER_BETA, options=CONTROLS[c]) for c, rate in again]
    seeds = itertools.product(claims, (RATES[0], RATES[4]), SEEDS[1:])
    return every + [Run(c, rate, seed=seed, options=CONTROLS[c]) for c, rate, seed in seeds]


def done(folder: Path, run: Run) -> bool:
    return (folder / run.name / "verdict.json").exists()


def train(folder: Path, run: Run) -> None:
    """Trains, or goes on with it, and keeps what is asked later.

    Raises:
      SystemExit: the run did not end as a run ends.
    """
    out = folder / run.name
    out.parent.mkdir(parents=True, exist_ok=True)
    with (folder / f"{run.name}.log").open("a", encoding="utf-8") as log:
        ended = subprocess.run(run.command(folder), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    if ended.returncode not in (0, 3):
        raise SystemExit(f"{run.name} ended with {ended.returncode}; see {folder / run.name}.log")
    for path in out.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def records(folder: Path, run: Run) -> Iterator[dict[str, Any]]:
    with (folder / run.name / "run.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def write_page(folder: Path, runs: Sequence[Run]) -> None:
    """docs/kl-study.md and its picture."""
    found = [ended(r.control, r.rate, r.beta, r.seed, records(folder, r)) for r in runs]
    main_runs = [e for e in found if (e.beta, e.seed) == (BETA, SEEDS[0]) and e.control in CONTROLS]
    rest = [e for e in found if e not in main_runs]
    text = HEAD.format(rates=", ".join(f"{r:g}" for r in RATES), pairs=main_runs[0].pairs)
    text += table(main_runs) + "\n"
    if penalties := [e for e in rest if e.control in PENALTIES]:
        text += f"\n## The penalty alone\n\n{table(penalties)}\n"
    if more := [e for e in rest if e.control not in PENALTIES]:
        text += f"\n## Another beta, other seeds\n\n{table(more, seeds=True)}\n"
    (ROOT / "docs" / "kl-study.md").write_text(text, encoding="utf-8")
    (ROOT / "docs" / "kl-study.svg").write_text(picture(main_runs), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="runs whose name contains this (may be repeated)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the runs lie (outputs/kl_study)")
    parser.add_argument(
        "--page", action="store_true", help="train nothing; write the page out of the runs that are done"
    )
    parser.add_argument("--list", action="store_true", help="only name the runs, and which are done")
    options = parser.parse_args(argv)
    runs = [run for run in all_runs() if not options.only or any(o in run.name for o in options.only)]
    if options.list:
        for run in runs:
            print("done" if done(options.folder, run) else "    ", run.name)
        return 0
    if options.page:
        write_page(options.folder, [run for run in runs if done(options.folder, run)])
        return 0
    for i, run in enumerate(runs, start=1):
        if not done(options.folder, run):
            began = time.monotonic()
            train(options.folder, run)
            last = [r for r in records(options.folder, run) if r["kind"] == "eval"][-1]
            print(
                f"{i}/{len(runs)} {run.name}: KL {last['eval_kl_divergence']:.4f}, margin {last['eval_rewards/margins']:+.4f}, "
                f"accuracy {last['eval_rewards/accuracies']:.1%}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
