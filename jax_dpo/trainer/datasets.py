"""Tokenizer and data sets of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.config import DPOConfig
from jax_dpo.config.places import token_cache
from jax_dpo.data.batch import FIELD_OF, Tree
from jax_dpo.data.load import Rows, Stream, stream_rows
from jax_dpo.data.pack import Sizes
from jax_dpo.data.pairs import REF_COLUMNS
from jax_dpo.data.prepare import DataOptions, PreparedData, prepare
from jax_dpo.data.tokenize import tokenizer_fingerprint
from jax_dpo.data.tokens import TokenizedPairs
from jax_dpo.errors import UserError
from jax_dpo.policy import Policy
from jax_dpo.weights.tokenizer_changes import UNCHANGED, TokenizerChanges, change_files, write_files
from jax_dpo.weights.tokenizer_files import auto_tokenizer, files_of_tokenizer


class Tokenizer:
    """The tokenizer of a run, loaded when it is first needed: tokens from the cache do not need it."""

    def __init__(self, given: Any, policy: Policy, changes: TokenizerChanges = UNCHANGED) -> None:
        self._given, self._policy, self._changes = given, policy, changes
        self.rows = policy.config.vocab_size  # that the model has for tokens

    @property
    def _object(self) -> Any:
        """The tokenizer object that was given, if it is used as it is."""
        return None if self._changes or isinstance(self._given, str | Path) else self._given

    @property
    def _where(self) -> str:
        return str(self._given) if isinstance(self._given, str | Path) else str(self._policy.files.path)

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Its files, byte for byte as they came where nothing is changed.

        Raises:
          UserError: what `change_files` raises.
        """
        files = self._given_files()
        return change_files(files, self._changes, self._where) if files and self._changes else files

    def _given_files(self) -> dict[str, bytes]:
        if self._given is None:
            return self._policy.files.tokenizer_files()
        if isinstance(self._given, str | Path):
            from jax_dpo.weights.source import resolve_model
            from jax_dpo.weights.tokenizer_files import read_tokenizer_files

            return read_tokenizer_files(resolve_model(self._given))
        return files_of_tokenizer(self._given)

    @cached_property
    def fingerprint(self) -> str:
        if self._object is not None:
            return tokenizer_fingerprint(self._object)
        with tempfile.TemporaryDirectory() as folder:
            write_files(self.files, Path(folder))
            return tokenizer_fingerprint(folder)

    @cached_property
    def loaded(self) -> Any:
        """The transformers tokenizer.

        Raises:
          UserError: the model has none, or its files cannot be read.
        """
        if self._object is not None:
            return self._object
        if not self.files:
            raise UserError(
                "tokenizer-missing",
                f"{self._where} has no tokenizer (no tokenizer.json or tokenizer_config.json). "
                "Name a directory that has one with tokenizer_name_or_path, or give processing_class.",
            )
        with tempfile.TemporaryDirectory() as folder:
            write_files(self.files, Path(folder))
            try:
                return auto_tokenizer().from_pretrained(folder, local_files_only=True)
            except Exception as e:
                raise UserError(
                    "tokenizer-broken",
                    f"The tokenizer of {self._where} cannot be loaded: {e}. "
                    "Expected the files that save_pretrained of transformers writes.",
                ) from e


@dataclass(frozen=True)
class PairSet:
    """A prepared data set with what packing must know of it."""

    data: PreparedData
    share_prompt: bool

    @property
    def pairs(self) -> TokenizedPairs:
        return self.data.pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def tree(self, i: int) -> Tree:
        found = self.pairs.tree(i)
        return found if self.share_prompt else found._replace(shared=False)

    @cached_property
    def sizes(self) -> Sizes:
        tokens = self.pairs.tree_lengths(self.share_prompt).astype(np.int64)
        return Sizes(tokens, self.pairs.scored_lengths().sum(1).astype(np.int64))

    @cached_property
    def trl_tokens(self) -> np.ndarray:
        """[N] tokens of both sequences, as TRL's num_tokens counts them."""
        return self.pairs.sequence_lengths().sum(1).astype(np.int64)

    @cached_property
    def chosen_scored(self) -> np.ndarray:
        return self.pairs.scored_lengths()[:, 0].astype(np.int64)

    def columns(self, beta: float) -> dict[str, np.ndarray]:
        """{field of `Batch`: float32 [N]} of the columns that are read and there; a pair's beta as a multiple of `beta`."""
        read = {column: self.pairs.given(column) for column in self.data.options.columns if column in FIELD_OF}
        found = {FIELD_OF[column]: values for column, values in read.items() if values is not None}
        return {field: x / np.float32(beta) if field == "beta" else x for field, x in found.items()}

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence (prompt and one answer)."""
        return int(self.pairs.sequence_lengths().max(initial=1))


@dataclass(frozen=True)
class Some:
    """Some pairs of a set, by their positions [n] in it."""

    whole: PairSet
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def tree(self, i: int) -> Tree:
        return self.whole.tree(int(self.positions[i]))

    @property
    def sizes(self) -> Sizes:
        return Sizes(*(x[self.positions] for x in self.whole.sizes))

    def columns(self, beta: float) -> dict[str, np.ndarray]:
        return {field: x[self.positions] for field, x in self.whole.columns(beta).items()}


@dataclass(frozen=True)
class Sampled:
    """Answers sampled to prompts, laid out as pairs without a rejected answer.

    `room` is the most tokens that an answer may have; each takes up as much, so that the batches have one shape whatever the answers are.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    room: int

    def __len__(self) -> int:
        return len(self.prompts)

    def tree(self, i: int) -> Tree:
        prompt, answer = (np.asarray(x[i], np.int32) for x in (self.prompts, self.answers))
        return Tree(prompt, answer, prompt, answer[:0], shared=True)

    @property
    def sizes(self) -> Sizes:
        return Sizes(np.array([len(p) + self.room for p in self.prompts]), np.full(len(self.prompts), self.room))

    @property
    def longest(self) -> int:
        return int(self.sizes.tokens.max())

    def columns(self, beta: float) -> dict[str, np.ndarray]:
        return {}


