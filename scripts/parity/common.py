"""What both sides share: where inputs lie, the options of every run, how the log becomes arrays."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.parity.cases import Case

Arrays = dict[str, np.ndarray]
TOKENS, BATCH = 24, 4  # of the model families' inputs

# Both trainers get these, word for word. Both would compute in bfloat16 on an accelerator otherwise.
COMMON = {
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
}
# One step of Adam without a first moment, with an epsilon beside which the root of the second is nothing: w - (lr / eps) g. Only
# this trainer needs it: torch can be asked for its gradients.
PROBE_GAIN = 1024.0
PROBE = {
    "adam_epsilon": 1e12,
    "learning_rate": PROBE_GAIN * 1e12,
    "adam_beta1": 0.0,
    "max_grad_norm": 0,
    "max_steps": 1,
}
PROBE |= {"lr_scheduler_type": "constant", "weight_decay": 0.0}

# What clocks say, and what transformers counts beside the log.
_NOT_COMPARED = ("runtime", "per_second", "total_flos", "train_loss")


@dataclass(frozen=True)
class Inputs:
    """The directory that `prepare.write_inputs` has filled."""

    folder: Path

    def model(self, name: str) -> str:
        return str(self.folder / ("ggufs" if name.endswith(".gguf") else "models") / name)

    def adapter(self, name: str) -> str:
        return str(self.folder / "adapters" / name)

    def tokenizer(self, name: str) -> str:
        return str(self.folder / "tokenizers" / name)

    def export(self, case: Case) -> Path:
        """Where this side leaves what the other side is to open."""
        return self.folder / "exports" / case.file

    def rows(self, case: Case) -> list[dict[str, Any]]:
        """The first rows of the case's text, to train on."""
        return self._read(case.data)[: case.extra.get("rows", case.rows)]

    def held_out(self, case: Case) -> list[dict[str, Any]]:
        return self._read(f"{case.data}.eval")[: case.extra.get("held_out", 8)]

    def _read(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "texts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def log_arrays(log: Iterable[Mapping[str, Any]]) -> Arrays:
    """A log as one array a metric: `loss`, `eval_loss` and the like over the log lines that have them."""
    found: dict[str, list[float]] = {}
    for entry in log:
        if "loss" not in entry and "eval_loss" not in entry:
            continue
        prefix = "eval_" if "eval_loss" in entry else ""
        for name, value in entry.items():
            if name in ("step", "epoch"):
                found.setdefault(prefix + name, []).append(float(value))
            elif isinstance(value, int | float) and not any(part in name for part in _NOT_COMPARED):
                found.setdefault(name, []).append(float(value))
    return {name: np.asarray(values, np.float64) for name, values in found.items()}


def ids_arrays(rows: Iterable[Mapping[str, Any]]) -> Arrays:
    """Prepared rows as flat ids and the lengths that cut them."""
    rows = list(rows)
    found: Arrays = {}
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        found[f"ids/{column}"] = np.asarray([i for row in rows for i in row[column]], np.int64)
        found[f"ids/{column} lengths"] = np.asarray([len(row[column]) for row in rows], np.int64)
    return found


def padded_tokens(case: Case, seed: int, vocabulary: int) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    """(side of the padding, ids [B,T], mask [B,T]) for both sides."""
    random = np.random.default_rng([seed, len(case.name)])
    ids = random.integers(4, vocabulary, size=(BATCH, TOKENS))
    lengths = np.array([TOKENS, TOKENS - 5, 7, 1])
    for side in ("right", "left"):
        places = np.arange(TOKENS) if side == "right" else np.arange(TOKENS)[::-1]
        mask = (places[None, :] < lengths[:, None]).astype(np.int64)
        yield side, ids * mask, mask


def prefixed(prefix: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    return {f"{prefix}/{name}": value for name, value in arrays.items()}


def adapter_config(folder: Path) -> Arrays:
    """Every field of an adapter_config.json as a text, but for who wrote it, and on what."""
    fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name in ("peft_version", "base_model_name_or_path", "revision", "auto_mapping"):
        fields.pop(name, None)
    ordered = {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}
    return {f"adapter_config/{name}": np.asarray(json.dumps(value)) for name, value in ordered.items()}
