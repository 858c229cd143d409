"""The benchmark's workload: sizes against the figures that it is described with, token counts against the tokenizer itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.bench import against_trl, workload


def test_sizes_are_those_that_are_told() -> None:
    layers, head = workload.linear_parameters()
    norms = workload.LAYERS * 2 * (workload.HIDDEN + workload.HEAD) + workload.HIDDEN
    assert round((layers + head + norms) / 1e6) == 42
    assert round(workload.pair_gflop(np.array([[152, 95, 95]]))) == 94

    lengths = workload.pair_lengths()
    assert lengths.shape == (256, 3)
    # One standard error of a mean of 256 draws is sigma's 0.66 of the mean / 16.
    np.testing.assert_allclose(lengths.mean(axis=0), [152, 95, 95], rtol=3 * 0.66 / 16)
    np.testing.assert_allclose(np.log(lengths).std(axis=0), 0.6, rtol=0.15)
    np.testing.assert_array_equal(lengths, workload.pair_lengths())


def test_texts_have_the_tokens_that_are_counted(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    lengths = workload.pair_lengths()[:8]
    workload._write_tokenizer(tmp_path)
    workload._write_pairs(tmp_path / "pairs.jsonl", lengths)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (workload.PAD, workload.END)
    for line, (prompt_count, *answer_counts) in zip((tmp_path / "pairs.jsonl").open(), lengths, strict=True):
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert len(prompt) == prompt_count
        for answer, count in zip((row["chosen"], row["rejected"]), answer_counts, strict=True):
            ids = tokenizer(row["prompt"] + answer + tokenizer.eos_token)["input_ids"]
            assert ids[:prompt_count] == prompt and len(ids) == prompt_count + count
            assert min(ids[:-1]) >= workload.FIRST_WORD and ids[-1] == workload.END


def test_the_table_divides_what_it_shows() -> None:
    side = {"pairs_per_second": 2.0, "peak_bytes": 2**30, "losses": [0.7, 0.6], "matmul_gflops": 400.0, "row_fill": 0.8}
    other = side | {"pairs_per_second": 0.5, "peak_bytes": 2**32}
    options = against_trl.argparse.Namespace(skip=4, steps=20)
    lines = against_trl.table({"ours": side, "trl": other}, 100.0, options).splitlines()
    assert lines[2] == "| jax_dpo | 2.000 | 1.00 GiB | 50% of 400 GFLOP/s | 0.6000 |"
    assert lines[4] == "| ratio | 4.00 | 0.25 | | |"


def test_only_the_timed_steps_count() -> None:
    options = against_trl.argparse.Namespace(skip=2, steps=5)
    result = against_trl.measured([100.0, 101.0, 103.0, 105.0, 107.0], [0.7] * 5, options)
    assert result["pairs_per_second"] == pytest.approx(3 * 4 / 6)
    assert result["peak_bytes"] > 2**20
    with pytest.raises(SystemExit, match="4 steps were run"):
        against_trl.measured([1.0, 2.0, 3.0, 4.0], [0.7] * 4, options)
