"""completion_turns, overlong and system turns through the trainer. Oracle: log-probabilities from plain logits of the saved models."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

START = 1  # <|im_start|>


def turns(words: str, *more: str) -> list[dict[str, str]]:
    """An answer: the assistant's words, and for each further pair of words a turn of the user and one of the assistant."""
    found = [{"role": "assistant", "content": words}]
    for i, text in enumerate(more):
        found.append({"role": ("user", "assistant")[i % 2], "content": text})
    return found


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": "make a plan"}],
            "chosen": turns("water light", "and then", "air sun earth"),
            "rejected": turns("time", "why", "question words"),
        },
        {
            "prompt": [{"role": "user", "content": "ask a child"}],
            "chosen": turns("sun", "has it", "light"),
            "rejected": turns("year teacher"),
        },
    ]
    return tiny.write_rows(tmp_path_factory.mktemp("turns") / "rows.jsonl", rows)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def marked(ids: list[int], decode: Any, last_only: bool) -> list[bool]:
    """Which tokens of an answer are the assistant's: all of its turns but for their headers, by the template's own words."""
    begins = [0, *(i for i, token in enumerate(ids) if token == START)]
    found: list[bool] = []
    for begin, end in pairwise([*begins, len(ids)]):
        turn = ids[begin:end]
        if begin == 0:  # its header is the end of the prompt
            header = 0
        elif decode(turn).startswith("<|im_start|>user"):
            header = len(turn)
        else:
            header = next(n for n in range(len(turn)) if decode(turn[:n]).endswith("assistant\n"))
        found += [False] * header + [not last_only or begin == begins[-1]] * (len(turn) - header)
    return found


@pytest.mark.parametrize("which", ["assistant", "last"])
def test_what_is_trained_on_is_the_assistants(
    which: str, usual: dict[str, Any], conversations: Path, model: Path, tmp_path: Path
) -> None:
    from jax_dpo import DPOConfig, DPOTrainer, load_model

    other = tiny.make_model(tmp_path / "other", seed=1)
    args = DPOConfig(str(tmp_path / "out"), per_device_eval_batch_size=2, bf16=False, completion_turns=which)
    trainer = DPOTrainer(
        str(model), str(other), args=args, train_dataset=str(conversations), eval_dataset=str(conversations)
    )
    found = trainer.evaluate()
    decode = trainer.processing_class.decode
    policy, want, tokens = load_model(model), {"chosen": [], "rejected": []}, 0
    for row in trainer.train_dataset:
        for side, sums in want.items():
            prompt, answer = list(row["prompt_ids"]), list(row[f"{side}_ids"])
            ids = np.array([prompt + answer], np.int32)
            logp = log_softmax(np.asarray(policy(ids), np.float64))[0]
            each = [logp[len(prompt) - 1 + i, t] for i, t in enumerate(answer)]
            marks = marked(answer, decode, which == "last")
            assert any(marks) and (len(answer) < 12 or not all(marks))
            sums.append(sum(x for x, m in zip(each, marks) if m))
            tokens += sum(marks)
    for side, sums in want.items():
        assert found[f"eval_logps/{side}"] == pytest.approx(np.mean(sums), abs=2e-4)
    scored = trainer.eval_sets[None].pairs.scored_lengths()
    assert scored.sum() == tokens


def test_a_run_with_all_of_it(usual: dict[str, Any], conversations: Path, tmp_path: Path) -> None:
    """Trains, and goes on after a stop, by the command line; `check` takes the same options."""
    long = json.loads(conversations.read_text().splitlines()[0])
    long["chosen"][-1]["content"] = "earth " * 200
    rows = [json.loads(line) for line in conversations.read_text().splitlines()]
    file = tiny.write_rows(
        tmp_path / "rows.jsonl", [*rows, {**long, "system": "be plain"}, {**rows[0], "system": "be plain"}]
    )
    told = {
        "completion_turns": "last",
        "overlong": "drop",
        "max_length": 128,
        "system_column": True,
        "system_turn": "merged",
    }
    flags = tiny.flags({**usual, **told, "dataset_name": file, "max_steps": 2, "save_steps": 1})
    ended = tiny.jax_dpo("train", *flags, "--output_dir", tmp_path / "out")
    assert ended.code == 0, ended.err
    start = tiny.records(tmp_path / "out", "start")[0]
    assert start["data"]["train"]["dropped"] == {"too_long": 1} and start["data"]["train"]["kept"] == 3
    said = tiny.jax_dpo("check", file, "--model", usual["model_name_or_path"], *tiny.flags(told))
    assert said.code == 0 and "left out, too_long: 1" in said.out and "be plain" not in said.err
