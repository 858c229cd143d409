"""What the commands of the command line do, given their options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jax_dpo.config import DPOConfig, ScriptArguments
from jax_dpo.data.load import Rows, Stream, is_stream, list_splits, load_rows, open_stream, split_rows
from jax_dpo.data.mixture import Source, load_mixture
from jax_dpo.errors import GATE_FAILED, OK, STOPPED, Stopped, UserError, named
from jax_dpo.models.lora import LoraConfig
from jax_dpo.report.records import Record, json_ready
from jax_dpo.report.terminal import Quiet, Terminal
from jax_dpo.sharding.multihost import is_primary, leave
from jax_dpo.train.agree import raise_together
from jax_dpo.train.retry import CHANGED, next_change
from jax_dpo.trainer.attempts import Attempt, compare_attempts, complete_moves, earlier_attempts, set_aside
from jax_dpo.trainer.outputs import holds_run
from jax_dpo.trainer.start import option_differences


def _is_streamed(script: ScriptArguments) -> bool:
    """Whether rows come one by one from the Hub; what lies here is read whole."""
    return script.dataset_streaming and not Path(script.dataset_name).expanduser().exists()


def _train_rows(script: ScriptArguments) -> Any:
    if script.datasets:
        return load_mixture([Source(**entry) for entry in script.datasets])
    if _is_streamed(script):
        return open_stream(script.dataset_name, split=script.dataset_train_split, config=script.dataset_config)
    return load_rows(script.dataset_name, split=script.dataset_train_split, config=script.dataset_config)


def _held_out(script: ScriptArguments) -> Any:
    """Held-out pairs that are named, or a test split that is there; None where there are none."""
    if script.eval_dataset is not None:
        return script.eval_dataset
    if not script.dataset_name or script.datasets:
        return None
    if _is_streamed(script):
        return open_stream(
            script.dataset_name, split=script.dataset_test_split, config=script.dataset_config, missing_ok=True
        )
    splits = list_splits(script.dataset_name, config=script.dataset_config)
    if script.dataset_test_split in splits:
        return load_rows(script.dataset_name, split=script.dataset_test_split, config=script.dataset_config)
    return None


def read_data(script: ScriptArguments, seed: int) -> tuple[Any, Any]:
    """Training rows and held-out rows (None where there are none). What is held out is not trained on, also where nothing is evaluated."""
    train, held_out = _train_rows(script), _held_out(script)
    if script.dataset_streaming and isinstance(train, Rows):
        train = Stream(train)
    if held_out is None and script.test_split_size is not None:
        if is_stream(train):
            raise UserError(
                "stream-without-length",
                "test_split_size cannot be taken from a stream: leave dataset_streaming out, or name the pairs in eval_dataset.",
            )
        train, held_out = split_rows(train, script.test_split_size, seed)
    return train, held_out


def adapter_of(script: ScriptArguments) -> LoraConfig | None:
    if not script.use_peft:
        return None
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=script.lora_target_modules,
        modules_to_save=script.lora_modules_to_save,
        use_rslora=script.use_rslora,
        use_dora=script.use_dora,
        task_type=script.lora_task_type,
    )


def run_training(script: ScriptArguments, config: DPOConfig) -> int:
    """`jax-dpo train`: returns the exit code of the last attempt's verdict, or that of a run stopped by a signal.

    Where a gate failed and `script.retry` allows it, the run is set aside and made again with the change that is advised.
    """
    from jax_dpo.trainer.setup import prepare_jax

    notes, out = [*script.warnings(), *prepare_jax(config)], Path(config.output_dir)
    earlier = _attempts_so_far(out, config)
    while True:
        said = [named("attempt-changed", f"attempt {len(earlier) + 1}: {earlier[-1].change.text}")] if earlier else []
        ended = _train_once(script, changed_by(config, earlier) if earlier else config, [*said, *notes])
        change = None
        if ended.code == GATE_FAILED and len(earlier) < script.retry:
            change = next_change(ended.last("verdict"), ended.last("start"), [(a.change, a.options) for a in earlier])
            if change is None:
                _say(
                    named(
                        "no-further-attempt",
                        f"no further attempt: nothing of {', '.join(CHANGED)} is left to change for the gate that failed",
                    )
                )
        if change is None:
            break
        folder = _primary_does(partial(set_aside, out, change))
        _say(f"attempt {len(earlier) + 1} of {script.retry + 1} is set aside in {folder}; again with {change.text}\n")
        earlier = [*earlier, earlier_attempts(out)[-1]]
    if earlier and ended.code in (OK, GATE_FAILED):
        page = _primary_does(lambda: compare_attempts(out))
        _say(f"the attempts on one page: {page}")
    leave()
    if ended.already:
        _say(f"{config.output_dir} holds this run, finished: nothing to do. --overwrite_output_dir starts it over.")
    return ended.code


def _say(text: str) -> None:
    if is_primary():
        print(text, flush=True)


def _primary_does(act: Callable[[], Any]) -> Any:
    """What the process that writes does while the others wait; its error is everybody's. None on the others."""
    error, result = None, None
    if is_primary():
        try:
            result = act()
        except UserError as found:
            error = found
    raise_together(error)
    return result


