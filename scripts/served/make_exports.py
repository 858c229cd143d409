"""Trains one step of a tiny model of each family and leaves what comes out, with what it must give when another program loads it.

    python -m scripts.served.make_exports OUT [--family qwen3 ...]

OUT/<family>/ has the input (`base`), `final` and `best` of runs of `jax-dpo train`, and an adapter merged. OUT/expected.json says for
each of them: logits of a sequence of ids, computed here, the ids of a text, a rendered chat. The models are the recorded ones of
tests/golden, in the spelling of transformers 4 where the name says so; their template lies in chat_template.jinja or inside
tokenizer_config.json. `load_with_transformers.py` reads all of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
IDS = (3, 5, 7, 11, 13, 17, 19, 23)
TEXT = "<|im_start|>user\nhi<|im_end|>\n"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
PAIRS = [
    {"prompt": f"Say {word}:", "chosen": f" {word} {word}", "rejected": f" not {word}"}
    for word in ("water", "light", "air", "sun")
]
FAMILIES = ("gemma", "gemma2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
ADAPTED = ("gemma2", "llama", "mixtral", "qwen3")  # a family of each kind; a run of its own costs its compile time


def model(out: Path, family: str, *, old: bool, inside: bool) -> Path:
    """The recorded model with a tokenizer whose ids it has: rows are added to its embedding, 512 in all.

    old: config.json and tokenizer_config.json as transformers 4 writes them. inside: the template in tokenizer_config.json.
    """
    from safetensors.numpy import load_file, save_file

    source = GOLDEN / "models" / family
    shutil.copytree(GOLDEN / "tokenizers" / "chatml", out)
    tensors = load_file(source / "model.safetensors")
    random = np.random.default_rng(3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            more = 0.05 * random.standard_normal((512 - len(tensors[name]), tensors[name].shape[1]))
            tensors[name] = np.concatenate([tensors[name], more.astype(np.float32)])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / ("config.v4.json" if old else "config.json")).read_text())
    ids = {"vocab_size": 512, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    (out / "config.json").write_text(json.dumps(config | ids, indent=2))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "pad_token_id": 0}))
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    if old:
        del tokenizer["backend"]
        tokenizer |= {"extra_special_tokens": {}, "additional_special_tokens": ["<|im_start|>"]}
    if inside:
        tokenizer["chat_template"] = (out / "chat_template.jinja").read_text()
        (out / "chat_template.jinja").unlink()
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    return out


def train(model: Path, run: Path, pairs: Path, **more: Any) -> None:
    """One step at a rate that moves the weights, evaluated once, so that there is a `best` too."""
    from jax_dpo.cli import main

    options: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": pairs,
        "eval_dataset": pairs,
        "output_dir": run,
    }
    options |= {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 1e-3}
    options |= {
        "per_device_train_batch_size": 4,
        "bf16": "false",
        "gradient_checkpointing": "false",
        "target_kl": 100,
        **more,
    }
    flags = [
        str(x)
        for name, value in options.items()
        for x in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]
    code = main(["train", *flags])
    if code not in (0, 3):
        sys.exit(f"training {model} ended with {code}")


def expected(directory: Path, tokenized: bool) -> dict[str, Any]:
    """Logits by jax_dpo, and what transformers' tokenizer of this environment gives."""
    from transformers import AutoTokenizer

    from jax_dpo import load_model

    found: dict[str, Any] = {"ids": IDS, "logits": np.asarray(load_model(directory)(np.asarray([IDS])))[0].tolist()}
    if tokenized:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        found |= {"text": TEXT, "text_ids": tokenizer(TEXT)["input_ids"], "chat": CHAT}
        found["rendered"] = tokenizer.apply_chat_template(CHAT, tokenize=False)
    return found


def exports(out: Path, family: str, *, old: bool, inside: bool, pairs: Path) -> Mapping[str, dict[str, Any]]:
    """All directories that a family's runs leave, by their names below `out`."""
    from jax_dpo.policy import convert

    folder = out / (family + "-v4" * old)
    source = model(folder / "base", family, old=old, inside=inside)
    train(source, folder / "whole", pairs)
    kinds = ["base", "whole/final", "whole/best"]
    if family in ADAPTED:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = {"use_peft": "true", "lora_r": 4, "lora_target_modules": targets, "lora_dropout": 0}
        train(source, folder / "lora", pairs, **lora)
        convert(folder / "lora" / "final", folder / "merged")
        kinds += ["lora/final", "lora/best", "merged"]
    return {f"{folder.name}/{kind}": {"old": old, **expected(folder / kind, tokenized=True)} for kind in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", nargs="*", default=FAMILIES, choices=FAMILIES)
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    out.mkdir(parents=True)
    pairs = out / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    found: dict[str, dict[str, Any]] = {}
    for i, family in enumerate(chosen.family):
        found |= exports(out, family, old=True, inside=i % 2 == 1, pairs=pairs)
        if family == "qwen3":  # and as transformers 5 writes it
            found |= exports(out, family, old=False, inside=False, pairs=pairs)
    (out / "expected.json").write_text(json.dumps(found))
    print(f"{len(found)} directories in {out}")


if __name__ == "__main__":
    main()
