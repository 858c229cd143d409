"""Which rows of a tokenized data set a run uses, and why the others are left out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_dpo.data.atomic import replacing
from jax_dpo.data.tokens import EMPTY_CHOSEN, EMPTY_REJECTED, IDENTICAL, TORN, TokenTable, whole_lengths
from jax_dpo.errors import UserError

# What `drop_rows` can name, with what each means. Where a row has several, the first is its reason.
DROP_REASONS = {
    "invalid": "something that cannot be used: null, missing, wrong type, empty list, refused by the chat template",
    "empty": "an answer without a token of its own",
    "identical": "two equal answers",
    "torn": "answers cut to their last character (no prompt column, no common beginning, a space at the end of chosen; as TRL splits them)",
    "small_gap": "a score gap that is too small",
    "duplicate": "the texts of an earlier row",
}
# TRL leaves these out whatever drop_rows says.
TOO_LONG = "too_long"
CUT, DROP = OVERLONG = ("cut", "drop")
_EPSILON = 1e-9  # 0.9 - 0.75 is a hair over 0.15 in floating point, 3.15 - 3.0 a hair under


@dataclass(frozen=True)
class Drop:
    """A row left out: its number in `file` (from 1; the line in JSONL), the reason, and what was found."""

    file: str
    row: int
    reason: str
    detail: str


class Selection(NamedTuple):
    """`kept` int64 [M]: rows of the table in order. `drops`: rows left out, in order.

    `flagged`: for each reason that is not in drop_rows, the numbers of the rows that have it and are used all the same.
    """

    kept: np.ndarray
    drops: list[Drop]
    flagged: dict[str, list[int]]


def check_drop_rows(drop_rows: Sequence[str]) -> None:
    """Raises `UserError` for a reason that `drop_rows` cannot name."""
    for reason in drop_rows:
        if reason not in DROP_REASONS:
            raise UserError(
                "drop-rows-unknown",
                f"drop_rows has {reason!r}. Known: {', '.join(DROP_REASONS)} (rows whose prompt fills max_length are always "
                "left out, as in TRL).",
            )


def select_rows(
    table: TokenTable,
    files: Sequence[str],
    *,
    drop_rows: Sequence[str] = ("invalid",),
    min_gap: float = 0.15,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    max_prompt_length: int | None = None,
    overlong: str = CUT,
) -> Selection:
    """Choose the rows of a run.

    files: the names of the table's files, by `file_of`.
    drop_rows: reasons for which rows are left out; rows with another of the reasons are used and counted in `flagged`.
    min_gap: `small_gap` is a score of chosen that is not at least this much above that of rejected, where scores are given.
    max_length, truncation_mode, max_prompt_length: under keep_start, rows whose prompt (after max_prompt_length) has
        max_length tokens or more are left out, as in TRL: nothing of an answer would be left of them.
    overlong: `drop` leaves out all rows of which a sequence (prompt and one answer) is longer than max_length.

    Raises `UserError` for an invalid row where `drop_rows` does not hold `invalid`.
    """
    check_drop_rows(drop_rows)
    drops = _invalid_rows(table, files, drop_rows)
    lengths = whole_lengths(table)
    prompts = lengths[:, 0]
    if max_prompt_length is not None:
        prompts = np.minimum(prompts, max_prompt_length)
    longest = prompts + lengths[:, 1:].max(1)
    limit = max_length if max_length is not None and truncation_mode == "keep_start" else None
    flagged: dict[str, list[int]] = {reason: [] for reason in DROP_REASONS if reason not in drop_rows}
    kept: list[int] = []
    earlier: dict[int, int] = {}  # texts, by their first row -> the row of them that is used
    for k in range(len(table)):
        issues = _issues(table, k, min_gap)
        twin = int(table.twin[k])
        if twin in earlier:
            issues["duplicate"] = f"prompt, chosen and rejected are those of row {int(table.number[earlier[twin]])}"
        if limit is not None and prompts[k] >= limit:
            issues[TOO_LONG] = f"the prompt has {int(prompts[k])} tokens, max_length is {limit}"
        elif overlong == DROP and max_length is not None and longest[k] > max_length:
            issues[TOO_LONG] = f"prompt and answer have {int(longest[k])} tokens, max_length is {max_length}"
        reason = next((r for r in issues if r in drop_rows or r == TOO_LONG), None)
        if reason is not None:
            drops.append((int(table.row[k]), _drop(table, files, k, reason, issues[reason])))
            continue
        for r in issues:
            flagged[r].append(int(table.number[k]))
        kept.append(k)
        earlier.setdefault(twin, k)
    drops.sort(key=lambda item: item[0])
    return Selection(np.asarray(kept, np.int64), [drop for _, drop in drops], {r: n for r, n in flagged.items() if n})


def write_drops(path: str | Path, drops: Mapping[str, Sequence[Drop]]) -> None:
    """Write one JSON object a line, `{set, file, row, reason, detail}`, for the rows left out of each named set.

    The file is whole or absent, and empty where nothing was left out. Raises `UserError` where it cannot be written.
    """
    path = Path(path)
    lines = [
        json.dumps({"set": name} | asdict(drop), ensure_ascii=False) for name, some in drops.items() for drop in some
    ]
    try:
        with replacing(path) as file:
            file.writelines(f"{line}\n".encode("utf-8", "replace") for line in lines)
    except OSError as error:
        raise UserError("drops-unwritable", f"{path} cannot be written: {error.strerror or error}.") from error


def name_rows(numbers: Sequence[int], most: int = 8) -> str:
    """`row 3` or `rows 3, 5, 9 and 12 more`."""
    shown = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _invalid_rows(table: TokenTable, files: Sequence[str], drop_rows: Sequence[str]) -> list[tuple[int, Drop]]:
    invalid = table.facts.invalid
    if invalid and "invalid" not in drop_rows:
        _, file_of, number, problem = invalid[0]
        more = f" {len(invalid) - 1} more rows are invalid too." if len(invalid) > 1 else ""
        raise UserError(
            "row-invalid",
            f"{files[file_of]}, row {number}: {problem}. Mend the row, or put `invalid` into drop_rows to leave such rows "
            f"out.{more}",
        )
    return [(i, Drop(files[f], number, "invalid", problem)) for i, f, number, problem in invalid]


def _drop(table: TokenTable, files: Sequence[str], k: int, reason: str, detail: str) -> Drop:
    return Drop(files[int(table.file_of[k])], int(table.number[k]), reason, detail)


def _issues(table: TokenTable, k: int, min_gap: float) -> dict[str, str]:
    """What is wrong with row `k` of the table by itself, in the order of `DROP_REASONS`."""
    flags, gap = int(table.flags[k]), float(table.gap[k])
    issues = {}
    sides = [side for side, bit in (("chosen", EMPTY_CHOSEN), ("rejected", EMPTY_REJECTED)) if flags & bit]
    if sides:
        issues["empty"] = f"{' and '.join(sides)} {'is' if len(sides) == 1 else 'are'} empty"
    if flags & IDENTICAL:
        issues["identical"] = "chosen and rejected are the same tokens"
    if flags & TORN:
        issues["torn"] = (
            "chosen and rejected have no beginning in common and chosen ends in a space, so all but the last character of chosen is the "
            "prompt, as in TRL: write a prompt column"
        )
    if not math.isnan(gap) and gap < min_gap - _EPSILON:
        issues["small_gap"] = f"the score of chosen is {gap:.6g} above that of rejected, {min_gap:g} is the least"
    return issues
