"""DPOTrainer: TRL's trainer by its signature; it builds the parts in reading order and hands them to the loop."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax_dpo.config import DPOConfig
from jax_dpo.data.load import Rows, is_stream, load_rows
from jax_dpo.errors import OK, Stopped, UserError, named
from jax_dpo.policy import Policy, load_model
from jax_dpo.report.records import Record, RunLog, log_history
from jax_dpo.report.terminal import Display, Quiet
from jax_dpo.sharding.multihost import from_primary, is_primary
from jax_dpo.train.checkpoint import Checkpoints
from jax_dpo.train.loop import Loop
from jax_dpo.train.memory import MemorySettings, memory_advice
from jax_dpo.train.signals import StopRequest
from jax_dpo.train.state import TrainState
from jax_dpo.trainer import curriculum, outputs
from jax_dpo.trainer.chat import fit
from jax_dpo.trainer.claim import claimed
from jax_dpo.trainer.datasets import PairSet, prepare_evaluation, prepare_set, prepare_stream
from jax_dpo.trainer.engine import Engine
from jax_dpo.trainer.models import check_sync, pair_models
from jax_dpo.trainer.parts import assemble, evaluation_metrics, fresh_progress, make_plan, ranking_of, start_record
from jax_dpo.trainer.precompute import Precomputed, precompute
from jax_dpo.trainer.reward_model import RewardFunction, RewardModel, reward_model_of, rewards
from jax_dpo.trainer.setup import prepare_jax
from jax_dpo.trainer.start import Start, resume_step
from jax_dpo.trainer.trl_surface import TrainerState, TrlSurface, refuse_foreign
from jax_dpo.trainer.verdict import conclude


@dataclass
class TrainOutput:
    """What `train()` returns, with the names of transformers' TrainOutput."""

    global_step: int
    training_loss: float
    metrics: dict[str, Any]


