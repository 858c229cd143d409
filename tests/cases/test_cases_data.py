"""Data as users bring them. Oracles: numbers of ids that TRL 1.16 gives, and what the table of cases says; both are written beside each.

Other inputs of each kind that were tried are in tests/data/test_formats.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoTokenizer

from jax_dpo import DPOConfig, DPOTrainer
from jax_dpo.errors import UserError


def trainer(model: Path, file: str, **options: Any) -> DPOTrainer:
    options = {"bf16": False, "train_sampling_strategy": "random", **options}
    return DPOTrainer(str(model), args=DPOConfig("out", **options), train_dataset=file)


def ids(model: Path, file: str, **options: Any) -> list[list[list[int]]]:
    rows = trainer(model, file, **options).train_dataset
    return [[list(row[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")] for row in rows]


def lengths(model: Path, file: str, **options: Any) -> list[tuple[int, ...]]:
    return [tuple(len(side) for side in row) for row in ids(model, file, **options)]


def check(model: Path, file: str, *more: str) -> tiny.Ended:
    return tiny.jax_dpo("check", file, "--model", model, *more)


def decoded(model: Path, row: list[list[int]]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    return [str(tokenizer.decode(side)) for side in row]


def test_bom_crlf(start: Path, inputs: Path) -> None:
    """huggingface/datasets#8241, pydantic/pydantic-ai#8316: a BOM, CRLF, no newline at the end."""
    want = [(39, 61, 19), (33, 77, 10), (26, 7, 7), (23, 12, 6)]
    assert lengths(start, "bom-crlf.jsonl") == lengths(start, "bom-crlf-plain.jsonl") == want
    assert ids(start, "bom-crlf.jsonl") == ids(start, "bom-crlf-plain.jsonl")
    rows = ids(start, "bom-crlf.jsonl")
    assert '{"route": "Lindö"}' in decoded(start, rows[0])[1] and "null" not in decoded(start, rows[0])[1]
    assert "\r\n" in "".join(decoded(start, rows[3]))
    assert "\ufeff" not in check(start, "bom-crlf.jsonl").out


def test_extra_columns(start: Path, inputs: Path) -> None:
    """axolotl-ai-cloud/axolotl#2415, oumi-ai/oumi#2636: other columns, one of them called messages."""
    assert lengths(start, "extra-columns.jsonl") == [(27, 14, 11), (25, 19, 7), (24, 16, 8)]
    said = check(start, "extra-columns.jsonl").out
    assert said.count("columns that are not read: id, messages, label, meta") == 1


def test_transcript_strings(start: Path, inputs: Path) -> None:
    """huggingface/trl#1858: as TRL by default; after the last turn that both sides share where that is told."""
    file = "transcript-strings.jsonl"
    assert lengths(start, file) == [(76, 12, 14), (31, 51, 39), (42, 12, 2)]
    assert decoded(start, ids(start, file)[0])[0].endswith("Assistant: F")
    assert [s.removesuffix("<|im_end|>") for s in decoded(start, ids(start, file)[2])[1:]] == [
        " better to throw them out.",
        " b",
    ]
    told = ids(start, file, data_format="transcript")
    assert [tuple(map(len, row)) for row in told] == [(74, 14, 16), (31, 51, 39), (40, 14, 4)]
    assert all(decoded(start, row)[0].endswith("\n\nAssistant:") for row in told)
    said = check(start, file).out
    assert "these are transcripts" in said and "the middle of a word" in said and "data_format: transcript" in said


