"""The study behind docs/kl-control.md: the demo's model and pairs at learning rates up to thirty times too high, held in several ways.

    make demo                                   # once: makes the model and the pairs
    .venv/bin/python scripts/kl_study.py        # four to five hours on 2 cores; begun again, it goes on where it was

Each run is a `jax-dpo train` of its own in outputs/kl_study; of what it writes, run.jsonl and verdict.json are kept. What it came to is a
line of docs/kl-study.jsonl, and a run that has one is done. `--page` writes docs/kl-study.md and its pictures out of these lines.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.demo.judge import load_judge
from scripts.kl_study_page import Ended, Point, ended, picture, rate_text, reward_picture, table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "kl_study"
RESULTS = ROOT / "docs" / "kl-study.jsonl"
WHEEL = ROOT / "demo" / "downloads" / "vaderSentiment-3.3.2-py2.py3-none-any.whl"
CONFIG = "configs/demo.yaml"
KEPT = ("run.jsonl", "verdict.json")

LOWEST, FACTOR = 5e-6, 30.0  # the rate that just reaches the bound, and how far above it the highest is
RATES = tuple(float(f"{LOWEST * FACTOR ** (i / 4):.2g}") for i in range(5))
BETA, OTHER_BETAS = 0.1, (0.3, 0.03)
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
SAMPLED: dict[str, Any] = {"eval_on_policy_prompts": 128, "eval_on_policy_tokens": 40}
"""at one rate, where the KL goes far without control: for the picture of reward over KL, whose first point is one run's start"""
PENALTY: dict[str, Any] = {"kl_coef": 1.0, "kl_reduction": "sequence"}
CONTROLS: dict[str, dict[str, Any]] = {
    "off": {},
    "actions": ACTIONS,
    "trust_region": REGION,
    "penalty_and_actions": PENALTY | ACTIONS,
}
"""what is switched on, by the name of the control (the last is that of configs/standard.yaml); each is run at every rate, but for the
actions at the lowest, where none is taken and the run is that without control"""

PENALTIES: dict[str, tuple[float, dict[str, Any]]] = {
    "penalty_token_1": (RATES[2], {"kl_coef": 1.0, "kl_reduction": "token"}),
    "penalty_token_100": (RATES[2], {"kl_coef": 100.0, "kl_reduction": "token"}),
    "penalty_sequence_0.3": (RATES[2], {"kl_coef": 0.3, "kl_reduction": "sequence"}),
    "penalty_sequence_1": (RATES[4], PENALTY),
}
"""the penalty: weights and reductions at a rate that breaks the bound, the strongest by itself at the highest"""

FREE = tuple(("off", beta) for beta in (BETA, *OTHER_BETAS))
PICTURED = (*FREE, ("trust_region", BETA), ("penalty_and_actions", BETA))
"""(control, beta) of the runs that sample answers; the first of them at its start too, which is that of all"""

HEAD = """# The study: learning rates up to thirty times too high

<!-- Made by `scripts/kl_study.py --page`. Do not edit. -->

    make demo
    .venv/bin/python scripts/kl_study.py         # trains, four to five hours on 2 cores; goes on where it was
    .venv/bin/python scripts/kl_study.py --page  # this page

The demo's model (SmolLM2-135M-Instruct) and pairs, and its configuration (`configs/demo.yaml`: 24 steps of 8 pairs, cosine, beta 0.1,
float32) but for what is said. Evaluated every 6 steps on {pairs} pairs that are never trained on. Learning rates: {rates};
the lowest is the one that just reaches the bound of 0.1 nats per token.
*KL at the end* is that of the last evaluation, bold where it is over the bound, *highest* that of all that were not rolled back;
accuracies have their standard error.

![KL at the end and held-out accuracy over the learning rate](kl-study.svg)

"""


