"""The tiny model and pairs of tests/run, and several processes of `jax-dpo` that share four virtual devices each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "run"))

from cluster import Cluster
from tiny import make_model, text_rows, write_rows


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """How a run is started: the same options on one process of eight devices, or on two of four."""
    folder = tmp_path_factory.mktemp("cluster")
    options = {
        "model_name_or_path": make_model(folder / "model"),
        "dataset_name": write_rows(folder / "train.jsonl", text_rows(40, seed=1)),
        "eval_dataset": write_rows(folder / "eval.jsonl", text_rows(8, seed=2)),
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-6,
        "target_kl": 5.0,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "gradient_checkpointing": False,
        "resume_from_checkpoint": "auto",
    }
    return Cluster(folder, options)
