"""Replays the run that TRL keeps in its repository, and compares loss and gradient norm of each step with the recorded ones.

    .venv/bin/python scripts/parity/replay_trl.py
    .venv/bin/python scripts/parity/replay_trl.py --model DIR --data pairs.jsonl

It trains by configs/trl_invariant.yaml with `jax-dpo train`. Model and data come from the Hub, unless they are given. What follows
after `--` goes to `jax-dpo train`. Exit code: 0 within TRL's own bounds, 1 not, 2 model or data cannot be had.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "trl_invariant.yaml"
RECORDED = Path(__file__).with_name("trl_invariant.json")
PAIRS = 8  # of a step
GATE_FAILED = 3  # jax-dpo trained, but a gate of its own failed: no matter here


@dataclass(frozen=True)
class Distance:
    """Of one metric: the worst difference, the step where it is, and the mean of all differences with their signs."""

    metric: str
    worst: float
    at: int
    mean: float

    def within(self, bounds: dict[str, float]) -> bool:
        return self.worst <= bounds["worst"] and abs(self.mean) <= bounds["mean"]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, compares, prints. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory in place of the Hub's model")
    parser.add_argument("--data", help="a file or directory in place of the Hub's data set")
    parser.add_argument("--recorded", type=Path, default=RECORDED, help="the numbers to compare with")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "outputs" / "trl_invariant", help="where the run is written"
    )
    parser.add_argument("more", nargs="*", metavar="-- OPTION VALUE", help="options of jax-dpo train")
    options = parser.parse_args(argv)
    recorded = json.loads(options.recorded.read_text(encoding="utf-8"))
    code = train(options, steps=len(recorded["loss"]))
    if code not in (0, GATE_FAILED):
        if code == 2 and not (options.model and options.data):
            print(
                "The recorded run needs model and data from the Hub. Without it, name both: --model DIR --data FILE",
                file=sys.stderr,
            )
        return code
    log = [json.loads(line) for line in (options.output / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    return judge([entry for entry in log if entry["kind"] == "train"], recorded)


def judge(log: Sequence[dict[str, Any]], recorded: dict[str, Any]) -> int:
    """Prints how far the log is from the recorded run; 0 if within TRL's bounds, else 1."""
    distances = compare(log, recorded)
    print(table(distances, recorded["bounds"]))
    held = all(d.within(recorded["bounds"][d.metric]) for d in distances)
    print("the recorded run, within TRL's own bounds" if held else "NOT the recorded run: see above")
    return 0 if held else 1


def train(options: argparse.Namespace, steps: int) -> int:
    """`jax-dpo train`, from the start; its exit code."""
    import jax

    from jax_dpo.cli import main as jax_dpo

    devices = jax.device_count()
    if PAIRS % devices:
        print(f"{devices} devices cannot share {PAIRS} pairs evenly: use 1, 2, 4 or 8", file=sys.stderr)
        return 2
    words = ["train", str(CONFIG), "--output_dir", str(options.output), "--overwrite_output_dir", "true"]
    words += ["--max_steps", str(steps)]
    words += ["--per_device_train_batch_size", str(PAIRS // devices)]
    words += ["--model_name_or_path", options.model] if options.model else []
    words += ["--dataset_name", options.data] if options.data else []
    return jax_dpo([*words, *options.more])


def compare(log: Sequence[dict[str, Any]], recorded: dict[str, Any]) -> list[Distance]:
    """Loss and gradient norm of each step against the recorded ones."""
    found = []
    for metric in recorded["bounds"]:
        ours, theirs = [entry[metric] for entry in log], recorded[metric]
        if len(ours) != len(theirs):
            raise SystemExit(f"{len(ours)} steps were logged, {len(theirs)} are recorded")
        differences = [a - b for a, b in zip(ours, theirs)]
        sizes = [abs(d) for d in differences]
        worst = max(sizes)
        found.append(Distance(metric, worst, sizes.index(worst) + 1, sum(differences) / len(differences)))
    return found


def table(distances: Sequence[Distance], bounds: dict[str, dict[str, float]]) -> str:
    """The comparison, one line a metric."""
    lines = [f"{'':10} {'worst':>10} {'bound':>8} {'at step':>8} {'mean':>11} {'bound':>8}"]
    for d in distances:
        bound = bounds[d.metric]
        lines.append(
            f"{d.metric:10} {d.worst:10.2e} {bound['worst']:8.0e} {d.at:8} {d.mean:+11.2e} {bound['mean']:8.0e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