class DPOTrainer(TrlSurface):
    """Trains a policy on preference pairs by Direct Preference Optimization (arXiv 2305.18290).

    Args:
      model: a directory, a GGUF file, a Hub name, a model of `load_model`, or a transformers model object.
      ref_model: the reference; None: the policy's own start (its base under a fresh adapter, its adapter where it came with one).
      args: the options; None: DPOConfig's defaults in `<model>-DPO`.
      train_dataset: preference pairs in one of TRL's formats: a `datasets` object, a list of dicts, a file or a name.
      eval_dataset: the same, or several by name.
      processing_class: the tokenizer; None: the model's own. `tokenizer` is its older name.
      callbacks: objects with any of TRL's `on_log`, `on_evaluate`, `on_save`; they may look, not steer.
      peft_config: a `LoraConfig` (ours or PEFT's): a fresh adapter is trained, the model is the reference.
      reward_model: a function that a curriculum with `curriculum_by` "reward_model" orders the pairs by: it gets a list of rows, each with
        prompt, chosen and rejected (text, or lists of messages), and gives for each row its gap, or the rewards of chosen and rejected.
      data_collator, compute_metrics, optimizers, quantization_config, and what older TRL took: refused with what to write instead.

    Raises:
      UserError: whatever in models, data and options cannot be used, before anything is computed.
    """

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
        reward_model: RewardFunction | None = None,
        display: Display | None = None,
        revision: str | None = None,
        **others: Any,
    ) -> None:
        began = time.time()
        foreign = {"data_collator": data_collator, "compute_metrics": compute_metrics, "optimizers": optimizers}
        refuse_foreign({**foreign, "quantization_config": quantization_config, **others})
        _check_models(model, ref_model)
        self.display = display or Quiet()
        self.callbacks = list(callbacks or [])
        policy = load_model(model, revision=revision)
        self.args = args or DPOConfig(f"{policy.name}-DPO")
        fitted = fit(policy, processing_class if processing_class is not None else tokenizer, self.args)
        self.tokenizer, reference = fitted.tokenizer, fitted.reference(ref_model, revision)
        adapter = fitted.adapter(peft_config)
        self.pairing = pair_models(fitted.policy, reference, adapter, revision=revision, seed=self.args.seed)
        if self.args.sync_ref_model:
            check_sync(self.pairing)
        self.notes = [*prepare_jax(self.args), *fitted.notes(peft_config)]
        self.reward_model = None if train_dataset is None else reward_model_of(self.args, reward_model)
        self.train_set = self._training_pairs(train_dataset)
        self.eval_sets = prepare_evaluation(eval_dataset, self.tokenizer, self.args)
        if self.args.eval_strategy != "no" and not self.eval_sets:
            raise UserError(
                "evaluation-data-missing",
                f"eval_strategy is {self.args.eval_strategy}, but there are no held-out pairs. Give eval_dataset (or a test split, or "
                "test_split_size on the command line), or set eval_strategy to no.",
            )
        trainable = self.train_set if self.train_set is not None and len(self.train_set) else None
        self.plan = make_plan(self.args, len(trainable)) if trainable is not None else None
        order = curriculum.known_curriculum(self.args, trainable) if trainable is not None else None
        self.engine = Engine(self.args, self.pairing, trainable, self.eval_sets, self.plan, curriculum=order)
        self.engine.check()
        ranking_of(self.args, self.eval_sets)
        self.state = TrainerState()
        self.records: list[Record] = []
        self.exit_code = OK
        self.already_finished = False
        self.began = began
        self._device_state: Any = None
        self._frozen: Any = None

    def _training_pairs(self, source: Any) -> PairSet | None:
        """The pairs to train on. A stream gives as many as the run takes, in its own order, as in TRL."""
        if source is None:
            return None
        if not is_stream(source):
            if self.reward_model is not None:
                source = self._texts = load_rows(source)
            # Whoever only looks at `train_dataset` sees, as in TRL, that nothing is left; `train` says why.
            return prepare_set(source, self.tokenizer, self.args, progress=self._tokenizing, may_be_empty=True)
        curriculum.refuse_stream(self.args)
        if self.args.max_steps <= 0:
            raise UserError(
                "stream-without-max-steps",
                "The training data are a stream (an IterableDataset, or dataset_streaming), which is read as far as it is needed, so "
                "max_steps must say how long the run is: set it.",
            )
        self.args = replace(self.args, train_sampling_strategy="sequential")
        self.notes = [
            *self.notes,
            named("stream-order", "the training data are a stream: pairs are taken in its own order"),
        ]
        pairs = self.args.max_steps * make_plan(self.args, 1).pairs_per_step
        return prepare_stream(source, self.tokenizer, self.args, pairs=pairs, progress=self._tokenizing)

    @property
    def model(self) -> Policy:
        """The policy as it was given."""
        return self.pairing.policy

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self.tokenizer.loaded

    @property
    def train_dataset(self) -> list[dict[str, Any]]:
        """The pairs that are trained on, as TRL has them: prompt_ids, chosen_ids, rejected_ids.

        With `precompute_ref_log_probs` ref_chosen_logps and ref_rejected_logps as well, which are computed now if they are not there
        yet: of several processes all must ask.
        """
        if self.train_set is None:
            return []
        self._precompute()
        rows: list[dict[str, Any]] = list(self.train_set.pairs.rows())
        if self.engine.ref_logps is not None:
            for row, (chosen, rejected) in zip(rows, self.engine.ref_logps.tolist()):
                row |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return rows

    def _precompute(self, stop: StopRequest | None = None) -> None:
        """The reference's log-probabilities of the training pairs, where they are wanted and not there."""
        if not self.args.precompute_ref_log_probs or self.train_set is None or self.engine.ref_logps is not None:
            return
        if not len(self.train_set):
            return
        made = self._reference_logps(stop)
        self.engine.ref_logps, self.ref_logps_found = made.values, made.found
        self.notes += made.notes

    def _reference_logps(self, stop: StopRequest | None) -> Precomputed:
        """Those of the training pairs; what an earlier run has made is found."""
        assert self.train_set is not None
        data, asked = self.train_set, stop.asked if stop is not None else lambda: False
        return self._before_training(
            "computing the reference's log-probabilities",
            self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size,
            lambda: precompute(self.engine, data, display=self.display, asked=asked),
        )

    def _before_training(self, doing: str, batch: int, compute: Callable[[], Precomputed]) -> Precomputed:
        """What is computed ahead of step 1, `batch` pairs at a time; a stop is shown."""
        with self.memory(doing, batch):
            try:
                return compute()
            except Stopped:
                self.display.write({"kind": "end", "step": 0, "reason": "signal", "seconds": None})
                raise

    def _arrange(self, stop: StopRequest | None = None, start: Start | None = None) -> None:
        """The order of a curriculum whose gaps must be computed. A run that goes on has the gaps that it began with."""
        if self.plan is None or not curriculum.must_compute(self.args):
            return

        def compute() -> Precomputed:
            if self.reward_model is not None:
                return self._rewards(self.reward_model, stop)
            if self.engine.ref_logps is not None:
                return Precomputed(self.engine.ref_logps, 0, [])
            return self._reference_logps(stop)

        curriculum.arrange(self, compute, start)
        self._texts = None

    def _rewards(self, model: RewardModel, stop: StopRequest | None) -> Precomputed:
        """What a reward model gives the training pairs."""
        assert self.train_set is not None and self._texts is not None
        data, texts = self.train_set, self._texts
        asked = stop.asked if stop is not None else lambda: False
        return self._before_training(
            "running the reward model",
            self.args.per_device_eval_batch_size,
            lambda: rewards(model, self.engine, data, texts, display=self.display, asked=asked),
        )

    def _tokenizing(self, done: int, total: int) -> None:
        self.display.busy(f"tokenizing {done:,} of {total:,}")

    def memory(self, doing: str, reference_batch: int | None = None) -> Any:
        """Answers want of memory in the block with what to change."""
        a = self.args
        settings = MemorySettings(
            per_device_train_batch_size=a.per_device_train_batch_size,
            gradient_accumulation_steps=a.gradient_accumulation_steps,
            max_length=a.max_length,
            gradient_checkpointing=a.gradient_checkpointing,
            use_peft=self.pairing.policy.config.lora is not None,
            bf16=a.bf16,
            micro_batch_tokens=a.micro_batch_tokens,
            may_precompute=not (a.precompute_ref_log_probs or a.sync_ref_model or a.kl_coef),
            reference_batch=reference_batch,
            optim=a.optim,
        )
        return memory_advice(settings, doing=doing)

    def _load(self) -> None:
        """Model and reference onto the devices."""
        if self._device_state is None:
            self.display.busy("loading the model")
            with self.memory("loading the model"):
                self._device_state = self.engine.fresh_state()
                self._frozen = self.engine.frozen(self._device_state)
                if self.already_finished:
                    self._device_state = self._finished_state(self._device_state)

    def _finished_state(self, fresh: TrainState) -> TrainState:
        """What a finished run came to: its model, and its reference, where that moved, out of the checkpoint of the same step."""
        out, best = Path(self.args.output_dir), self.args.load_best_model_at_end
        state = self.engine.with_params(fresh, outputs.trained_policy(out, self.pairing.policy, best=best))
        if not fresh.reference:
            return state
        verdict = outputs.read_json(out / "verdict.json")
        step = int(((verdict["best"] if best else None) or verdict["final"])["step"])
        with Checkpoints(out, save_total_limit=None, primary=is_primary()) as checkpoints:
            if step not in checkpoints.steps():
                raise UserError(
                    "moved-reference-missing",
                    f"The run in {out} moved its reference (sync_ref_model), which only its checkpoints hold, and checkpoint-{step} is not "
                    f"there. Evaluate {out / 'final'} with jax-dpo evaluate against a reference of your choice (ref_model_name_or_path).",
                )
            return state._replace(reference=checkpoints.restore(step, self.engine.abstract_state)[0].reference)

    def _notify(self, event: str, fields: dict[str, Any]) -> None:
        """Tells the callbacks, with TRL's arguments."""
        if not self.callbacks:
            return
        if self._log is not None:
            self._show(self._log.records())
        name = {"on_log": "logs", "on_evaluate": "metrics"}.get(event)
        for callback in self.callbacks:
            handler: Callable[..., Any] | None = getattr(callback, event, None)
            if handler is not None:
                handler(self.args, self.state, None, **({name: dict(fields)} if name else {}))

    _log: RunLog | None = None
    _texts: Rows | None = None  # for a reward model, until it has read them

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Trains to the end and writes everything under `args.output_dir`.

        Args:
          resume_from_checkpoint: None: as in `args`; True: the newest checkpoint; a path; "auto": go on where there is an unfinished
            run of the same options, else start.

        Raises:
          UserError: no training data; the directory holds another run, or one is at work there; numbers that are not finite; no
            space; out of memory.
          Stopped: a signal; everything is saved.
        """
        if self.train_set is None:
            raise UserError("train-data-missing", "train() needs train_dataset.")
        self.train_set.data.require_pairs()
        out = Path(self.args.output_dir)
        with claimed(out):
            return self._train(
                out, self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
            )

    def _train(self, out: Path, wanted: bool | str | Path | None) -> TrainOutput:
        primary = is_primary()
        start = resume_step(out, wanted, self.args, self.identity(), self.display)
        if start.finished:
            return self._finished(out)
        with tempfile.TemporaryDirectory() as elsewhere, StopRequest() as stop:
            self._precompute(stop)
            self._arrange(stop, start)
            # Every process keeps the account, since control and checkpoints read it; one keeps it where the user looks.
            log = RunLog((out if primary else Path(elsewhere)) / "run.jsonl")
            self._log = log
            self._load()
            parts = assemble(self, log, self._frozen, notify=self._notify, primary=primary)
            progress = fresh_progress(self.args)
            state, self._device_state = self._device_state, None
            try:
                with parts.checkpoints, self.memory("training"):
                    if start.step is not None:
                        state, progress = start.restore(parts, self.engine.abstract_state, self.notes)
                    else:
                        self.display.write(parts.writers.write(start_record(self)))
                        if primary:
                            outputs.write_dropped(out, self.named_sets())
                    loop = Loop(parts, state, progress)
                    loop.run(stop)
                    self.exit_code = from_primary(conclude(self, loop, primary=primary))
                    self._device_state, self.trained_tokens = loop.state, loop.progress.num_tokens
            except Stopped:
                parts.report()
                raise
            except Exception as error:
                with suppress(Exception):  # the error is what matters, also where the log cannot be written
                    step = max((r["step"] for r in log.records()), default=0)
                    message = error.message if isinstance(error, UserError) else str(error)
                    first, _, rest = message.partition("\n")
                    of_user = {"error": error.name, "advice": rest} if isinstance(error, UserError) else {}
                    parts.writers.write({"kind": "end", "step": step, "reason": "error", "message": first, **of_user})
                    parts.report()
                raise
            finally:
                self._show(log.records())
                parts.writers.close()
                self._log = None
        return self._output(loop.progress.step)

    def _output(self, step: int) -> TrainOutput:
        last = self.state.log_history[-1] if self.state.log_history else {}
        metrics = {k: v for k, v in last.items() if k.startswith("train_")}
        return TrainOutput(step, metrics.get("train_loss", float("nan")), metrics)

    def _finished(self, out: Path) -> TrainOutput:
        """A run that is at its end already: say so, and show what it came to."""
        from jax_dpo.report.records import read_records

        self.already_finished, self._device_state = True, None
        self._show(read_records(out / "run.jsonl"))
        self.trained_tokens = next((r["num_tokens"] for r in reversed(self.records) if "num_tokens" in r), 0)
        self.exit_code = int(outputs.read_json(out / "verdict.json").get("exit_code", OK))
        return self._output(self.state.global_step)

    def _show(self, records: list[Record]) -> None:
        """Sets what `records` and `state` show."""
        self.records, state = records, self.state
        state.log_history = log_history(records)
        state.global_step = max((r["step"] for r in records), default=0)
        state.epoch = next((r["epoch"] for r in reversed(records) if "epoch" in r), 0.0)
        best = next((r for r in reversed(records) if r["kind"] == "checkpoint" and r["best"]), None)
        if best is not None:
            state.best_global_step, state.best_metric = best["step"], best["score"]
            state.best_model_checkpoint = str(Path(self.args.output_dir) / best["path"])

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Metrics of the held-out pairs under the policy as it stands, every pair counted once.

        After a training also its `epoch` and the tokens that it has seen (`eval_num_tokens`), as in TRL.

        Args:
          eval_dataset: another set than the trainer's own.

        Raises:
          UserError: there are no held-out pairs.
        """
        sets = self.eval_sets
        if eval_dataset is not None:
            sets = prepare_evaluation(eval_dataset, self.tokenizer, self.args)
        if not sets:
            raise UserError("evaluation-data-missing", "evaluate() needs held-out pairs: give eval_dataset.")
        if self.train_set is None and not self.engine.eval_sets:
            self.engine.eval_sets = sets
        self._arrange()
        self._load()
        with self.memory("evaluating"):
            found = evaluation_metrics(self, sets, self._device_state, self._frozen, self.state.global_step)
        return found if self.trained_tokens is None else {**found, "epoch": self.state.epoch}

    def save_model(self, output_dir: str | Path | None = None, dtype: str = "auto", *, merge: bool = False) -> None:
        """Writes the policy as it stands: a Hugging Face directory, or a PEFT adapter (with `merge` full weights).

        Args:
          dtype: "auto" is that of the weights that came in.
        """
        self._load()
        outputs.export(
            self.pairing.policy,
            self._device_state.params,
            Path(output_dir or self.args.output_dir),
            tokenizer_files=self.tokenizer.files,
            primary=is_primary(),
            dtype=dtype,
            merge=merge,
            replace=False,
        )


def _check_models(model: Any, ref_model: Any) -> None:
    if model is None:
        raise UserError(
            "model-needed", "DPOTrainer needs a model: a directory, a GGUF file, a Hub name or a model object."
        )
    if ref_model is not None and ref_model is model and not isinstance(model, str | Path):
        raise UserError(
            "reference-is-policy",
            "model and ref_model are one and the same object, which would be trained as its own reference. "
            "Leave ref_model out: the policy's start is the reference then.",
        )