def test_foreign_roles(start: Path, inputs: Path) -> None:
    """hiyouga/LlamaFactory#3264, QwenLM/Qwen3#1314: Human and Assistant; from and value, the conversation apart."""
    first, second = ids(start, "foreign-roles.jsonl"), ids(start, "foreign-roles-sharegpt.jsonl")
    assert [tuple(map(len, row)) for row in first] == [(29, 9, 8), (23, 21, 7)]
    assert [tuple(map(len, row)) for row in second] == [(47, 9, 8), (53, 21, 7)]
    standard = []
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    for line in Path("foreign-roles-sharegpt.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turn = lambda m: {"role": names[m["from"]], "content": m["value"]}  # noqa: E731
        answers = {side: [turn(row[side])] for side in ("chosen", "rejected")}
        standard.append({"prompt": [turn(m) for m in row["conversations"]], **answers})
    tiny.write_rows(Path("standard.jsonl"), standard)
    assert ids(start, "standard.jsonl") == second
    said = check(start, "foreign-roles-sharegpt.jsonl").out
    assert said.count("read as TRL's layout") == 1
    tiny.write_rows(
        Path("narrator.jsonl"), [standard[0], {**standard[1], "prompt": [{"role": "narrator", "content": "?"}]}]
    )
    said = check(start, "narrator.jsonl").out
    assert (
        "narrator.jsonl, row 2: invalid: prompt[0].role is 'narrator', expected one of system, developer, user" in said
    )


def test_tool_arguments_text(start: Path, inputs: Path) -> None:
    """axolotl-ai-cloud/axolotl#3824, huggingface/transformers#45419: arguments as text and as an object."""
    text, parsed = (324, 65, 64), (318, 59, 58)
    assert lengths(start, "tool-arguments-text.jsonl") == [text]
    assert lengths(start, "tool-arguments-object.jsonl") == [parsed]
    for file in ("text", "object"):
        assert lengths(start, f"tool-arguments-{file}.jsonl", tool_arguments="parsed") == [parsed]
        assert "None" not in "".join(decoded(start, ids(start, f"tool-arguments-{file}.jsonl")[0]))
    assert sorted(lengths(start, "tool-arguments-mixed.jsonl")) == sorted([text, parsed])
    said = check(start, "tool-arguments-text.jsonl").out
    assert '{\\"room\\": \\"cellar\\"}' in said and "tool_arguments: parsed" in said
    assert "tool_arguments" not in check(start, "tool-arguments-object.jsonl").out


@pytest.mark.slow
def test_split_names(start: Path, inputs: Path) -> None:
    """princeton-nlp/SimPO#18: splits with names of their own, from the data card."""
    for name in ("wrong", "right"):
        config = Path(f"split-names-{name}.yaml")
        config.write_text(config.read_text().replace("model_name_or_path: START", f"model_name_or_path: {start}"))
    wrong = tiny.jax_dpo("train", "split-names-wrong.yaml", "--output_dir", "wrong")
    assert wrong.code == 2 and not Path("wrong").exists()
    assert "test_prefs, train_gen, train_prefs" in wrong.err and "dataset_train_split" in wrong.err
    right = tiny.jax_dpo("train", "split-names-right.yaml", "--output_dir", "right")
    assert right.code in (0, 3), right.err
    data = tiny.records(Path("right"), "start")[0]["data"]
    assert data["train"]["kept"] == 6 and [part["kept"] for part in data["eval"].values()] == [3]


def test_wrong_roles(start: Path, inputs: Path) -> None:
    """huggingface/trl#2385, huggingface/smol-course#260: an answer by the user, a system column, two user turns, a system turn only."""
    assert lengths(start, "wrong-roles.jsonl") == [(22, 19, 8), (83, 12, 9), (25, 9, 28)]
    said = check(start, "wrong-roles.jsonl").out
    assert "row 1: invalid: rejected[0].role is 'user': an answer must end in a turn of 'assistant'" in said
    assert "columns that are not read: system" in said
    put = ids(start, "wrong-roles.jsonl", system_column=True)
    with_system = [row for row in put if "<|im_start|>system" in decoded(start, row)[0]]
    assert len(put) == 3 and len(with_system) >= 1


def test_nothing_left(start: Path, inputs: Path, tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#9618, #4108: every row falls out, each for a reason of its own."""
    drop = ["invalid", "empty", "identical", "duplicate", "small_gap"]
    options = ["--model_name_or_path", start, "--dataset_name", "nothing-left.jsonl", "--drop_rows", *drop]
    ended = tiny.jax_dpo("train", *options, "--output_dir", "out")
    assert ended.code == 2 and not (Path("out") / "run.jsonl").exists()
    assert "5 rows read, 0 kept" in ended.err
    for reason, row, what in (
        ("invalid", "rows 1, 2", "empty list"),
        ("identical", "row 3", "same tokens"),
        ("empty", "row 4", "empty"),
        ("too_long", "row 5", "2814 tokens, max_length is 1024"),
    ):
        line = next(x for x in ended.err.splitlines() if x.strip().startswith(reason))
        assert row in line and what in line
    with pytest.raises(UserError, match="0 kept"):
        trainer(start, "nothing-left.jsonl", drop_rows=drop).train()
    cut = check(start, "nothing-left.jsonl", "--drop_rows", *drop, "--max_prompt_length", "512")
    assert cut.code == 0 and "kept 1" in cut.out
    assert "cut on the left to max_prompt_length 512" in cut.out


def test_default_system_turn(start_of: Callable[..., Path], inputs: Path) -> None:
    """huggingface/alignment-handbook#117, huggingface/trl#1930: the template adds a system turn, once and in the prompt."""
    model = start_of(template="default-system-turn.jinja")
    rows = ids(model, "default-system-turn.jsonl")
    assert [tuple(map(len, row)) for row in rows] == [(48, 10, 8), (42, 12, 10)]
    texts = [decoded(model, row) for row in rows]
    assert texts[0][0].count("careful clerk") == 1
    assert not any("careful clerk" in text for text in [*texts[0][1:], *texts[1]])


def test_double_bos(start_of: Callable[..., Path], inputs: Path) -> None:
    """OpenRLHF/OpenRLHF#393, ml-explore/mlx-examples#1095: the template writes BOS, and so does the tokenizer."""
    rows = ids(start_of("llama2", "double-bos.jinja"), "default-system-turn.jsonl")
    assert rows[0][0][:4] == [0, 310, 268, 28]
    assert [tuple(map(len, row)) for row in rows] == [(21, 10, 7), (41, 11, 10)]


def test_no_system_turn(start_of: Callable[..., Path], inputs: Path) -> None:
    """vllm-project/vllm#2964, vllm-project/guidellm#67: a template that refuses a system turn and trims contents."""
    model = start_of(template="no-system-turn.jinja")
    assert lengths(model, "no-system-turn.jsonl")[:2] == [(28, 9, 9)] * 2
    said = check(model, "no-system-turn.jsonl", "--drop_rows", "invalid", "identical").out
    assert "row 3: invalid: the chat template refuses the conversation" in said and "system" in said
    assert "row 4: identical" in said
    assert "system_turn: merged puts the system turn's text into the user's turn" in said
    assert lengths(model, "no-system-turn.jsonl", system_turn="merged")[2] == (40, 10, 8)


@pytest.mark.slow
def test_no_pad_token(start_of: Callable[..., Path], inputs: Path) -> None:
    """meta-llama/llama#481, huggingface/transformers#27880: no pad token, -1 in the config, a tokenizer that adds EOS itself."""
    model = start_of("bos_eos_nopad", pad_token_id=-1)
    rows = ids(model, "pairs3.jsonl")
    assert [tuple(map(len, row)) for row in rows] == [(14, 5, 5), (12, 5, 3), (14, 5, 5)]
    assert rows[0][1] == [351, 83, 69, 1, 1]
    assert "answers end in two" in check(model, "pairs3.jsonl").out
    options = ["--model_name_or_path", model, "--dataset_name", "pairs3.jsonl", "--per_device_train_batch_size", 1]
    ended = tiny.jax_dpo("train", *options, "--max_steps", 1, "--bf16", "false", "--output_dir", "out")
    assert ended.code in (0, 3), ended.err


def test_alternating_roles(start_of: Callable[..., Path], inputs: Path) -> None:
    """huggingface/alignment-handbook#93, unslothai/unsloth#334: a template that insists on user and assistant in turn."""
    model = start_of("llama2")
    assert lengths(model, "alternating-roles.jsonl") == [(26, 9, 7), (48, 8, 8)]
    assert "row 2: invalid: the chat template refuses the conversation" in check(model, "alternating-roles.jsonl").out


@pytest.mark.slow
def test_reference_columns(start: Path, inputs: Path) -> None:
    """huggingface/trl#6434, #885: columns with somebody's log-probabilities are not read, with precomputing or without (TRL's numbers)."""
    for more in ([], ["--precompute_ref_log_probs", "true"]):
        out = Path(f"out{len(more)}")
        options = ["--dataset_name", "reference-columns.jsonl", "--model_name_or_path", start, "--output_dir", out]
        options += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4, "--num_train_epochs", 1]
        options += ["--logging_steps", 1, "--lr_scheduler_type", "constant", "--learning_rate", 1e-3, "--bf16", "false"]
        ended = tiny.jax_dpo("train", *options, *more)
        assert ended.code in (0, 3), ended.err
        (step,) = tiny.records(out, "train")
        assert step["loss"] == pytest.approx(0.693147, rel=5e-5)
        assert step["grad_norm"] == pytest.approx(2.01934, rel=5e-5)
        given = options
    said = check(start, "reference-columns.jsonl").out
    assert "ref_chosen_logps" in said and "ref_rejected_logps" in said
    # With the option that uses them: other numbers are refused, missing ones named, the reference's own taken.
    given += ["--precompute_ref_log_probs", "true", "--ref_log_probs_columns", "true"]
    for file in ("reference-columns.jsonl", "reference-columns-old.jsonl"):
        ended = tiny.jax_dpo("train", *given, "--dataset_name", file, "--output_dir", "other")
        assert ended.code == 2 and f"{file}, row 1" in ended.err and "-3.25 and -2.5" in ended.err
        assert "-23.1811 and -21.396" in ended.err
        shutil.rmtree("other", ignore_errors=True)
    said = check(
        start, "reference-columns.jsonl", "--precompute_ref_log_probs", "true", "--ref_log_probs_columns", "true"
    ).out
    assert "row 2: invalid: ref_rejected_logps is" in said and "row 3: invalid: ref_chosen_logps is null" in said
    ended = tiny.jax_dpo("train", *given, "--dataset_name", "reference-columns-true.jsonl", "--output_dir", "true")
    assert ended.code in (0, 3), ended.err
    (step,) = tiny.records(Path("true"), "train")
    assert step["loss"] == pytest.approx(0.693147, rel=5e-5) and step["grad_norm"] == pytest.approx(2.01934, rel=5e-5)
