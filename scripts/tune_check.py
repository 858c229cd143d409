"""Are the rates that `jax-dpo tune` proposes right? Tunes and then trains a tiny model on pairs of several kinds.

Prints the table of docs/tune.md.

python scripts/tune_check.py [NAME ...]        about 5 minutes for all on 2 cores
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "run"))

import tiny

TIMES = (1.0, 1.5, 2.5)  # the proposed rate, at which the planned run is made


class Kind(NamedTuple):
    """`exchanged` is the share of pairs with their answers the wrong way round."""

    words: str
    steps: int
    exchanged: float
    rows: int
    options: dict[str, Any] = {}  # noqa: RUF012
    trial_steps: int = 30


LORA = {"use_peft": True, "lora_r": 8, "learning_rate": 1e-5}
KINDS = {
    "clean": Kind("every pair right", 200, 0.0, 800),
    "clean-long": Kind("every pair right", 1000, 0.0, 4000),
    "noisy": Kind("35 % of the pairs wrong", 200, 0.35, 800),
    "noisy-long": Kind("40 % of the pairs wrong", 1000, 0.4, 4000),
    "epochs": Kind("35 % wrong, every pair seen 20 times", 400, 0.35, 160),
    "whole": Kind("20 % wrong, trials of the whole run", 24, 0.2, 800),
    "penalty": Kind("20 % wrong, kl_coef 1 per sequence", 200, 0.2, 800, {"kl_coef": 1.0, "kl_reduction": "sequence"}),
    "ipo": Kind("20 % wrong, IPO", 200, 0.2, 800, {"loss_type": "ipo"}),
    "lora": Kind("20 % wrong, LoRA", 200, 0.2, 800, LORA),
    "lora-long": Kind("20 % wrong, LoRA", 800, 0.2, 4000, LORA),
    "adafactor": Kind("20 % wrong, Adafactor", 200, 0.2, 800, {"optim": "adafactor"}),
    "lion": Kind("20 % wrong, Lion", 200, 0.2, 800, {"optim": "lion_32bit"}),
    "sgd": Kind("20 % wrong, SGD", 200, 0.2, 800, {"optim": "sgd", "learning_rate": 1e-3}),
}


def rows(count: int, seed: int, exchanged: float) -> list[dict[str, Any]]:
    random, made = np.random.default_rng(seed), tiny.text_rows(count, seed)
    for row in made:
        if random.random() < exchanged:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return made


def called(*argv: Any) -> None:
    ended = tiny.jax_dpo(*argv)
    if ended.code not in (0, 3):
        sys.exit(ended.err)


def line(kind: Kind, model: Path, folder: Path) -> str:
    """One row of the table: what was expected and what came, at the proposed rate and above it."""
    folder.mkdir()
    options = {
        "model_name_or_path": model,
        "dataset_name": tiny.write_rows(folder / "train.jsonl", rows(kind.rows, 1, kind.exchanged)),
        "eval_dataset": tiny.write_rows(folder / "held-out.jsonl", rows(128, 2, kind.exchanged)),
        "max_steps": kind.steps,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "gradient_checkpointing": False,
        "learning_rate": 1e-6,
        **kind.options,
    }
    called("tune", *tiny.flags({**options, "output_dir": folder}), "--trial_steps", kind.trial_steps)
    found = json.loads((folder / "tune.json").read_text())["proposal"]
    ends = []
    for times in TIMES:
        out = folder / f"{times}"
        given = {**options, "output_dir": out, "learning_rate": times * found["learning_rate"], "beta": found["beta"]}
        at_end = {
            "eval_strategy": "steps",
            "eval_steps": kind.steps,
            "logging_steps": kind.steps,
            "save_strategy": "no",
        }
        called("train", *tiny.flags({**given, **at_end}))
        ends.append(f"{tiny.records(out, 'eval')[-1]['eval_kl_divergence']:.3f}")
    rate, likely = (f"{found[name]:.2g}".replace("e-0", "e-") for name in ("learning_rate", "likely_rate"))
    return f"| {kind.words} | {kind.steps} | {rate} | {likely} | {found['kl']:.3f} | {' | '.join(ends)} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("JAX_DPO_CACHE", f"{scratch}/cache")
        model = tiny.make_model(Path(scratch) / "model")
        for name in sys.argv[1:] or KINDS:
            print(line(KINDS[name], model, Path(scratch) / name), flush=True)


if __name__ == "__main__":
    main()