def data_options(config: DPOConfig, *, held_out: bool = False) -> DataOptions:
    return DataOptions(
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,
        max_prompt_length=config.max_prompt_length,
        data_format=config.data_format,
        tool_arguments=config.tool_arguments,
        system_turn=config.system_turn,
        system_column=config.system_column,
        completion_turns=config.completion_turns,
        overlong=config.overlong,
        drop_rows=tuple(config.drop_rows),
        min_gap=config.min_score_gap,
        columns=(*config.pair_columns, *(REF_COLUMNS if config.ref_log_probs_columns and not held_out else ())),
        columns_needed=not held_out,
        cache_dir=token_cache(config.dataset_cache_dir),
    )


def prepare_set(
    source: Any,
    tokenizer: Tokenizer,
    config: DPOConfig,
    *,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    may_be_empty: bool = False,
    held_out: bool = False,
) -> PairSet:
    """Loads, checks and tokenizes one data set. A `held_out` one need not have the columns of `pair_columns`.

    Raises:
      UserError: see `data.prepare`; no pair is left, unless it `may_be_empty`.
    """
    data = prepare(
        source,
        lambda: tokenizer.loaded,
        tokenizer_key=tokenizer.fingerprint,
        options=data_options(config, held_out=held_out),
        name=name,
        progress=progress,
    )
    check_token_ids(data, tokenizer)
    if not may_be_empty:
        data.require_pairs()
    return PairSet(data, config.share_prompt)


def check_token_ids(data: PreparedData, tokenizer: Tokenizer) -> None:
    """Raises UserError where the model has no row for a token of the data."""
    most = int(data.pairs.table.ids.max(initial=-1))
    if most >= tokenizer.rows:
        token = tokenizer.loaded.convert_ids_to_tokens(most)
        raise UserError(
            "token-without-row",
            f"{data.name}: the tokenizer gives {token} the id {most}, but the model has {tokenizer.rows} rows. If the token was "
            f"added to the tokenizer, added_special_tokens: ['{token}'] gives it a row; else the tokenizer is another model's.",
        )


def prepare_stream(
    source: Any,
    tokenizer: Tokenizer,
    config: DPOConfig,
    *,
    pairs: int,
    progress: Callable[[int, int], None] | None = None,
) -> PairSet:
    """The first `pairs` pairs of a data set without a length, or all where it has fewer; rows that are dropped do not count.

    Raises:
      UserError: see `prepare_set`.
    """
    rows = pairs
    while True:
        read = stream_rows(source, rows)
        found = prepare_set(
            read,
            tokenizer,
            config,
            name=None if isinstance(source, Stream) else "the data stream",
            progress=progress,
            may_be_empty=True,
        )
        if len(found) >= pairs or len(read) < rows:
            found.data.require_pairs()
            return found
        rows += pairs - len(found)  # no more than are missing, so that an epoch of a stream is what the run takes


def prepare_evaluation(given: Any, tokenizer: Tokenizer, config: DPOConfig) -> dict[str | None, PairSet]:
    """The held-out sets by name; one that stands alone has the name None."""
    if given is None:
        return {}
    if isinstance(given, Mapping) and not isinstance(given, Rows):
        return {str(name): prepare_set(source, tokenizer, config, held_out=True) for name, source in given.items()}
    return {None: prepare_set(given, tokenizer, config, held_out=True)}
