"""docs/from-trl.md: every option, argument and method of TRL's DPO, and what it is here. options_page.py writes it; a test holds it.

Names and defaults of TRL are those of tests/golden/trl/options.json; everything else is read from the code.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jax_dpo import _NOT_HERE
from jax_dpo.config import DPOConfig, ScriptArguments
from jax_dpo.config.advice import ADVICE, PYTHON_ADVICE, VALUE_ADVICE, Workers
from jax_dpo.config.fields import Advice, SameAs, default_of, show
from jax_dpo.trainer.trl_surface import ARGUMENTS, ATTRIBUTES
from scripts.options_page import cell

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "from-trl.md"
TRL: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "golden" / "trl" / "options.json").read_text(encoding="utf-8")
)

HEAD = """\
# From TRL

Made by `make docs` from the code: do not edit this page. It compares with TRL 1.16 and transformers 5.24.

Change the import. The script below is TRL's, but for its first line:

```python
from jax_dpo import DPOConfig, DPOTrainer
from datasets import load_dataset

dataset = load_dataset("trl-lib/ultrafeedback_binarized")
args = DPOConfig(output_dir="outputs", learning_rate=1e-6, beta=0.1, eval_strategy="steps", report_to="tensorboard")
trainer = DPOTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct", args=args, train_dataset=dataset["train"], eval_dataset=dataset["test"]
)
trainer.train()
trainer.save_model("outputs/policy")
```

and `trl dpo --config run.yaml --learning_rate 5e-7` is `jax-dpo train --config run.yaml --learning_rate 5e-7`.

The same options give the same numbers: order of the pairs, tokens, losses, metrics, schedule, optimizer and adapters follow TRL's, and
tests hold them to its own logs. No option is accepted and ignored. What has no meaning here is refused with a sentence that says what
to write instead, all of it at once and before anything is loaded; where its value only says what happens here anyway
(`push_to_hub=False`), it is taken.

