"""What `precompute_ref_log_probs` saves: the step with the reference in it and without, alternately, on the same pairs.

    .venv/bin/python scripts/bench/precomputed.py --steps 6

Time of a step (the median; the first of each side is not counted), and what the compiler counts as its memory: arguments (weights, moments,
reference, batch) and temporaries. The pass that makes the log-probabilities is timed, too: it is paid once for all epochs and later runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import workload

ROOT = Path(__file__).resolve().parents[2]


def _side(work: workload.Workload, folder: Path, before: bool, checkpointing: bool) -> dict[str, Any]:
    """Everything of one side: the compiled step and what it is called with."""
    import jax
    import jax.numpy as jnp

    from jax_dpo import DPOConfig, DPOTrainer
    from jax_dpo.plan.lowered import memory_of
    from jax_dpo.train.state import Knobs

    args = DPOConfig(
        str(folder / "out"),
        max_length=workload.MAX_LENGTH,
        per_device_train_batch_size=4,
        bf16=False,
        gradient_checkpointing=checkpointing,
        precompute_ref_log_probs=before,
        dataset_cache_dir=str(folder / "cache"),
    )
    trainer = DPOTrainer(str(work.model), args=args, train_dataset=str(work.pairs))
    engine, began = trainer.engine, time.perf_counter()
    rows = trainer.train_dataset
    passed = time.perf_counter() - began
    state = engine.fresh_state()
    frozen, knobs = engine.frozen(state), Knobs(*(jnp.float32(x) for x in (1e-6, 0.1, 0.0)))
    batch = engine.batch_at(trainer.plan.after(0))
    call = (engine.to_devices(batch), jnp.int32(batch.micro_batches), knobs, jax.random.key(0))
    compiled: Any = engine.step.lower(state, frozen, *call).compile()  # type: ignore[attr-defined]
    need = memory_of(compiled)
    return {
        "trainer": trainer,
        "pairs": len(rows),
        "pass": passed,
        "state": state,
        "frozen": frozen,
        "knobs": knobs,
        "step": compiled,
        "memory": need,
        "times": [],
    }


def _take(side: dict[str, Any], k: int) -> None:
    import jax
    import jax.numpy as jnp

    engine, plan = side["trainer"].engine, side["trainer"].plan
    batch = engine.batch_at(plan.after(k))
    arrays = engine.to_devices(batch)
    began = time.perf_counter()
    side["state"], results = side["step"](
        side["state"], side["frozen"], arrays, jnp.int32(batch.micro_batches), side["knobs"], jax.random.key(k)
    )
    jax.block_until_ready(results)
    side["times"].append(time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints both sides and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each side (6)")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient_checkpointing")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "bench", help="where the workload lies")
    options = parser.parse_args(argv)
    work = workload.make(options.folder / "workload")
    with tempfile.TemporaryDirectory() as scratch:
        sides = {
            name: _side(work, Path(scratch), before, options.checkpointing)
            for name, before in (("in the step", False), ("precomputed", True))
        }
        for k in range(options.steps):
            for side in sides.values():
                _take(side, k)
    for name, side in sides.items():
        need = side["memory"]
        print(
            f"{name}: {statistics.median(side['times'][1:]):.2f} s a step, {need.arguments / 1e6:.0f} MB arguments, "
            f"{need.temporary / 1e6:.0f} MB temporaries"
        )
    with_it, without = (statistics.median(side["times"][1:]) for side in sides.values())
    made = sides["precomputed"]
    print(f"time of a step: {without / with_it:.2f} of it; the pass over {made['pairs']} pairs: {made['pass']:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
