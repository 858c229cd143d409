"""The loop: one page that says in which order things happen.

The order is part of what is right: metrics lag a step and are drained before anything looks at them; evaluation comes before control,
control before the checkpoint, the checkpoint before the next batch is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_dpo.data.batch import Batch
from jax_dpo.data.loader import StepBatch, prefetch
from jax_dpo.errors import Stopped
from jax_dpo.train import nonfinite
from jax_dpo.train.control import EVAL, TRAIN, react
from jax_dpo.train.evaluate import EvalSet, evaluate, measure
from jax_dpo.train.metrics import Window
from jax_dpo.train.parts import Parts
from jax_dpo.train.progress import COUNTED, Progress
from jax_dpo.train.signals import StopRequest
from jax_dpo.train.state import Frozen, Knobs, TrainState
from jax_dpo.train.trust_region import limit_of, ratio_of


@dataclass
class _Pending:
    """A step that was started and whose results have not been read."""

    step: int
    batch: StepBatch
    results: dict[str, Any]
    rate: float


class Loop:
    """Carries a run from where `progress` stands to its end. `run` returns the final state; the reports are in the log."""

    def __init__(self, parts: Parts, state: TrainState, progress: Progress) -> None:
        self.parts, self.state, self.progress = parts, state, progress
        self.pending: _Pending | None = None
        self.last_read: float | None = None  # when the device was last seen to be done, if nothing but steps came after
        self.compiled: Any = None
        # Until a step counted: those that are skipped move nothing, and after a rollback to the start beta may be another.
        self.untested = progress.losses[1] == 0
        self.done = self.pairs_done = 0  # steps and pairs that this process trained on, those rolled back included

    def run(self, stop: StopRequest) -> TrainState:
        """Trains to the planned end.

        Raises:
          Stopped: a signal asked for it; everything is saved.
          UserError: numbers that are not finite, no space left, ...
        """
        plan = self.parts.plan
        if self.progress.step == 0 and plan.eval_on_start and self.parts.eval_sets:
            self._evaluate()
        while self.progress.step < plan.total:
            self._train_on(stop)
        self._drain()  # where nothing was due at the last step, its results are still unread
        self.parts.checkpoints.wait()
        return self.state

    def _train_on(self, stop: StopRequest) -> None:
        """Steps from where the run stands to its end, or to a rollback: that puts another `progress` in place, and other batches."""
        plan = self.parts.plan
        with closing(prefetch(self._batches())) as batches:
            for batch, arrays in batches:
                self._take_step(batch, arrays)
                step = self.progress.step
                stopping = stop.asked() and step < plan.total
                judging = self.parts.control.judges_train_at(step)
                if plan.logs_at(step) or judging or plan.evaluates_at(step) or plan.saves_at(step) or stopping:
                    self._drain()
                if plan.logs_at(step):
                    self._log()
                    self._compare_probe()
                rolled_back = (judging and self._judge_train()) or (plan.evaluates_at(step) and self._evaluate())
                if rolled_back:
                    return
                better = plan.saves_best and self.progress.is_best(self.parts.ranking)
                if plan.saves_at(step) or better or stopping:
                    self._save()
                if stopping:
                    self._stop(stop)

    def _batches(self) -> Iterator[tuple[StepBatch, Batch]]:
        """Batches from where the data stands, already on their way to the devices."""
        plan = self.parts.plan
        start, first = self.progress.position, self.progress.step
        for k in range(plan.total - first):
            batch = self.parts.batch_at(plan.after(k, start))
            yield batch, self.parts.to_devices(batch)

    def _knobs(self, rate: float) -> Knobs:
        controls = self.progress.control.controls
        return Knobs(jnp.float32(rate), jnp.float32(controls.beta), jnp.float32(controls.kl_coef))

    def _frozen(self) -> Frozen:
        """What stays, with the limit of the trust region as it is now."""
        frozen = self.parts.frozen
        if frozen.probe is None:
            return frozen
        limit = limit_of(self.parts.control.target_kl, self.progress.probe_ratio)
        return frozen._replace(probe=frozen.probe._replace(limit=jnp.float32(limit)))

    def _judging_knobs(self) -> Knobs:
        """Evaluations are made at the configured values, so that they can be compared: raising beta must not raise a score."""
        control = self.progress.control
        return Knobs(jnp.float32(0), jnp.float32(control.beta), jnp.float32(control.kl_coef))

    def _take_step(self, batch: StepBatch, arrays: Batch) -> None:
        """Starts the next step, then reads the results of the one before it."""
        parts, progress = self.parts, self.progress
        scale = progress.control.controls.learning_rate_scale
        rate = parts.learning_rate * parts.schedule(progress.step) * scale
        key = jax.random.fold_in(parts.key, progress.step)
        args = (self.state, self._frozen(), arrays, jnp.int32(batch.micro_batches), self._knobs(rate), key)
        if self.compiled is None:
            self.compiled = self._compile(args)
        began = time.perf_counter()
        self.last_read = began if self.last_read is None else self.last_read
        self.state, results = self.compiled(*args)
        progress.step += 1
        if parts.sync is not None and parts.plan.syncs_at(progress.step):
            self.state = parts.sync(self.state)
        progress.position = parts.plan.after(1, progress.position)
        progress.num_tokens += batch.trl_tokens
        progress.moved = progress.moved or rate > 0
        before, self.pending = self.pending, _Pending(progress.step, batch, results, rate)
        if before is not None:
            self._read(before)

    def _compile(self, args: tuple) -> Any:
        display = self.parts.display
        display.compiling("the training step", {"cpu": 6.0, "gpu": 40.0, "tpu": 60.0}.get(jax.default_backend()))
        began, self.last_read = time.perf_counter(), None
        compiled = self.parts.step.lower(*args).compile()  # type: ignore[attr-defined]
        display.compiled(time.perf_counter() - began)
        return compiled

    def _read(self, done: _Pending) -> None:
        """Waits for a step's results and adds them to the window."""
        sums, responses = jax.device_get((done.results["sums"], done.results["responses"]))
        batch, c, now = done.batch, self.progress.counted, time.perf_counter()
        c["seconds"] += now - (now if self.last_read is None else self.last_read)
        self.last_read = now
        if not bool(done.results["finite"]):
            self._not_finite(done)
            return
        self.progress.skipped = (self.progress.skipped[0], 0)
        self.progress.window.add(sums, batch.groups, responses)
        self.progress.add_kl(float(sums.kl_chosen) + float(sums.kl_rejected), float(sums.kl_tokens))
        self.progress.last = (float(done.results["grad_norm"]), done.rate)
        c["pairs"] += len(batch.pairs)
        self.done, self.pairs_done = self.done + 1, self.pairs_done + len(batch.pairs)
        c["trl_tokens"] += batch.trl_tokens
        c["flops"] += self.parts.flops(batch)
        c["fill"] += batch.fill
        if done.results["accepted"] is not None:
            accepted = jax.device_get(done.results["accepted"])
            self.progress.probe_kl = float(accepted.kl)
            self.progress.rate_share = float(done.results["rate_share"])
            self.progress.last = (self.progress.last[0], done.rate * self.progress.rate_share)
            c["scale"] += float(accepted.scale)
        c["steps"] += 1
        one = Window()
        one.add(sums, batch.groups)
        metrics = one.metrics()
        total, steps = self.progress.losses
        self.progress.losses = (total + metrics["loss"], steps + 1)
        if self.untested and self.parts.check_start is not None:
            self.parts.check_start(metrics)
        self.untested = False
        speed = {"pairs_per_second": c["pairs"] / max(c["seconds"], 1e-9)}
        self.parts.display.progress(done.step, self.parts.plan.total, {**metrics, **speed})

    def _drain(self) -> None:
        before, self.pending = self.pending, None
        if before is not None:
            self._read(before)

    def _not_finite(self, done: _Pending) -> None:
        """Ends the run, or leaves the step out: the state is that of before then."""
        parts, progress, rows = self.parts, self.progress, self.parts.row_names[nonfinite.TRAINING]
        faulty = parts.faulty_pairs(nonfinite.TRAINING, np.sort(done.batch.pairs), self.state)
        fault = nonfinite.of_step(done.step, faulty, done.batch.pairs)
        if not parts.skip_nonfinite:
            raise nonfinite.stopped(fault, rows)
        progress.skipped = (progress.skipped[0] + 1, progress.skipped[1] + 1)
        self._write("nonfinite", fault.record(rows, "skipped"))
        self.last_read = None  # what it took to find the pairs is no step's time
        if progress.skipped[1] >= nonfinite.MOST_IN_A_ROW:
            raise nonfinite.too_many(fault, rows)

    def _log(self) -> None:
        """One train record: means since the last one."""
        parts, progress, c = self.parts, self.progress, self.progress.counted
        if not progress.window.steps:  # all of them were skipped
            return
        controls = progress.control.controls
        seconds = max(c["seconds"], 1e-9)
        record = {
            **progress.window.metrics(),
            "grad_norm": progress.last[0],
            "learning_rate": progress.last[1],
            "beta": progress.window.beta if parts.options.beta_varies else controls.beta,
            "kl_coef": controls.kl_coef,
            "num_tokens": progress.num_tokens,
            "tokens_per_second": c["trl_tokens"] / seconds,
            "pairs_per_second": c["pairs"] / seconds,
            "row_fill": c["fill"] / max(c["steps"], 1),
            "step_time": seconds / max(c["steps"], 1),
        }
        if parts.frozen.probe is not None:
            record["trust_region/scale"] = c["scale"] / max(c["steps"], 1)
            record["trust_region/rate"] = progress.rate_share
            record["trust_region/kl"] = progress.probe_kl
            record["trust_region/limit"] = limit_of(parts.control.target_kl, progress.probe_ratio)
        if parts.peak_flops:
            record["mfu"] = c["flops"] / seconds / parts.peak_flops
        profile = progress.window.responses.profile()
        self._write("train", {**record, "kl_profile": profile} if profile else record)
        parts.notify("on_log", record)
        progress.window, progress.counted = Window(), dict.fromkeys(COUNTED, 0.0)

    def _write(self, kind: str, fields: Mapping[str, Any]) -> None:
        progress = self.progress
        epoch = {"epoch": self.parts.plan.epoch(progress.position)} if kind in ("train", "eval") else {}
        record = self.parts.writers.write({"kind": kind, "step": progress.step, **fields, **epoch})
        self.parts.display.write(record)

    def evaluate_sets(self) -> dict[str, float]:
        """All held-out sets as they stand now; one record each."""
        parts = self.parts
        found: dict[str, float] = {}
        beta, frozen = self.progress.control.beta, parts.against(self.state)
        for held_out in parts.eval_sets:
            parts.display.busy("evaluating" + (f" {held_out.name}" if held_out.name else ""))
            knobs = self._judging_knobs()
            tell = partial(self._faulty_evaluation, held_out)
            against = (self.state.params, frozen, knobs, parts.options)
            metrics, profile, sampled = measure(parts.evaluator, held_out, *against, tell, self.progress.step)
            more: dict[str, Any] = {} if held_out.name is None else {"set": held_out.name}
            more |= {"kl_profile": profile, **({"sampled": sampled} if sampled else {})}
            self._write("eval", {**metrics, "beta": beta, **more, **self._tokens_so_far(held_out)})
            parts.notify("on_evaluate", metrics)
            found |= metrics
        return found

    def _faulty_evaluation(self, held_out: EvalSet, pairs: np.ndarray) -> None:
        alone = self.parts.faulty_pairs(held_out.name, pairs, self.state)
        fault = nonfinite.of_evaluation(self.progress.step, alone, pairs)
        self._write("nonfinite", fault.record(self.parts.row_names[held_out.name], "counted"))

    def _tokens_so_far(self, held_out: EvalSet) -> dict[str, int]:
        """TRL's `eval_num_tokens`: what has been trained on, not what is evaluated."""
        return {f"{held_out.prefix}num_tokens": self.progress.num_tokens}

    def _evaluate(self) -> bool:
        """Evaluates, scores, lets the control act; True if it rolled the run back."""
        parts, progress, self.last_read = self.parts, self.progress, None
        found = self.evaluate_sets()
        if progress.step == 0 and parts.check_start is not None:
            prefix = parts.eval_sets[0].prefix
            parts.check_start({k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)})
        progress.scores[progress.step] = parts.ranking.score({**found, "beta": progress.control.beta})
        kl = found[f"{self._judge.prefix}kl_divergence"]
        self._hold_against(kl)
        if kl <= parts.control.target_kl:
            progress.good.append(progress.step)
        rolled_back = EVAL in parts.control.judged_on and self._control(kl, EVAL)
        parts.report()
        return rolled_back

    @property
    def _judge(self) -> EvalSet:
        """The evaluation set that ranks and judges."""
        sets, which = self.parts.eval_sets, self.parts.ranking.set
        return next((held_out for held_out in sets if held_out.name == which), sets[0])

    def _hold_against(self, kl: float) -> None:
        """What the evaluation set's KL says of the probe set's."""
        if self.parts.frozen.probe is not None:
            ratio = ratio_of(kl, self.progress.probe_kl, self.parts.control.target_kl)
            self.progress.probe_ratio = self.progress.probe_ratio if ratio is None else ratio

    def _compare_probe(self) -> None:
        """Held-out KL between evaluations, once: as soon as the probe set's is high enough to be compared. Until then the trust region is
        narrower than it need be."""
        parts, progress = self.parts, self.progress
        limit = limit_of(parts.control.target_kl, None)
        known = parts.frozen.probe is None or progress.probe_ratio is not None
        if known or progress.probe_kl < limit / 2 or parts.plan.evaluates_at(progress.step):
            return
        self.last_read, held_out = None, self._judge
        parts.display.busy("comparing the probe set with the held-out pairs")
        against = (self.state.params, parts.against(self.state), self._judging_knobs(), parts.options)
        self._hold_against(evaluate(parts.evaluator, held_out, *against)[f"{held_out.prefix}kl_divergence"])

    def _judge_train(self) -> bool:
        """Judges the train steps since the last time; True if the run was rolled back. An evaluation at the same step knows better."""
        parts, progress = self.parts, self.progress
        kl = progress.take_kl()
        if kl is None:  # all of them were skipped
            return False
        progress.within = kl <= parts.control.target_kl
        if EVAL in parts.control.judged_on and parts.plan.evaluates_at(progress.step):
            return False
        return self._control(kl, TRAIN)

    def _control(self, kl: float, judged_on: str) -> bool:
        progress = self.progress
        good_step = max((s for s in progress.saved if s in progress.good), default=0)
        progress.control, actions = react(
            progress.control,
            self.parts.control,
            kl=kl,
            step=progress.step,
            good_step=good_step,
            judged_on=judged_on,
            last=progress.step == self.parts.plan.total,
        )
        for action in actions:
            self._write("kl_action", action.record())
        if any(action.kind == "rollback" for action in actions):
            self._roll_back(good_step)
            return True
        return False

    def _roll_back(self, to: int) -> None:
        """Back to a checkpoint, or to the start, with the controls as they are now. What came after it is given up first."""
        parts, control, ratio = self.parts, self.progress.control, self.progress.probe_ratio
        parts.checkpoints.wait()
        parts.checkpoints.delete_after(to)
        parts.writers.log.truncate_after(to)
        if to == 0:
            self.state = parts.fresh_state()
            scores = {0: self.progress.scores[0]} if 0 in self.progress.scores else {}
            good = [s for s in self.progress.good if s == 0]
            self.progress = Progress(control, scores=scores, good=good, probe_ratio=ratio)
        else:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)
            self.state, meta = parts.checkpoints.restore(to, abstract)
            self.progress = Progress.from_meta(meta)
            self.progress.control, self.progress.probe_ratio = control, ratio
            self.progress.keep_saved(parts.checkpoints.steps())
            # Saved again: a run that is killed now must go on with the changed values.
            self._write_checkpoint(to)

    def _write_checkpoint(self, step: int) -> None:
        """Saves as `checkpoint-<step>`; the best one, and the one that a rollback would go to, stay whatever is rotated away."""
        parts, progress = self.parts, self.progress
        best = progress.best_saved(parts.ranking)
        protect = set() if best is None else {best}
        if "rollback" in parts.control.actions and step < parts.plan.total:
            protect |= {max((s for s in progress.saved if s in progress.good), default=step)}
        parts.checkpoints.save(step, self.state, progress.meta(), parts.trainer_state(progress), protect=protect)
        if jax.default_backend() == "cpu":
            # There the saved arrays are the memory that the next step writes into: going on beside the save would take a second copy.
            parts.checkpoints.wait()

    def _save(self) -> None:
        parts, progress, self.last_read = self.parts, self.progress, None
        step = progress.step
        if step in progress.saved:
            return
        progress.saved.append(step)
        if step not in progress.scores and TRAIN in parts.control.judged_on and progress.within:
            progress.good.append(step)
        parts.display.busy("saving")
        self._write_checkpoint(step)
        best = progress.best_saved(parts.ranking)
        score = {}
        if step in progress.scores:  # null: the KL is over its bound; absent: nothing was evaluated
            score = {"score": progress.scores[step] if math.isfinite(progress.scores[step]) else None}
        self._write("checkpoint", {"path": f"checkpoint-{step}", **score, "best": step == best})
        parts.notify("on_save", {})

    def _stop(self, stop: StopRequest) -> None:
        self.parts.checkpoints.wait()
        step = self.progress.step
        self._write("end", {"reason": "signal", "seconds": None})
        raise Stopped(
            f"stopped by {stop.name} after step {step}; saved as checkpoint-{step}. Run the same command again to go on."
        )
