"""From a source of pairs to what a run trains on: load, check, tokenize (or find in the cache), select."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.data.cache import default_cache_dir, entry_key, entry_path, read_entry, write_entry
from jax_dpo.data.check import CUT, DROP_REASONS, TOO_LONG, Drop, check_drop_rows, name_rows, select_rows
from jax_dpo.data.formats import AS_GIVEN, AUTO, Reading
from jax_dpo.data.load import Rows, load_rows
from jax_dpo.data.pairs import PAIR_COLUMNS, REF_ALIASES, REF_COLUMNS
from jax_dpo.data.repeats import repeats
from jax_dpo.data.tokenize import tokenize_rows, tokenizer_fingerprint
from jax_dpo.data.tokens import MOVED, Facts, TokenizedPairs, TokenTable
from jax_dpo.data.turns import ALL
from jax_dpo.errors import UserError, named


@dataclass(frozen=True)
class DataOptions:
    """How rows are chosen and cut; the names and defaults are `DPOConfig`'s.

    columns: which of `pairs.NUMBER_COLUMNS` are read of each pair; with `columns_needed` a data set that has not even the column is an
        error, else its pairs are as if nothing were said of them.
    overlong: `cut` cuts what is longer than max_length, `drop` leaves such pairs out.
    data_format, tool_arguments, system_turn, system_column: how rows are read (`formats.Reading`).
    completion_turns: which turns of an answer are trained on (`turns`).
    cache_dir: where tokenized data is kept; None is the default place (`cache.default_cache_dir`).
    use_cache: False tokenizes anew and keeps nothing.
    Raises `UserError` for a value that cannot be.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    max_prompt_length: int | None = None
    overlong: str = CUT
    drop_rows: tuple[str, ...] = ("invalid",)
    min_gap: float = 0.15
    columns: tuple[str, ...] = ()
    columns_needed: bool = True
    data_format: str = AUTO
    tool_arguments: str = AS_GIVEN
    system_turn: str = AS_GIVEN
    system_column: bool = False
    completion_turns: str = ALL
    cache_dir: str | Path | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        check_drop_rows(self.drop_rows)
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise UserError(
                "truncation-mode", f"truncation_mode is {self.truncation_mode!r}, expected keep_start or keep_end."
            )
        for name in ("max_length", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError("max-length", f"{name} is {value}, expected at least 1, or none for no limit.")

    @property
    def reading(self) -> Reading:
        return Reading(self.data_format, self.tool_arguments, self.system_turn, self.system_column)


@dataclass(frozen=True)
class PreparedData:
    """A data set ready to train on.

    pairs: the rows that are used, tokenized and cut. drops: the rows left out. flagged: rows that have one of the reasons of
    `DROP_REASONS` and are used all the same, by number. warnings: sentences for the user. from_cache: nothing was tokenized.
    files: the names of the table's files.
    """

    name: str
    options: DataOptions
    pairs: TokenizedPairs
    drops: list[Drop]
    flagged: dict[str, list[int]]
    warnings: list[str]
    from_cache: bool
    files: tuple[str, ...] = ()

    def row_names(self, positions: Sequence[int]) -> str:
        """Pairs, by their positions, as the rows that people find them by: `a.jsonl, rows 3, 5; b.jsonl, row 1`."""
        table, kept = self.pairs.table, self.pairs.kept[np.asarray(positions, np.int64)]
        by_file: dict[int, list[int]] = {}
        for k in kept.tolist():
            by_file.setdefault(int(table.file_of[k]), []).append(int(table.number[k]))
        return "; ".join(
            f"{self.files[f] if f < len(self.files) else self.name}, {name_rows(sorted(numbers), most=16)}"
            for f, numbers in sorted(by_file.items())
        )

    @property
    def facts(self) -> Facts:
        """What the tokenizer's pass found out."""
        return self.pairs.table.facts

    @property
    def rows_read(self) -> int:
        """Rows of the source."""
        return self.facts.rows_read

    @cached_property
    def dropped(self) -> dict[str, int]:
        """How many rows were left out for each reason."""
        return dict(Counter(drop.reason for drop in self.drops))

    @cached_property
    def cut(self) -> int:
        """Pairs of which `max_length` cut one sequence or both."""
        return int(self.pairs.cut.sum())

    @property
    def counts(self) -> dict[str, Any]:
        """The data set in numbers, as the run's record has it: name, rows, kept, dropped {reason: count}, cut."""
        return {
            "name": self.name,
            "rows": self.rows_read,
            "kept": len(self.pairs),
            "dropped": self.dropped,
            "cut": self.cut,
        }

    def require_pairs(self) -> None:
        """Raises `UserError` where no pair is left, with a line for each reason."""
        if len(self.pairs):
            return
        lines = [f"{self.name}: {self.rows_read} rows read, 0 kept, so there is nothing to train on."]
        for reason, count in self.dropped.items():
            some = [drop for drop in self.drops if drop.reason == reason]
            lines.append(
                f"  {reason}: {count} ({name_rows([d.row for d in some])}; row {some[0].row}: {some[0].detail})"
            )
        raise UserError("data-nothing-left", "\n".join(lines))


def prepare(
    source: Any,
    tokenizer_loader: Callable[[], Any],
    *,
    tokenizer_key: str | None = None,
    options: DataOptions = DataOptions(),
    split: str | None = None,
    config: str | None = None,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedData:
    """Load, check and tokenize a data set, or find it in the cache, and choose its rows.

    source: `Rows`, or what `load_rows` takes, with `split`, `config` and `name`.
    tokenizer_loader: gives the transformers tokenizer; called only where something must be tokenized.
    tokenizer_key: `tokenizer_fingerprint` of what the loader loads; None loads the tokenizer and asks it.
    progress: called with (rows done, rows in all) while tokenizing.

    A data set of which no row is left is returned as it is: `require_pairs` says so with the reasons.
    Raises `UserError` for everything in the data or the options that cannot be used, with file and row.
    """
    rows = load_rows(source, split=split, config=config, name=name)
    table, warnings, from_cache = _table(rows, tokenizer_loader, tokenizer_key, options, progress)
    o = options
    _check_columns(table.facts, options, rows.name)
    kept, drops, flagged = select_rows(
        table,
        rows.files,
        drop_rows=o.drop_rows,
        min_gap=o.min_gap,
        max_length=o.max_length,
        truncation_mode=o.truncation_mode,
        max_prompt_length=o.max_prompt_length,
        overlong=o.overlong,
    )
    pairs = TokenizedPairs(
        table,
        kept,
        max_length=o.max_length,
        truncation_mode=o.truncation_mode,
        max_prompt_length=o.max_prompt_length,
    )
    if bare := _without_scored(pairs, rows.files):
        drops = sorted([*drops, *bare.values()], key=lambda d: (rows.files.index(d.file), d.row))
        pairs = pairs.without(list(bare))
    warnings += _warnings(pairs, drops, flagged, options, rows.name)
    return PreparedData(rows.name, options, pairs, drops, flagged, warnings, from_cache, tuple(rows.files))


def _table(
    rows: Rows,
    tokenizer_loader: Callable[[], Any],
    tokenizer_key: str | None,
    options: DataOptions,
    progress: Callable[[int, int], None] | None,
) -> tuple[TokenTable, list[str], bool]:
    """The tokenized rows, what there is to say of the cache, and whether they came from it."""
    o = options
    reading: Any = {"columns": o.columns, "reading": o.reading, "completion_turns": o.completion_turns}
    if not options.use_cache:
        return tokenize_rows(rows, tokenizer_loader(), **reading, progress=progress), [], False
    tokenizer = None
    if tokenizer_key is None:
        tokenizer = tokenizer_loader()
        tokenizer_key = tokenizer_fingerprint(tokenizer)
    directory = Path(options.cache_dir).expanduser() if options.cache_dir is not None else default_cache_dir()
    path = entry_path(
        directory, entry_key(rows.fingerprint, tokenizer_key, o.columns, (*astuple(o.reading), o.completion_turns))
    )
    table = read_entry(path)
    if table is not None:
        return table, [], True
    warnings = (
        [named("token-cache-damaged", f"The cached tokens of {rows.name} were damaged ({path}); they are made anew.")]
        if path.exists()
        else []
    )
    tokenizer = tokenizer if tokenizer is not None else tokenizer_loader()
    table = tokenize_rows(rows, tokenizer, **reading, progress=progress)
    problem = write_entry(path, table)
    if problem is not None:
        warnings.append(
            named(
                "token-cache-unkept",
                f"The tokens of {rows.name} are not kept for the next run, which will tokenize again ({problem}).",
            )
        )
        return table, warnings, False
    # The file in place of the arrays: what is not looked at need not stay in memory.
    return read_entry(path) or table, warnings, False


def _without_scored(pairs: TokenizedPairs, files: Sequence[str]) -> dict[int, Drop]:
    """The pairs of which `max_length` leaves no token of a turn that is trained on, by their positions."""
    if not len(pairs.table.scored):
        return {}
    found = {}
    for i in np.flatnonzero((pairs.scored_lengths() == 0).any(1)).tolist():
        k = int(pairs.kept[i])
        said = "max_length leaves nothing of the turns that completion_turns trains on"
        found[i] = Drop(files[int(pairs.table.file_of[k])], int(pairs.table.number[k]), TOO_LONG, said)
    return found


def _check_columns(facts: Facts, options: DataOptions, name: str) -> None:
    """Raises `UserError` for a column that the run reads and that no row has."""
    if facts.absent_columns and options.columns_needed:
        column = facts.absent_columns[0]
        if column in REF_COLUMNS:
            raise UserError(
                "ref-columns-missing",
                f"{name} has no column {column!r} (or {REF_ALIASES[column]!r}), which ref_log_probs_columns takes the reference's "
                "log-probabilities from. Add the columns, or set ref_log_probs_columns to false to have them computed.",
            )
        raise UserError(
            "pair-column-missing",
            f"{name} has no column {column!r}, which pair_columns names. Add the column, or take {column} out of pair_columns"
            + (f"; columns that are not read: {', '.join(facts.unread_columns)}." if facts.unread_columns else "."),
        )


def _warnings(
    pairs: TokenizedPairs, drops: list[Drop], flagged: dict[str, list[int]], options: DataOptions, name: str
) -> list[str]:
    """What the user should know of the data before a run."""
    table = pairs.table
    found = []
    if table.facts.read_as:
        changes = "; ".join(table.facts.read_as)
        found.append(
            named(
                "data-read-as",
                f"{name}: read as TRL's layout: {changes}. With data_format: trl the rows are taken as they are.",
            )
        )
    found += [f"{name}: {hint}" for hint in table.facts.hints]
    invalid = [drop for drop in drops if drop.reason == "invalid"]
    if invalid:
        found.append(
            named(
                "rows-invalid",
                f"{name}: {_count(len(invalid))} left out as invalid: {name_rows([d.row for d in invalid])}. "
                f"Row {invalid[0].row}: {invalid[0].detail}.",
            )
        )
    for reason, numbers in flagged.items():
        found.append(
            named(
                "rows-flagged",
                f"{name}: {_count(len(numbers))} with {DROP_REASONS[reason]}, used all the same: {name_rows(numbers)}. "
                f"Put `{reason}` into drop_rows to leave them out.",
            )
        )
    long = [drop for drop in drops if drop.reason == TOO_LONG]
    if long:
        more = "" if options.overlong == CUT else ", or set overlong to cut"
        found.append(
            named(
                "rows-too-long",
                f"{name}: {_count(len(long))} left out as too long: {name_rows([d.row for d in long])}. "
                f"Row {long[0].row}: {long[0].detail}. "
                f"Raise max_length, or set max_prompt_length to cut prompts from the left{more}.",
            )
        )
    if options.max_prompt_length is not None and pairs.prompt_cut.any():
        found.append(
            named(
                "prompts-cut",
                f"{name}: the prompts of {_count(int(pairs.prompt_cut.sum()))} are cut on the left to max_prompt_length "
                f"{options.max_prompt_length}.",
            )
        )
    return found + _split_warnings(pairs, name) + _repeat_warnings(pairs, name) + _column_warnings(table.facts, name)


def _split_warnings(pairs: TokenizedPairs, name: str) -> list[str]:
    """Of prompts that the tokenizer does not end where the text does."""
    table, found = pairs.table, []
    moved = int(((table.flags[pairs.kept] & MOVED) > 0).sum())
    if moved:
        found.append(
            named(
                "prompt-end-moved",
                f"{name}: in {_count(moved)} the tokenized prompt is not what prompt and answer begin with together, because "
                "tokens merge over its end or the chat template ends a prompt differently; the answers begin where they part. "
                f"First end of a prompt that is not part of it: {table.facts.moved_end!r}.",
            )
        )
    return found


def _column_warnings(facts: Facts, name: str) -> list[str]:
    """Of columns that are not read, or not there."""
    found = []
    said = [c for c in facts.unread_columns if c in PAIR_COLUMNS]
    if said:
        found.append(
            named(
                "pair-columns-unread",
                f"{name}: the columns {', '.join(said)} are not read, as in TRL; pair_columns: [{', '.join(said)}] reads them "
                "of each pair.",
            )
        )
    if facts.absent_columns:
        found.append(
            named(
                "pair-columns-absent",
                f"{name} has no column {', '.join(facts.absent_columns)}: its pairs are evaluated as if pair_columns did "
                "not name it.",
            )
        )
    if facts.unread_columns:
        found.append(named("columns-unread", f"{name}: columns that are not read: {', '.join(facts.unread_columns)}."))
    of_reference = [c for c in facts.unread_columns if c in (*REF_COLUMNS, *REF_ALIASES.values())]
    if of_reference:
        found.append(
            named(
                "reference-logps-unread",
                f"{name}: {' and '.join(of_reference)} came with the data, but whose log-probabilities they are is not known: "
                "precompute_ref_log_probs computes those of this run's reference (TRL does so, too); "
                "with ref_log_probs_columns it takes these.",
            )
        )
    return found


def _repeat_warnings(pairs: TokenizedPairs, name: str) -> list[str]:
    """One for each side of which one text is half or more."""
    rows = pairs.table.number[pairs.kept]
    return [
        named(
            "answers-repeat",
            f"{name}: one text is {repeat.share} of the {repeat.side} answers, first in row {rows[repeat.pair]}. A model tells such "
            "pairs apart by that text alone: the loss falls to 0 and the accuracy rises to 1, whatever was preferred. Judge by "
            "held-out pairs without it.",
        )
        for repeat in repeats(pairs)
    ]


def _count(n: int) -> str:
    return f"{n} row" if n == 1 else f"{n} rows"
