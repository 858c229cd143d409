"""The report on a data set that `jax-dpo check` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_dpo.data.check import DROP_REASONS, TOO_LONG, name_rows
from jax_dpo.data.prepare import PreparedData

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
GAP_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class DataSummary:
    """A data set in numbers.

    dropped, flagged: rows left out, and rows used all the same, by reason. cut, prompts_cut: pairs that `max_length` and
    `max_prompt_length` cut. lengths: for prompt, chosen, rejected (tokens after truncation) and total (prompt once, both
    answers) the values at `QUANTILES`; empty where no pair is left.
    """

    name: str
    layout: str
    rows: int
    kept: int
    dropped: dict[str, int]
    flagged: dict[str, int]
    cut: int
    prompts_cut: int
    lengths: dict[str, list[int]]


@dataclass(frozen=True)
class ExamplePair:
    """One tokenized pair as the model sees it: text and number of tokens of each part, after truncation.

    `rejected_prompt` differs from `prompt` only where keep_end cut the two sides differently.
    """

    row: int
    prompt: str
    chosen: str
    rejected_prompt: str
    rejected: str
    tokens: tuple[int, int, int, int]


def summarize(data: PreparedData) -> DataSummary:
    """The numbers of a prepared data set."""
    lengths: dict[str, list[int]] = {}
    if len(data.pairs):
        table = data.pairs.lengths()
        columns = dict(zip(("prompt", "chosen", "rejected"), table.T)) | {"total": data.pairs.tree_lengths()}
        lengths = {
            name: [int(x) for x in np.quantile(values, QUANTILES, method="higher")] for name, values in columns.items()
        }
    kind = "conversations" if data.facts.chat else "plain text"
    prompt = "with a prompt column" if data.facts.explicit else "the prompt is what both answers begin with"
    return DataSummary(
        name=data.name,
        layout=f"{kind}, {prompt}",
        rows=data.rows_read,
        kept=len(data.pairs),
        dropped=data.dropped,
        flagged={reason: len(numbers) for reason, numbers in data.flagged.items()},
        cut=data.cut,
        prompts_cut=int(data.pairs.prompt_cut.sum()),
        lengths=lengths,
    )


def example_pair(data: PreparedData, tokenizer: Any, i: int = 0) -> ExamplePair:
    """Pair `i` decoded, special tokens shown."""
    parts = data.pairs.tree(i)[:4]
    prompt, chosen, rejected_prompt, rejected = (tokenizer.decode(ids.tolist()) for ids in parts)
    p, c, q, r = (len(ids) for ids in parts)
    row = int(data.pairs.table.number[data.pairs.kept[i]])
    return ExamplePair(row, prompt, chosen, rejected_prompt, rejected, (p, c, q, r))


def check_report(data: PreparedData, tokenizer: Any | None = None, *, example: int = 0, most_drops: int = 20) -> str:
    """The report as text: counts, reasons with rows, lengths, warnings and one tokenized pair.

    tokenizer: for the example; None leaves it out. most_drops: how many of the rows left out are named one by one.
    """
    s = summarize(data)
    lines = [f"{s.name}: {s.layout}", f"  rows read {s.rows}, kept {s.kept}, left out {len(data.drops)}"]
    for reason, count in s.dropped.items():
        meaning = DROP_REASONS.get(reason, "a prompt that fills max_length" if reason == TOO_LONG else "")
        numbers = [drop.row for drop in data.drops if drop.reason == reason]
        lines.append(f"  left out, {reason}: {count} with {meaning}: {name_rows(numbers)}")
    for reason, numbers in data.flagged.items():
        lines.append(f"  used, {reason}: {len(numbers)} with {DROP_REASONS[reason]}: {name_rows(numbers)}")
    if data.options.max_length is not None:
        lines.append(f"  cut to max_length {data.options.max_length} ({data.options.truncation_mode}): {s.cut}")
    if data.options.max_prompt_length is not None:
        lines.append(
            f"  prompts cut on the left to max_prompt_length {data.options.max_prompt_length}: {s.prompts_cut}"
        )
    for column in data.options.columns:
        values = data.pairs.given(column)
        if values is not None:
            lines.append(
                f"  column {column}: {values.min():.6g} to {values.max():.6g}, mean {values.astype(np.float64).mean():.6g}"
            )
    lines += _gap_lines(data)
    lines += _length_table(s)
    if data.drops:
        lines += ["", "Rows left out:"]
        lines += [f"  {d.file}, row {d.row}: {d.reason}: {d.detail}" for d in data.drops[:most_drops]]
        if len(data.drops) > most_drops:
            lines.append(f"  and {len(data.drops) - most_drops} more")
    if data.warnings:
        lines += ["", "Warnings:", *(f"  - {warning}" for warning in data.warnings)]
    if tokenizer is not None and len(data.pairs):
        lines += ["", *_example_lines(example_pair(data, tokenizer, example))]
    return "\n".join(lines)


def _gap_lines(data: PreparedData) -> list[str]:
    """How the score gaps of the pairs that are left are spread, where the data have scores."""
    gaps = data.pairs.gap
    scored = gaps[np.isfinite(gaps)]
    if not len(scored):
        return []
    values = "  ".join(
        f"{_quantile_name(q)} {x:.4g}" for q, x in zip(GAP_QUANTILES, np.quantile(scored, GAP_QUANTILES))
    )
    without = len(gaps) - len(scored)
    return [f"  score gap, chosen - rejected: {values}" + (f"; {without} pairs have no scores" if without else "")]


def _quantile_name(q: float) -> str:
    return "least" if q == 0 else "most" if q == 1 else f"{q:.0%}"


def _length_table(summary: DataSummary) -> list[str]:
    if not summary.lengths:
        return []
    head = [_quantile_name(q) for q in QUANTILES]
    lines = ["", f"{'Tokens':<10}" + "".join(f"{h:>8}" for h in head)]
    return lines + [f"{name:<10}" + "".join(f"{v:>8}" for v in values) for name, values in summary.lengths.items()]


def _example_lines(pair: ExamplePair) -> list[str]:
    p, c, q, r = pair.tokens
    parts = [(f"prompt ({p} tokens, not trained on)", pair.prompt), (f"chosen ({c} tokens)", pair.chosen)]
    if (q, pair.rejected_prompt) != (p, pair.prompt):
        parts.append((f"prompt of rejected ({q} tokens, not trained on)", pair.rejected_prompt))
    parts.append((f"rejected ({r} tokens)", pair.rejected))
    lines = [f"Row {pair.row} as the model sees it:"]
    for title, text in parts:
        lines.append(f"  {title}")
        # A mark at both ends shows blanks and line breaks where one part meets the next.
        lines += [f"    |{line}" for line in f"{text}⏎".split("\n")]
    return lines
