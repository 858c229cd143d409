"""Loads what make_exports.py left with the transformers and PEFT of this environment, and compares it with the numbers beside it.

    python scripts/served/load_with_transformers.py OUT

Knows neither JAX nor jax_dpo. What a run leaves must load wherever its input does (the directory `base` of its family), and give the
same: logits within 2e-4 of those that jax_dpo computed, ids, the rendered chat, the tokens at which to stop. Exit code 1 names what
does not hold.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ATOL = 2e-4


def faults(directory: Path, want: dict[str, Any]) -> list[str]:
    """What is wrong with a directory; one sentence each."""
    try:
        # transformers 4 leaves out Gemma 2's soft cap of attention in any other form.
        how = {_dtype(): torch.float32, "attn_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(str(directory), **how).eval()
        with torch.no_grad():
            got = model(torch.tensor([list(want["ids"])])).logits[0]
        found = []
        difference = (got - torch.tensor(want["logits"])).abs().max().item()
        if not difference <= ATOL:
            found.append(f"logits differ by {difference:.3g}")
        if not (directory / "adapter_config.json").exists():
            stops = GenerationConfig.from_pretrained(str(directory)).eos_token_id
            if stops != [2]:
                found.append(f"generation stops at {stops}")
        return found + _tokenizer_faults(directory, want)
    except Exception as error:  # whatever a loader raises is the answer to whether it loads
        return [f"does not load: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"]


def _tokenizer_faults(directory: Path, want: dict[str, Any]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    found = []
    if tokenizer(want["text"])["input_ids"] != want["text_ids"]:
        found.append("other ids")
    if tokenizer.apply_chat_template(want["chat"], tokenize=False) != want["rendered"]:
        found.append("another chat")
    return found


def _dtype() -> str:
    return "torch_dtype" if int(transformers.__version__.split(".")[0]) < 5 else "dtype"


def main() -> int:
    out = Path(sys.argv[1])
    expected: dict[str, dict[str, Any]] = json.loads((out / "expected.json").read_text())
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    wrong, loaded = 0, 0
    inputs = {name: faults(out / name, want) for name, want in expected.items() if name.endswith("/base")}
    for name, want in expected.items():
        base = inputs[f"{name.split('/')[0]}/base"]
        if base:
            # An input that this version does not load is not ours to mend; one in its own spelling must load.
            print(f"{'FAIL' if want['old'] else 'skip'}  {name}: its input {base[0]}")
            wrong += want["old"]
            continue
        found = [] if name in inputs else faults(out / name, want)
        print(f"FAIL  {name}: {'; '.join(found)}" if found else f"ok    {name}")
        wrong += bool(found)
        loaded += not found
    print(f"{loaded} of {len(expected)} directories load and give the same, {wrong} do not")
    return int(wrong > 0 or not loaded)


if __name__ == "__main__":
    sys.exit(main())