def _attempts_so_far(out: Path, config: DPOConfig) -> list[Attempt]:
    """The attempts that this run goes on from; none where it begins anew, or is refused since something is there.

    Raises:
      UserError: they are attempts at a run of other options; one that cannot be read; the disk refuses.
    """
    _primary_does(lambda: complete_moves(out))
    if config.overwrite_output_dir or config.resume_from_checkpoint not in ("auto", True):
        return []
    earlier = earlier_attempts(out)
    if not earlier:
        return []
    changed = option_differences(earlier[0].options, json_ready(config.to_dict()))
    if changed:
        raise UserError(
            "output-dir-other-run",
            f"{out} holds {len(earlier) + 1} attempts at a run of other options: {'; '.join(changed)}. To start over: "
            "--overwrite_output_dir. To keep it: another --output_dir.",
        )
    return earlier


def changed_by(config: DPOConfig, earlier: Sequence[Attempt]) -> DPOConfig:
    """The options of the attempt after these."""
    changes = {a.change.option: a.change.new for a in earlier}
    # A run without a checkpoint yet has nothing that `true` could go on from.
    resume = config.resume_from_checkpoint if holds_run(Path(config.output_dir)) else "auto"
    return replace(config, overwrite_output_dir=False, resume_from_checkpoint=resume, **changes)  # type: ignore[arg-type]


class _Ended(NamedTuple):
    code: int
    already: bool
    records: list[Record]

    def last(self, kind: str) -> Record:
        return next(r for r in reversed(self.records) if r["kind"] == kind)


def _train_once(script: ScriptArguments, config: DPOConfig, notes: list[str]) -> _Ended:
    from jax_dpo.trainer.dpo import DPOTrainer

    display = (
        Terminal(output_dir=config.output_dir, live=False if config.disable_tqdm else None) if is_primary() else Quiet()
    )
    try:
        display.busy("reading the data")
        train, held_out = read_data(script, config.seed)
        trainer = DPOTrainer(
            model=script.model_name_or_path,
            ref_model=script.ref_model_name_or_path,
            args=config,
            train_dataset=train,
            eval_dataset=None if config.eval_strategy == "no" else held_out,
            processing_class=script.tokenizer_name_or_path,
            peft_config=adapter_of(script),
            display=display,
            revision=script.model_revision,
        )
        trainer.notes = list(dict.fromkeys([*notes, *trainer.notes]))
        trainer.train()
        return _Ended(trainer.exit_code, trainer.already_finished, trainer.records)
    except Stopped:
        return _Ended(STOPPED, False, [])
    finally:
        display.close()


def run_evaluation(script: ScriptArguments, config: DPOConfig) -> int:
    """`jax-dpo evaluate`: prints the metrics of a model on held-out pairs against its reference."""
    from rich.console import Console
    from rich.table import Table

    from jax_dpo.trainer.dpo import DPOTrainer

    held_out = _held_out(script)
    if held_out is None:
        raise UserError(
            "evaluation-data-missing",
            f"{script.dataset_name} has no split {script.dataset_test_split}. Name the held-out pairs with --eval_dataset, "
            "or their split with --dataset_test_split.",
        )
    display = Terminal(live=False) if is_primary() else Quiet()
    trainer = DPOTrainer(
        model=script.model_name_or_path,
        ref_model=script.ref_model_name_or_path,
        args=config,
        eval_dataset=held_out,
        processing_class=script.tokenizer_name_or_path,
        revision=script.model_revision,
        display=display,
    )
    try:
        found = trainer.evaluate()
    finally:
        display.close()
    if is_primary():
        table = Table(title=f"{trainer.pairing.policy.title} against {trainer.pairing.sentence}")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in found.items():
            table.add_row(name, f"{value:.6g}")
        Console().print(table)
    leave()
    return OK


def run_check(script: ScriptArguments, config: DPOConfig) -> int:
    """`jax-dpo check`: the report on the data; 0 where at least one pair is left."""
    from jax_dpo.data.prepare import prepare
    from jax_dpo.data.summary import check_report
    from jax_dpo.policy import load_model
    from jax_dpo.trainer.chat import chat_warnings, fit
    from jax_dpo.trainer.datasets import check_token_ids, data_options

    policy = load_model(script.model_name_or_path, revision=script.model_revision)
    fitted = fit(policy, script.tokenizer_name_or_path, config)
    policy, tokenizer = fitted.policy, fitted.tokenizer
    data = prepare(
        _train_rows(script),
        lambda: tokenizer.loaded,
        tokenizer_key=tokenizer.fingerprint,
        options=data_options(config),
    )
    check_token_ids(data, tokenizer)
    data.warnings.extend(chat_warnings(data.pairs, data.name, tokenizer, policy.files, config))
    print(check_report(data, tokenizer.loaded if len(data.pairs) else None))
    data.require_pairs()
    return OK


def run_generate(
    model: str,
    prompts: Sequence[str],
    *,
    adapter: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> int:
    """`jax-dpo generate`: answers prompts as a user's turn, or continues them where the tokenizer has no chat template."""
    from jax_dpo.models.generate import generate
    from jax_dpo.policy import load_model
    from jax_dpo.trainer.datasets import Tokenizer
    from jax_dpo.trainer.samples import stop_ids_of

    policy = load_model(model, adapter=adapter)
    tokenizer = Tokenizer(None, policy).loaded
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = generate(
        policy.config,
        policy.params,
        ids,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids_of(policy, tokenizer),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        print(text if len(prompts) == 1 else ("\n" if i else "") + f"> {prompt}\n{text}")
    return OK


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt: through the chat template where there is one, as training renders it."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])