REWARD = """
## Reward against KL

As in the DPO paper (Rafailov et al. 2023, figure 2): at each evaluation the policy gives 128 answers to held-out prompts (temperature 1, up
to 40 tokens), VADER, which never saw the training, scores the answers, and the exact KL along them is measured. The pairs prefer
criticism, so the reward is minus VADER's compound score (-1 to 1).

![Reward of sampled answers over the KL along them](kl-study-reward.svg)
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
        what = (self.control, self.beta)
        sampled = SAMPLED if self.rate == RATES[2] and what in PICTURED else {}
        start = {"eval_on_start": True} if sampled and what == PICTURED[0] else {}
        given = {
            **COMMON,
            **self.options,
            **sampled,
            **start,
            "learning_rate": self.rate,
            "beta": self.beta,
            "seed": self.seed,
        }
        given |= {"output_dir": folder / self.name, "resume_from_checkpoint": "auto"}
        words: list[str] = []
        for name, value in given.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(v) for v in values or ["none"])]
        return [sys.executable, "-m", "jax_dpo", "train", CONFIG, *words]


def all_runs() -> list[Run]:
    """In the order of what they say most about."""
    every = [Run(control, rate, options=options) for control, options in CONTROLS.items() for rate in RATES]
    every.remove(Run("actions", RATES[0]))
    every += [Run(control, rate, options=options) for control, (rate, options) in PENALTIES.items()]
    claims = (("off", RATES[0]), ("trust_region", RATES[4]))  # the best without control, and the hardest with it
    every += [Run(c, rate, seed=seed, options=CONTROLS[c]) for seed in SEEDS[1:] for c, rate in claims]
    betas = (("off", OTHER_BETAS[0]), ("off", OTHER_BETAS[1]), ("trust_region", OTHER_BETAS[0]))
    return every + [Run(c, RATES[2], beta, options=CONTROLS[c]) for c, beta in betas]


def results(path: Path) -> dict[str, Ended]:
    """What is done, by the names of the runs."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line.pop("name"): Ended(**{**line, "points": tuple(Point(*p) for p in line["points"])}) for line in lines}


def write_results(path: Path, found: dict[str, Ended]) -> None:
    order = {run.name: i for i, run in enumerate(all_runs())}
    names = sorted(found, key=lambda name: (order.get(name, len(order)), name))
    lines = [json.dumps({"name": name, **asdict(found[name])}) for name in names]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


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


def read(folder: Path, run: Run, score: Callable[[str], float]) -> Ended:
    """What a run that is through came to."""
    lines = (folder / run.name / "run.jsonl").read_text(encoding="utf-8").splitlines()
    return ended(run.control, run.rate, run.beta, run.seed, map(json.loads, lines), score)


def write_page(found: Sequence[Ended]) -> None:
    """docs/kl-study.md and its pictures."""
    main_runs = [e for e in found if (e.beta, e.seed) == (BETA, SEEDS[0]) and e.control in CONTROLS]
    rest = [e for e in found if e not in main_runs]
    text = HEAD.format(rates=", ".join(map(rate_text, RATES)), pairs=main_runs[0].pairs)
    text += table(main_runs) + "\n"
    if penalties := [e for e in rest if e.control in PENALTIES]:
        text += f"\n## The penalty\n\n{table(penalties)}\n"
    if more := [e for e in rest if e.control not in PENALTIES]:
        text += f"\n## Another beta, other seeds\n\n{table(more, seeds=True)}\n"
    docs = ROOT / "docs"
    (docs / "kl-study.svg").write_text(picture(main_runs), encoding="utf-8")
    if sampled := [e for e in found if len(e.points) > 1 and e.rate == RATES[2]]:
        (docs / "kl-study-reward.svg").write_text(reward_picture(sampled, RATES[2]), encoding="utf-8")
        text += REWARD
    (docs / "kl-study.md").write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], help="runs whose name begins with this (may be repeated)"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the runs lie (outputs/kl_study)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what they came to (docs/kl-study.jsonl)")
    parser.add_argument(
        "--page", action="store_true", help="train nothing; write the page out of the runs that are done"
    )
    parser.add_argument("--list", action="store_true", help="only name the runs, and which are done")
    options = parser.parse_args(argv)
    runs = [run for run in all_runs() if not options.only or any(run.name.startswith(o) for o in options.only)]
    done = results(options.results)
    if options.list:
        for run in runs:
            print("done" if run.name in done else "    ", run.name)
        return 0
    if options.page:
        write_page([done[run.name] for run in all_runs() if run.name in done])
        return 0
    score = load_judge(WHEEL)
    for i, run in enumerate(runs, start=1):
        if run.name not in done:
            began = time.monotonic()
            if not (options.folder / run.name / "verdict.json").exists():
                train(options.folder, run)
            found = read(options.folder, run, score)
            write_results(options.results, results(options.results) | {run.name: found})
            print(
                f"{i}/{len(runs)} {run.name}: KL {found.kl:.4f}, margin {found.margin:+.4f}, accuracy {found.accuracy:.1%}, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