What a run does beyond TRL: the exact KL to the reference is measured, checkpoints are ranked and the run is judged by it; two equal runs
are equal to the bit, a resumed one included; a number that is not finite is never hidden. [options.md](options.md) lists all options,
those without a counterpart in TRL too; [metrics.md](metrics.md) has every metric and where TRL's differs.
"""

# Where an option means what TRL's does and more: what is more.
BETTER: dict[str, str] = {
    "output_dir": "A directory that holds a run is refused unless you say what to do with it.",
    "resume_from_checkpoint": "Read by the trainer itself; `auto` goes on where a run is unfinished. Resumed runs are equal to the bit.",
    "bf16": "On a CPU unset is float32, and a CPU needs no `use_cpu`.",
    "gradient_checkpointing": "Attention's output is kept, the rest of a layer is made again.",
    "eval_strategy": "The end of the training is always evaluated; every pair counts once, whatever the batches.",
    "eval_delay": "The end of the training is evaluated all the same.",
    "dataloader_drop_last": "Training alone: held-out pairs are all evaluated.",
    "metric_for_best_model": "Unset, the reward margin of the checkpoints whose KL is within `target_kl`.",
    "load_best_model_at_end": "`best/` and `final/` are both written, whatever this says.",
    "save_total_limit": "The best checkpoint stays, and the one that a rollback would go to.",
    "sync_ref_model": "Works in float32, and its state is in the checkpoint (TRL's restarts from disk).",
    "precompute_ref_log_probs": "Kept by content for later runs, resumable; evaluations load the reference, so that their KL stays exact.",
    "per_device_train_batch_size": "Pairs are packed into rows: less padding, the same numbers. `micro_batch_tokens` bounds memory alone.",
    "loss_type": "Finite where only a part of TRL's formula overflows; `use_weighting` works with `hinge`.",
    "label_smoothing": "As in TRL not read by `sigmoid`, with a warning; `sigmoid_label_smoothing: true` is cDPO (TRL before 0.29).",
    "max_length": "What is dropped or cut is counted and named by row.",
    "pad_to_multiple_of": "Rows are packed; this lengthens them further.",
    "report_to": "`run.jsonl` and `report.html` are always written.",
    "project": "TRL's is read by Trackio alone; here wandb shows the run under it.",
    "lora_dropout": "As in TRL silent unless `disable_dropout` is false; that is said.",
    "datasets": "The rows of a file that are left out are named by file and line; a `split` may be a part, as `train[:1000]`.",
    "dataset_streaming": "As in TRL in the data's own order. What lies on this machine is read whole.",
    "dataset_name": "A local file or directory is fine; no builder is named.",
    "model_name_or_path": "GGUF files too.",
    "test_split_size": "Seeded: the split is the same in each run and on each host (TRL's is drawn anew).",
}


def page() -> str:
    """The whole page."""
    script = {name: value for part in ("ScriptArguments", "ModelConfig") for name, value in TRL[part].items()}
    parts = [
        HEAD,
        "## DPOConfig\n\n" + LEGEND,
        table(DPOConfig, TRL["DPOConfig"]),
        "## Script and model arguments\n\nOn the command line and in YAML.\n",
        table(ScriptArguments, script),
        "## A mixture of data sets\n\nIn YAML; each entry of `datasets` has TRL's "
        + ", ".join(f"`{name}`" for name in TRL["DatasetConfig"])
        + ". So is `env`, which sets environment variables.\n",
        table(ScriptArguments, TRL["DatasetMixtureConfig"]),
        "## Values\n\nValues of options that are here, which TRL, transformers or older scripts know and jax_dpo does not take.\n",
        values(),
        "## Arguments of DPOTrainer\n",
        arguments(),
        "## Methods and attributes of DPOTrainer\n",
        methods(),
        "## Other names to import\n\n| `from trl import` | what to do |\n|---|---|\n"
        + "".join(f"| `{name}` | {cell(text)} |\n" for name, text in _NOT_HERE.items()),
        "## Older names\n\nOf TRL and transformers before these versions, and of other scripts.\n",
        older(),
    ]
    return "\n".join(parts)


LEGEND = """\
**same**: the same name, meaning and default. **better**: the same, and what the line says. **another name**: taken for the option
that is named. **absent**: refused with the sentence, but for the values that are listed as taken.
"""


def table(cls: type, names: dict[str, Any]) -> str:
    """A line for each of TRL's options: its default, what it is here, and what is to be said."""
    ours = {item.name: default_of(item) for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    lines = ["| option | TRL's default | here | |", "|---|---|---|---|"]
    for name, default in names.items():
        lines.append(f"| `{name}` | `{show(default)}` | {' | '.join(standing(name, default, ours))} |")
    return "\n".join(lines) + "\n"


def standing(name: str, default: Any, ours: dict[str, Any]) -> tuple[str, str]:
    """(same, better, another default, another name or absent; the sentence)."""
    if name in ours:
        words = BETTER.get(name, "")
        if ours[name] in (default, "") or name == "output_dir":
            return ("better" if words else "same"), cell(words)
        return f"default `{show(ours[name])}`", cell(words)
    words = ADVICE[name]
    if isinstance(words, SameAs):
        return "another name", f"`{words.option}`"
    return "absent", cell(capital(words) + taken(words))


def taken(words: str) -> str:
    """The values that ask for nothing, as the end of a sentence."""
    if not isinstance(words, Advice) or not words.values:
        return "."
    if isinstance(words, Workers):
        return ". Any number is taken: it changes nothing of the result."
    shown = ", ".join(f"`{show(value)}`" for value in words.values)
    return f". Taken: {shown}."


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def values() -> str:
    lines = ["| option | value | what to do |", "|---|---|---|"]
    together: dict[tuple[str, str], list[str]] = {}
    for (name, value), text in VALUE_ADVICE.items():
        together.setdefault((name, text), []).append(value)
    for (name, text), found in together.items():
        lines.append(f"| `{name}` | {', '.join(f'`{v}`' for v in found)} | {cell(capital(text))}. |")
    return "\n".join(lines) + "\n"


def arguments() -> str:
    """In TRL's order."""
    given = {
        "model": "Same: a directory or a Hub name; also a GGUF file, a model of `load_model`, a transformers model object.",
        "ref_model": "Same.",
        "args": "Same: `DPOConfig`.",
        "train_dataset": "Same, an `IterableDataset` with `max_steps` among them; also a list of dicts or a file.",
        "eval_dataset": "Same; several sets by name give `eval_<name>_` in front of every metric.",
        "processing_class": "Same; `tokenizer=` is taken too.",
        "callbacks": "Objects with any of `on_log`, `on_evaluate`, `on_save`, called with TRL's arguments. They may look, not steer.",
        "peft_config": "Same: `LoraConfig` of jax_dpo or of PEFT.",
    }
    order = ("model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class")
    order += ("compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config")
    lines = ["| argument | here |", "|---|---|"]
    for name in order:
        text = given.get(name) or f"Absent. {capital(ARGUMENTS[name])}{taken(ARGUMENTS[name])}"
        lines.append(f"| `{name}` | {cell(text)} |")
    return "\n".join(lines) + "\n"


def methods() -> str:
    """The public methods that are here, and what is answered of the others."""
    here = {
        "train": "`resume_from_checkpoint` as in TRL, and `auto`.",
        "evaluate": "Same; any pairs can be given.",
        "save_model": "Writes a model that transformers and vLLM load (TRL writes what it trained in: float32); `dtype=`, `merge=`.",
        "state": "`log_history`, `global_step`, `epoch`, `best_metric`, `best_model_checkpoint`, `best_global_step`.",
        "train_dataset": "The tokenized pairs, with TRL's columns.",
        "processing_class": "Same.",
        "add_callback": "Same.",
        "remove_callback": "Same.",
        "pop_callback": "Same.",
        "log_metrics": "Same.",
        "save_metrics": "Same.",
        "save_state": "Same.",
        "is_world_process_zero": "Same.",
        "is_local_process_zero": "Same.",
        "end": "Same.",
    }
    lines = ["| name | here |", "|---|---|"]
    lines += [f"| `{name}` | {cell(text)} |" for name, text in here.items()]
    lines += [f"| `{name}` | Absent. {cell(capital(text))}. |" for name, text in ATTRIBUTES.items()]
    return "\n".join(lines) + "\n"


def older() -> str:
    known = {name for part in TRL.values() for name in part}
    lines = ["| name | what to do |", "|---|---|"]
    for name, text in sorted(ADVICE.items()):
        if name not in known and name not in PYTHON_ADVICE:
            lines.append(f"| `{name}` | {cell(capital(text) + taken(text))} |")
    return "\n".join(lines) + "\n"
