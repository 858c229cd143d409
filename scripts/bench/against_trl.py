"""This trainer and TRL 1.16 on the same model and pairs, one after the other on a CPU: pairs a second, peak memory.

    .venv/bin/python scripts/bench/against_trl.py --steps 20

Each side runs in a process of its own, with its public DPOTrainer: float32, 4 pairs a step, max_length 512, no gradient
checkpointing, the same seed and therefore the same pairs in the same steps. Steps at the start are not timed
(compilation, warm caches). The rate of plain float32 matrix products is measured before each side: a busy machine shows
there. TRL needs an environment of its own:

    python -m venv .venv-parity
    .venv-parity/bin/pip install torch==2.13.0 trl==1.16.0 peft==0.21.2
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import workload

ROOT = Path(__file__).resolve().parents[2]
PAIRS_PER_STEP = 4
MATMUL = (2048, 512, 1536)
Measured = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both sides and prints the comparison; with --side, runs that one in this process. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each side (20)")
    parser.add_argument("--skip", type=int, default=4, help="steps at the start that are not timed (4)")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "bench", help="workload and results")
    parser.add_argument("--ours", type=Path, default=Path(sys.executable), help="Python with jax_dpo (this one)")
    parser.add_argument("--theirs", type=Path, default=ROOT / ".venv-parity" / "bin" / "python", help="Python with TRL")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not 0 < options.skip < options.steps:
        parser.error(f"--skip must lie between 1 and --steps - 1, found {options.skip} of {options.steps}")
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
        return 0
    # So that a stopped comparison stops its side, too: subprocess.run ends the child when an exception passes.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if not options.theirs.is_file():
        parser.error(
            f"no TRL environment: {options.theirs} is missing. Make it with the last line of --help, or name one"
        )
    work = workload.make(options.folder / "workload")
    results = {}
    for side, python in (("ours", options.ours), ("trl", options.theirs)):
        rate = child("matmul", options.ours, options)["gflops"]
        print(f"{side}: {options.steps} steps; float32 matmul {rate:.0f} GFLOP/s just before", flush=True)
        results[side] = child(side, python, options) | {"matmul_gflops": rate}
    print(table(results, workload.pair_gflop(work.lengths), options))
    (options.folder / "against_trl.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def child(side: str, python: Path, options: argparse.Namespace) -> Measured:
    """One side in a process of its own; the last line that it prints is its result."""
    command = [str(python), str(Path(__file__).resolve()), "--side", side, "--folder", str(options.folder)]
    command += ["--steps", str(options.steps), "--skip", str(options.skip)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"the side '{side}' ended with exit code {result.returncode}; its messages are above")
    return json.loads(result.stdout.splitlines()[-1])


def run_ours(options: argparse.Namespace) -> Measured:
    """`jax_dpo.DPOTrainer`, timed by its own run.jsonl."""
    from transformers import AutoTokenizer

    from jax_dpo import DPOConfig, DPOTrainer

    work = workload.make(options.folder / "workload")
    args = DPOConfig(**arguments(options, "ours"))
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    trainer = DPOTrainer(model=str(work.model), args=args, train_dataset=rows(work), processing_class=tokenizer)
    trainer.train()
    text = (Path(args.output_dir) / "run.jsonl").read_text(encoding="utf-8")
    steps = [record for record in map(json.loads, text.splitlines()) if record["kind"] == "train"]
    fill = sum(record["row_fill"] for record in steps) / len(steps)
    return measured([r["time"] for r in steps], [r["loss"] for r in steps], options) | {"row_fill": fill}


def run_trl(options: argparse.Namespace) -> Measured:
    """`trl.DPOTrainer`, timed by a callback."""
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.time())

    work = workload.make(options.folder / "workload")
    args = DPOConfig(**arguments(options, "trl"), use_cpu=True, disable_tqdm=True)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    trainer = DPOTrainer(
        model=str(work.model), args=args, train_dataset=rows(work), processing_class=tokenizer, callbacks=[Clock()]
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return measured(ends, losses, options)


def arguments(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """The options that both sides get, word for word."""
    output = options.folder / "runs" / side
    shutil.rmtree(output, ignore_errors=True)
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": PAIRS_PER_STEP,
        "max_steps": options.steps,
        "max_length": workload.MAX_LENGTH,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def rows(work: workload.Workload) -> Any:
    import datasets

    return datasets.Dataset.from_list([json.loads(line) for line in work.pairs.read_text("utf-8").splitlines()])


def measured(ends: Sequence[float], losses: Sequence[float], options: argparse.Namespace) -> Measured:
    """`ends` are the times at which the steps ended, one a step. Peak memory is this process's resident set."""
    if len(ends) != options.steps:
        raise SystemExit(f"{len(ends)} steps were run, {options.steps} were asked for")
    timed = options.steps - options.skip
    seconds = ends[-1] - ends[options.skip - 1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"pairs_per_second": timed * PAIRS_PER_STEP / seconds, "peak_bytes": peak, "losses": list(losses)}


def run_matmul(options: argparse.Namespace) -> Measured:
    """GFLOP/s of float32 matrix products in a row, best of seven."""
    import jax
    import jax.numpy as jnp

    rows_, inner, columns = MATMUL
    repeats = 16
    left = jnp.full((rows_, inner), 1e-3, jnp.float32)
    right = jnp.full((inner, columns), 1e-3, jnp.float32)

    @jax.jit
    def chain(x: jax.Array) -> jax.Array:
        for _ in range(repeats):
            x = (x @ right) @ right.T
        return x

    chain(left).block_until_ready()
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        chain(left).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return {"gflops": repeats * 2 * 2 * rows_ * inner * columns / best / 1e9}


def table(results: dict[str, Measured], gflop: float, options: argparse.Namespace) -> str:
    """The comparison as Markdown."""
    ours, theirs = results["ours"], results["trl"]
    lines = [
        "| | pairs/s | peak resident | share of the matmul rate | last loss |",
        "|---|---|---|---|---|",
    ]
    for name, side in (("jax_dpo", ours), ("TRL 1.16.0", theirs)):
        share = side["pairs_per_second"] * gflop / side["matmul_gflops"]
        lines.append(
            f"| {name} | {side['pairs_per_second']:.3f} | {side['peak_bytes'] / 2**30:.2f} GiB | {share:.0%} of "
            f"{side['matmul_gflops']:.0f} GFLOP/s | {side['losses'][-1]:.4f} |"
        )
    speed = ours["pairs_per_second"] / theirs["pairs_per_second"]
    memory = ours["peak_bytes"] / theirs["peak_bytes"]
    lines.append(f"| ratio | {speed:.2f} | {memory:.2f} | | |")
    lines.append(
        f"\n{gflop:.0f} GFLOP a pair, row fill {ours['row_fill']:.2f}, {PAIRS_PER_STEP} pairs a step, "
        f"steps {options.skip + 1} to {options.steps}, {os.cpu_count()} cores"
    )
    return "\n".join(lines)


SIDES = {"ours": run_ours, "trl": run_trl, "matmul": run_matmul}

if __name__ == "__main__":
    raise SystemExit(main())
