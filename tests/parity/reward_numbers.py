"""What transformers' sequence classifiers give the answers of a few pairs.

`python tests/parity/reward_numbers.py [FOLDER]` (torch) writes tiny classifiers of several families and their numbers in float32, by
default to tests/golden/reward, which the tests of every day compare with. Each sequence is run alone, without padding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = GOLDEN / "tokenizers" / "chatml"
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "num_labels": 1,
}
# pad_token_id: 2 ends every plain text, so that the token before it counts; None takes the last token; 0 never occurs.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"pad_token_id": 2},
    "qwen2": {"pad_token_id": None, "sliding_window": None},
    "gemma2": {"pad_token_id": 0, "sliding_window": 16, "query_pre_attn_scalar": 4},
}
PROMPTS = ("The long child and home:", "What is plain water made of?", "Ask the man")
ANSWERS = (
    (" water light air and the sun over the earth", " time question"),
    (" words", " the teacher has a year of questions, and time to make them known"),
    (" light air sun", " year time words"),
)


def rows(kind: str) -> list[dict[str, Any]]:
    """The pairs as text with a prompt column, as text whose answers begin with the prompt, or as conversations."""
    found: list[dict[str, Any]] = []
    for prompt, (chosen, rejected) in zip(PROMPTS, ANSWERS, strict=True):
        if kind == "text":
            found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        elif kind == "implicit":
            found.append({"chosen": prompt + chosen, "rejected": prompt + rejected})
        else:
            found.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen.strip()}],
                    "rejected": [{"role": "assistant", "content": rejected.strip()}],
                }
            )
    return found


def ids_of(tokenizer: Any, row: dict[str, Any], side: str) -> list[int]:
    """One answer with its prompt as a reward model reads it."""
    if isinstance(row[side], str):
        return list(tokenizer(row.get("prompt", "") + row[side] + tokenizer.eos_token)["input_ids"])
    text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def write(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    numbers: dict[str, Any] = {}
    for seed, (family, own) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **{**SHAPE, **own})
        model = AutoModelForSequenceClassification.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases begin at 1 and 0, which would hide them
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder / family)
        model = AutoModelForSequenceClassification.from_pretrained(folder / family, attn_implementation="eager").eval()
        numbers[family] = {}
        for kind in ("text", "implicit", "chat"):
            with torch.no_grad():
                numbers[family][kind] = [
                    [
                        model(input_ids=torch.tensor([ids_of(tokenizer, row, side)])).logits[0, 0].item()
                        for side in ("chosen", "rejected")
                    ]
                    for row in rows(kind)
                ]
    (folder / "rewards.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN / "reward"
    target.mkdir(parents=True, exist_ok=True)
    write(target)
