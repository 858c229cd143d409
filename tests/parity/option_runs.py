"""TRL's own short runs with options that change which pairs are used, when it logs, or how it steps: prints their logs as JSON.

    python tests/parity/option_runs.py > tests/golden/trl/runs.json

needs the parity extra (trl 1.16.0, transformers 5.24.0). The model is the qwen3 start of tests/golden/training, the pairs are those of
pairs7.jsonl; a CPU computes in float32.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden"
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 42,
}
PAIRS = "pairs7.jsonl"
# name: options beside the common ones; `pairs` is another file. eval_dataset is the training set.
RUNS: dict[str, dict[str, Any]] = {
    "drop_last": {"dataloader_drop_last": True},
    "adafactor": {"optim": "adafactor", "learning_rate": 1e-4, "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "learning_rate": 1e-2, "weight_decay": 0.1},
    "log_epochs": {"logging_strategy": "epoch", "max_steps": 3},
    "log_first_only": {"logging_strategy": "no", "logging_first_step": True, "max_steps": 2},
    "eval_delay": {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3},
    "stream": {"dataset_streaming": True, "max_steps": 3, "pairs": "pairs40.jsonl"},
    "stream_that_ends": {"dataset_streaming": True, "max_steps": 3},
    "eval_delay_epochs": {"eval_strategy": "epoch", "eval_delay": 2, "num_train_epochs": 3},
    "short_micro_batch": {"gradient_accumulation_steps": 4, "lr_scheduler_type": "linear"},
    "windows_over_epochs": {
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 3,
        "logging_steps": 4,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 3,
    },
    "window_left_open": {"num_train_epochs": 1.5, "logging_steps": 2, "lr_scheduler_type": "linear"},
}


def run(options: dict[str, Any], start: str, out: str) -> list[dict[str, Any]]:
    """TRL's log_history without what clocks say."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    options = {**COMMON, **options}
    file = GOLDEN / "training" / options.pop("pairs", PAIRS)
    data = Dataset.from_list([json.loads(line) for line in file.read_text().splitlines()])
    if options.pop("dataset_streaming", False):
        data = data.to_iterable_dataset()
    args = DPOConfig(out, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **options)
    trainer = DPOTrainer(
        start, args=args, train_dataset=data, eval_dataset=data, processing_class=AutoTokenizer.from_pretrained(start)
    )
    with redirect_stdout(sys.stderr):  # without its live line it prints what it logs
        trainer.train()
    clocks = ("runtime", "per_second", "flos")
    return [{k: v for k, v in e.items() if not any(c in k for c in clocks)} for e in trainer.state.log_history]


def main() -> None:
    found = {}
    for name, options in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            start = shutil.copytree(GOLDEN / "training" / "start" / "qwen3", Path(folder) / "start")
            for file in (GOLDEN / "tokenizers" / "chatml").iterdir():
                shutil.copyfile(file, start / file.name)
            found[name] = run(options, str(start), str(Path(folder) / "out"))
    body = ",\n".join(f'"{name}": {json.dumps(log)}' for name, log in found.items())
    print(f"{{\n{body}\n}}")


if __name__ == "__main__":
    main()
