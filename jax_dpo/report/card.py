"""The model card (README.md) of a trained policy: what it is, what it was trained on, how, and how far it moved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jax_dpo.report import format as fmt
from jax_dpo.report import summary
from jax_dpo.report.records import Record
from jax_dpo.report.summary import Run, eval_value, part

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_RECIPE = (
    "learning_rate", "lr_scheduler_type", "beta", "loss_type", "kl_coef", "target_kl", "max_length",
    "max_grad_norm", "weight_decay", "seed",
)  # fmt: skip


def model_card(
    records: Iterable[Record], base_model: str, *, step: int | None = None, license: str | None = None
) -> str:
    """The text of README.md, YAML header first, for `final/` or, with the `step` of the best checkpoint, for `best/`.

    `base_model` is what was trained: a name on the Hub goes into the header, a local directory is named by its last
    part only. The licence is `license`, else that of the `start` record's model, else that of the card of a local base
    model; where none is known, none is claimed.
    """
    run = summary.summarise(records)
    local = Path(base_model).exists() or not _HUB_NAME.fullmatch(base_model)
    name = Path(base_model).name if local else base_model
    header: dict[str, Any] = {} if local else {"base_model": base_model}
    known = license or part(run.start, "model").get("license") or (_license_of(Path(base_model)) if local else None)
    header |= {"license": str(known)} if known else {}
    header |= {"library_name": "peft" if run.adapter else "transformers", "tags": ["dpo", "jax-dpo"]}
    import yaml

    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    chosen = "" if step is None else f" This is the checkpoint of step {step:,}, the best one by its evaluation."
    what = "A LoRA adapter for" if run.adapter else "A version of"
    blocks = [
        f"---\n{front}---",
        f"# {_line(name)}, tuned to preferences",
        f"{what} {_line(name)}, trained with Direct Preference Optimization (DPO, https://arxiv.org/abs/2305.18290) by "
        f"jax_dpo {_line(run.start.get('version') or '')}".rstrip()
        + "."
        + chosen,
        "## Training\n\n" + _training(run),
        "## Evaluation\n\n" + _evaluation(run, step),
        "## Use\n\n" + _use(base_model if not local else name, run.adapter),
    ]
    return "\n\n".join(blocks) + "\n"


def _training(run: Run) -> str:
    start, options = run.start, part(run.start, "options")
    rows = [
        ("model", summary.model_sentence(start)),
        ("trained", summary.trained_sentence(start)),
        ("reference", str(start.get("reference") or fmt.NONE)),
        *((f"data, {name}", text) for name, text in summary.data_sentences(start)),
        ("plan", summary.plan_sentence(start)),
        ("devices", summary.device_sentence(start)),
        *((key, fmt.option(options[key])) for key in _RECIPE if options.get(key) is not None),
    ]
    text = _table(("", ""), rows)
    if run.actions:
        text += "\n\nOn the way, the KL control stepped in:\n\n"
        text += "\n".join(f"- step {a['step']:,}: {_line(summary.action_text(a))}" for a in run.actions[-20:])
    return text


def _evaluation(run: Run, step: int | None) -> str:
    if not run.evals:
        return "No evaluation set was given: how well the policy does on pairs it has not seen is not known."
    blocks = []
    for name in run.set_names:
        found = run.evals_of(name)
        last = next((r for r in reversed(found) if step is None or r["step"] <= step), found[-1])
        first = found[0]
        columns = [first] if first is last else [first, last]
        rows = [
            ("loss", *(fmt.number(eval_value(r, "loss")) for r in columns)),
            ("accuracy", *(summary.accuracy_text(r) for r in columns)),
            ("reward margin", *(fmt.signed(eval_value(r, "rewards/margins")) for r in columns)),
            (f"{run.kl_title}, nats per token", *(fmt.number(eval_value(r, "kl_divergence")) for r in columns)),
        ]
        head = (f"held-out pairs{f' ({name})' if name else ''}", *(f"step {r['step']:,}" for r in columns))
        blocks.append(_table(head, rows))
    exact = any(eval_value(r, "kl_divergence") is not None for r in run.evals)
    if exact and run.target_kl is not None:
        blocks.append(f"KL is exact, over the whole vocabulary at every answer token; its bound was {run.target_kl:g}.")
    if run.verdict is not None and step is None:
        blocks.append(f"Verdict: {_line(run.headline)}.")
    return "\n\n".join(blocks)


def _use(base: str, adapter: bool) -> str:
    if adapter:
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({base!r})",
            "model = PeftModel.from_pretrained(base, '.')  # the directory of this card",
            f"tokenizer = AutoTokenizer.from_pretrained({base!r})",
        ]
    else:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            "model = AutoModelForCausalLM.from_pretrained('.')  # the directory of this card",
            "tokenizer = AutoTokenizer.from_pretrained('.')",
        ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(_line(c) for c in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def _line(text: Any) -> str:
    """One line of Markdown in which nothing ends a cell or begins an element."""
    return re.sub(r"([\\|`<>\[\]*])", r"\\\1", " ".join(fmt.plain(text).split()))


def _license_of(folder: Path) -> str | None:
    """The licence that the card of a local model names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    import yaml

    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    if front is None:
        return None
    try:
        found = yaml.safe_load(front[1])
    except yaml.YAMLError:
        return None
    value = found.get("license") if isinstance(found, dict) else None
    return value if isinstance(value, str) else None
