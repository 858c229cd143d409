"""What a run leaves in its directory: whether one is there already, reports, models, the verdict."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_dpo.arrays import Tree, flatten
from jax_dpo.data.check import write_drops
from jax_dpo.errors import UserError
from jax_dpo.policy import Policy, load_model, save_model
from jax_dpo.report.card import model_card
from jax_dpo.report.records import Record
from jax_dpo.sharding.place import fetch
from jax_dpo.trainer.datasets import PairSet
from jax_dpo.weights.hub import name_of
from jax_dpo.weights.peft import read_adapter

# What a run writes; --overwrite_output_dir removes this and nothing else.
OWN_FILES = ("run.jsonl", "verdict.json", "report.html", "dropped.jsonl")
OWN_FOLDERS = ("best", "final", "tensorboard", "curriculum")


def holds_run(output_dir: Path) -> bool:
    return (output_dir / "run.jsonl").exists() or any(output_dir.glob("checkpoint-*/trainer_state.json"))


def finished(output_dir: Path) -> bool:
    return (output_dir / "verdict.json").exists()


def refuse_second_run(output_dir: Path, *, attempts: bool = False) -> None:
    """Raises UserError for a directory that holds a run, or earlier `attempts` at one, with the ways out."""
    if holds_run(output_dir) or attempts:
        raise UserError(
            "output-dir-taken",
            f"{output_dir} holds a run already. To go on with it: --resume_from_checkpoint true (or auto). To start over in its "
            "place: --overwrite_output_dir. To keep it: another --output_dir.",
        )


def own_entries(output_dir: Path) -> list[Path]:
    """The files and folders of the run that is there; those of earlier attempts (`trainer/retry.py`) are not among them."""
    named = [output_dir / name for name in (*OWN_FILES, *OWN_FOLDERS)]
    checkpoints = [state.parent for state in output_dir.glob("checkpoint-*/trainer_state.json")]
    return [entry for entry in (*named, *checkpoints) if entry.exists()]


def clear_run(output_dir: Path) -> None:
    """Removes what a run of ours wrote, and leaves everything else alone."""
    for entry in own_entries(output_dir):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def make_output_dir(output_dir: Path) -> None:
    """Raises UserError where the directory cannot be made or written to."""
    try:
        if output_dir.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise UserError(
            "output-dir-unusable",
            f"output_dir {output_dir} cannot be written to: {e.strerror}. Give a directory that can, with --output_dir.",
        ) from e


def trained_policy(output_dir: Path, policy: Policy, *, best: bool) -> Policy:
    """The policy that a finished run left in `output_dir`: its best model, where that is wanted and there, or its final one."""
    folder = output_dir / ("best" if best and (output_dir / "best").is_dir() else "final")
    if policy.config.lora is None:
        return load_model(folder)
    base = policy.base()
    return base.with_adapter(read_adapter(folder, base.config))


def write_dropped(output_dir: Path, sets: Mapping[str, PairSet]) -> None:
    """dropped.jsonl: every row that was left out, of all sets; absent where there is none."""
    drops = {name: s.data.drops for name, s in sets.items() if s.data.drops}
    if drops:
        write_drops(output_dir / "dropped.jsonl", drops)


def export(
    policy: Policy,
    params: Tree,
    out: Path,
    *,
    tokenizer_files: Mapping[str, bytes],
    primary: bool,
    dtype: str = "auto",
    merge: bool = False,
    records: list[Record] | None = None,
    step: int | None = None,
    replace: bool = True,
) -> None:
    """Writes trained parameters as a Hugging Face directory or a PEFT adapter, with a model card where there are records.

    Every process calls it: the parameters are gathered from all; one writes.
    """
    arrays = flatten(params)
    if not primary:
        fetch(arrays)
        return
    from jax import process_count

    whole = fetch(arrays) if process_count() > 1 else arrays
    save_model(policy, out, dtype, merge=merge, arrays=whole, tokenizer_files=tokenizer_files, replace=replace)
    if records:
        (out / "README.md").write_text(model_card(records, name_of(policy.files.path), step=step), encoding="utf-8")


def hf_trainer_state(
    history: list[dict[str, Any]],
    *,
    step: int,
    epoch: float,
    best_step: int | None,
    best_metric: float | None,
    output_dir: Path,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """trainer_state.json with the keys of Hugging Face's trainers."""
    return {
        "best_global_step": best_step,
        "best_metric": best_metric,
        "best_model_checkpoint": str(output_dir / f"checkpoint-{best_step}") if best_step is not None else None,
        "epoch": epoch,
        "global_step": step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": history,
        "stateful_callbacks": {},
        "trial_name": None,
        "trial_params": None,
        **facts,
    }


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
