"""What all runs share: one device (a step takes the pairs that the options say), caches of their own, a tiny model and its pairs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import chat_rows, make_model, scored_rows, text_rows, write_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "weights"))  # the rules of vLLM's loader, served_rules.py


@pytest.fixture(scope="module", autouse=True)
def _whole_runs(one_device: None, quick_compile: None) -> None:
    """Every test here runs the trainer."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 51,000 parameters."""
    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl (24 pairs), eval.jsonl (8), chat.jsonl (24 conversations), scored.jsonl (24, of which 6 have a small gap)."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", text_rows(24, seed=1))
    write_rows(folder / "eval.jsonl", text_rows(8, seed=2))
    write_rows(folder / "chat.jsonl", chat_rows(24, seed=1))
    write_rows(folder / "scored.jsonl", scored_rows(24, seed=1))
    return folder


@pytest.fixture(scope="session")
def usual(model: Path, data: Path) -> dict[str, Any]:
    """Options of a quick run: 8 pairs a step in two micro-batches, logged at each step. All runs with them compile one program."""
    return {
        "model_name_or_path": model,
        "dataset_name": data / "train.jsonl",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "gradient_checkpointing": False,
    }


@pytest.fixture(scope="session")
def evaluated(usual: dict[str, Any], data: Path) -> dict[str, Any]:
    """The same with held-out pairs."""
    return {
        **usual,
        "eval_dataset": data / "eval.jsonl",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
    }
