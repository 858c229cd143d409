"""The end of a run: models written, samples answered, gates judged, reports made."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax_dpo.report.diagnosis import diagnose
from jax_dpo.sharding.multihost import wait_for_all
from jax_dpo.train.gates import Facts, judge, write_verdict
from jax_dpo.train.loop import Loop
from jax_dpo.train.schedule import warmup_of
from jax_dpo.train.state import TrainState
from jax_dpo.trainer import outputs
from jax_dpo.trainer.run import Run
from jax_dpo.trainer.samples import answer_samples


def conclude(run: Run, loop: Loop, *, primary: bool) -> int:
    """Writes `final/`, `best/`, verdict.json and report.html; returns the exit code of the verdict."""
    parts, progress, config = loop.parts, loop.progress, run.args
    out = Path(config.output_dir)
    if config.generate_samples > 0:
        record = answer_samples(run, loop.state, parts.against(loop.state), progress.step)
        parts.display.write(parts.writers.write(record))
    best = progress.best_saved(parts.ranking)
    files = run.tokenizer.files
    records = parts.writers.log.records()
    export: dict[str, Any] = {"tokenizer_files": files, "primary": primary, "records": records}
    parts.display.busy("writing the model")
    outputs.export(run.pairing.policy, loop.state.params, out / "final", **export)
    if best is not None:
        state = loop.state if best == progress.step else _restored(loop, best)
        outputs.export(run.pairing.policy, state.params, out / "best", step=best, **export)
        if config.load_best_model_at_end:
            loop.state = state
    wait_for_all("models written")
    named = None if best is None else {"step": best, "path": f"checkpoint-{best}", "score": progress.scores[best]}
    plan = parts.plan
    verdict = judge(
        records,
        completed=progress.step >= plan.total,
        target_kl=config.target_kl,
        best=named,
        final_step=progress.step,
        set_name=parts.ranking.set,
        facts=Facts(
            done=progress.step,
            planned=plan.total,
            warmup_steps=warmup_of(config.warmup_steps, plan.total),
            all_rates_zero=not progress.moved,
            skipped=progress.skipped[0],
            learning_rate=config.learning_rate,
            beta=config.beta,
            sync_steps=plan.sync_steps,
        ),
    )
    verdict = replace(verdict, findings=tuple(diagnose(records, verdict.set)))
    parts.display.write(parts.writers.write({"kind": "verdict", "step": progress.step, **verdict.to_dict()}))
    seconds = time.time() - run.began
    parts.display.write(parts.writers.write(_end(loop, seconds)))
    if primary:
        write_verdict(out / "verdict.json", verdict)
        parts.report()
    return verdict.exit_code


def _end(loop: Loop, seconds: float) -> dict[str, Any]:
    """With the metrics of the steps after the last log line, as TRL has them in its last entry."""
    progress, rest = loop.progress, {}
    if progress.window.steps:
        rest = {k: v for k, v in progress.window.metrics().items() if k != "loss"} | {"num_tokens": progress.num_tokens}
    mean = {} if progress.mean_loss is None else {"train_loss": progress.mean_loss}
    speed = {"train_steps_per_second": loop.done / seconds, "train_samples_per_second": loop.pairs_done / seconds}
    return {"kind": "end", "step": progress.step, "reason": "done", "seconds": seconds, **speed, **mean, **rest}


def _restored(loop: Loop, step: int) -> TrainState:
    import jax

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), loop.state)
    return loop.parts.checkpoints.restore(step, abstract)[0]
