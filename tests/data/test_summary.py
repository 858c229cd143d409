"""The report of `jax-dpo check`. Oracle: the recorded token counts of the golden files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from jax_dpo.data.prepare import DataOptions, PreparedData, prepare
from jax_dpo.data.summary import check_report, example_pair, summarize

GOLDEN = Path(__file__).parent.parent / "golden"
TOKENIZER = AutoTokenizer.from_pretrained(str(GOLDEN / "tokenizers" / "chatml"))


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "tokenization" / f"{name}.json").read_text("utf-8"))


def data(name: str, **options: Any) -> PreparedData:
    options = {"use_cache": False, "max_length": None} | options
    return prepare(golden(name)["rows"], lambda: TOKENIZER, name="rows.jsonl", options=DataOptions(**options))


def test_numbers() -> None:
    s = summarize(data("text_explicit_chatml"))
    sizes = np.array(
        [
            [len(w[f"{k}_ids"]) for k in ("prompt", "chosen", "rejected")]
            for w in golden("text_explicit_chatml")["prepared"]
        ]
    )
    assert (s.rows, s.kept, s.cut, s.dropped) == (13, 13, 0, {})
    assert s.flagged == {"empty": 2}
    for k, name in enumerate(("prompt", "chosen", "rejected")):
        assert [s.lengths[name][i] for i in (0, 1, 4)] == [sizes[:, k].min(), np.median(sizes[:, k]), sizes[:, k].max()]
    assert s.lengths["total"][4] == sizes.sum(1).max()
    assert s.layout == "plain text, with a prompt column"


@pytest.mark.parametrize("name", ["text_explicit_chatml", "conversation_implicit_chatml"])
def test_the_example_is_what_the_model_sees(name: str) -> None:
    want = golden(name)["prepared"][1]
    pair = example_pair(data(name), TOKENIZER, 1)
    assert pair.row == 2
    assert pair.tokens == tuple(len(want[f"{k}_ids"]) for k in ("prompt", "chosen", "prompt", "rejected"))
    for part in ("prompt", "chosen", "rejected"):
        assert TOKENIZER(getattr(pair, part), add_special_tokens=False)["input_ids"] == want[f"{part}_ids"]


def test_the_report_says_it_all() -> None:
    report = check_report(data("conversation_explicit_chatml", max_length=48), TOKENIZER)
    lines = report.splitlines()
    long = [i + 1 for i in range(8) if i not in golden("conversation_explicit_chatml")["configs"][2]["kept_rows"]]
    assert long
    assert f"  rows read 8, kept {8 - len(long)}, left out {len(long)}" in lines
    assert f"rows.jsonl, row {long[0]}: too_long: the prompt has" in report
    assert "  cut to max_length 48 (keep_start): " in report
    assert "  used, empty: 1 with an answer without a token of its own: row 5" in lines
    at = lines.index("Row 1 as the model sees it:")
    assert lines[at + 1].startswith("  prompt (") and "not trained on" in lines[at + 1]
    assert "    |<|im_start|>assistant" in lines[at:]
    assert "    |⏎" in lines[at:]


def test_keep_end_shows_both_prompts_and_the_rest_is_optional() -> None:
    pairs = data("text_explicit_chatml", max_length=20, truncation_mode="keep_end")
    apart = int(np.flatnonzero(~pairs.pairs.shared)[0])
    assert "prompt of rejected" in check_report(pairs, TOKENIZER, example=apart)
    assert "as the model sees it" not in check_report(pairs)


def test_a_report_on_nothing() -> None:
    nothing = prepare(
        [{"prompt": "a", "chosen": None, "rejected": "b"}] * 30, lambda: TOKENIZER, options=DataOptions(use_cache=False)
    )
    report = check_report(nothing, TOKENIZER, most_drops=5)
    assert "kept 0, left out 30" in report and "  and 25 more" in report and "Tokens" not in report
