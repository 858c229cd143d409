"""Text to token ids by TRL 1.16's rules.

Text: the end-of-sequence string is put after chosen and rejected unless they end with it. Conversations: the chat template
decides everything. Prompt, prompt with chosen and prompt with rejected are tokenized jointly; the prompt is what all three
token sequences begin with, and each answer is the rest, so that tokens which merge over the prompt's end belong to the
answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_dpo.data.formats import PLAIN, ROLES, TRL, Reading, hints, read_as
from jax_dpo.data.load import Rows
from jax_dpo.data.pairs import (
    NUMBER_COLUMNS,
    READ_COLUMNS,
    REF_ALIASES,
    Layout,
    Pair,
    is_blank,
    layout_of,
    name_in,
    read_pair,
)
from jax_dpo.data.tokens import EMPTY_CHOSEN, EMPTY_REJECTED, IDENTICAL, MOVED, TORN, Facts, TokenTable
from jax_dpo.data.turns import ALL, scored_tokens
from jax_dpo.errors import UserError

# Pairs that are rendered and encoded together: enough to keep the tokenizer's threads busy, little to hold.
_CHUNK = 512
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)


class _Entry(NamedTuple):
    """A tokenized row on its way into the table."""

    row: int
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    gap: float
    given: tuple[float, ...]
    flags: int
    digest: bytes
    scored: tuple[np.ndarray, np.ndarray] | None
    """which tokens of each answer are trained on; None: all"""


_Marks = tuple[np.ndarray, np.ndarray] | None


def tokenize_rows(
    rows: Rows,
    tokenizer: Any,
    *,
    columns: Sequence[str] = (),
    reading: Reading = PLAIN,
    completion_turns: str = ALL,
    progress: Callable[[int, int], None] | None = None,
) -> TokenTable:
    """Tokenize every row that can be; the others are in `facts.invalid` with what is wrong with each.

    tokenizer: a transformers tokenizer. Texts go to it in batches; no process is started.
    columns: those of `NUMBER_COLUMNS` that are read. A row that lacks one is invalid; one that no row has is in
        `facts.absent_columns`.
    reading: how rows are read.
    completion_turns: which turns of an answer are trained on, one of `turns.COMPLETION_TURNS`.
    progress: called with (rows done, rows in all) now and then.

    Raises `UserError`: no rows; conversations but no chat template; text but no end-of-sequence token.
    """
    values = read_as(rows.rows, reading, rows.name)
    roles = None if reading.data_format == TRL else ROLES
    layout = layout_of(values, rows.name)
    _check_tokenizer(tokenizer, layout, rows.name, completion_turns)
    there = [c for c in columns if any(isinstance(row, dict) and name_in(row, c) in row for row in values)]
    entries: list[_Entry] = []
    invalid: list[tuple[int, str]] = []
    moved_end = ""
    for start in range(0, len(values), _CHUNK):
        stop = min(start + _CHUNK, len(values))
        good: list[tuple[int, Pair, list[str], _Marks]] = []
        for i in range(start, stop):
            pair = read_pair(values[i], layout, there, roles)
            texts = _texts(pair, tokenizer, layout) if isinstance(pair, Pair) else pair
            marks = None
            if isinstance(pair, Pair) and not isinstance(texts, str) and layout.chat and completion_turns != ALL:
                marks = _marks(pair, texts, tokenizer, completion_turns)
            if isinstance(pair, Pair) and not isinstance(texts, str) and not isinstance(marks, str):
                good.append((i, pair, texts, marks))
            else:
                invalid.append((i, marks if isinstance(marks, str) else str(texts)))
        encoded = _encode([text for _, _, texts, _ in good for text in texts], tokenizer, layout)
        for (i, pair, texts, marks), three in zip(good, _threes(encoded)):
            entry, end = _entry(i, pair, texts, three, marks, tokenizer, layout)
            entries.append(entry)
            if len(end) and not moved_end:
                moved_end = str(tokenizer.decode(end.tolist()))
        if progress is not None:
            progress(stop, len(values))
    table = _table(rows, layout, entries, invalid, moved_end, columns, there)
    stood_in = values.stood_in()
    facts = replace(
        table.facts,
        unread_columns=[c for c in table.facts.unread_columns if c not in stood_in],
        read_as=values.said,
        hints=hints(values, reading) + _two_ends(tokenizer, layout),
    )
    return replace(table, facts=facts)


def tokenizer_fingerprint(source: Any) -> str:
    """A hash of all that makes a tokenizer: equal hashes give equal ids.

    source: a directory with tokenizer files, or a transformers tokenizer (the two kinds give different hashes).
    """
    digest = hashlib.blake2b(digest_size=20)
    if isinstance(source, str | Path):
        directory = Path(source)
        files = sorted({f for pattern in _TOKENIZER_FILES for f in directory.glob(pattern) if f.is_file()})
        for file in files:
            data = file.read_bytes()
            digest.update(f"{file.relative_to(directory)} {len(data)}\n".encode() + data)
        return digest.hexdigest()
    backend = getattr(source, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # these two follow the last call, not the tokenizer
        state.pop("padding", None)
    else:
        state = {"vocab": source.get_vocab()}
    settings = {k: v for k, v in getattr(source, "init_kwargs", {}).items() if "file" not in k and k != "name_or_path"}
    facts = [type(source).__name__, state, source.special_tokens_map, getattr(source, "chat_template", None), settings]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _of_pieces(entry: _Entry) -> list[np.ndarray]:
    """1 where a token of prompt, chosen, rejected is trained on."""
    chosen, rejected = entry.scored or (np.ones(len(entry.chosen)), np.ones(len(entry.rejected)))
    return [x.astype(np.uint8) for x in (np.zeros(len(entry.prompt)), chosen, rejected)]


def _check_tokenizer(tokenizer: Any, layout: Layout, name: str, turns: str) -> None:
    if layout.chat and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "chat-template-missing",
            f"{name} holds conversations, but the tokenizer has no chat template that would turn them into text. Name one "
            "with chat_template_path (a .jinja file, or a directory or Hub name that has one), use the instruct model, or give plain text.",
        )
    if layout.chat and turns != ALL and not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "completion-turns-slow-tokenizer",
            f"completion_turns is {turns}, and the tokenizer ({type(tokenizer).__name__}) cannot say which characters a token stands for. "
            "Use one with a tokenizer.json, or completion_turns: all.",
        )
    if not layout.chat and tokenizer.eos_token is None:
        raise UserError(
            "eos-token-missing",
            f"{name} holds plain text, and the tokenizer has no end-of-sequence token to put after each answer. Name "
            "one with eos_token.",
        )


def _two_ends(tokenizer: Any, layout: Layout) -> list[str]:
    """What to say where the tokenizer ends a text by itself, behind the end that TRL puts there."""
    if layout.chat or _encode([tokenizer.eos_token], tokenizer, layout)[0][-2:] != [tokenizer.eos_token_id] * 2:
        return []
    return [
        f"the tokenizer puts its end-of-sequence token {tokenizer.eos_token} behind every text, and one stands there already, so answers "
        "end in two, as in TRL"
    ]


def _texts(pair: Pair, tokenizer: Any, layout: Layout) -> list[str] | str:
    """[prompt, prompt + chosen, prompt + rejected] as text, or a sentence that says why not."""
    if not layout.chat:
        eos = tokenizer.eos_token
        answers = [a if a.endswith(eos) else a + eos for a in (str(pair.chosen), str(pair.rejected))]
        texts = [str(pair.prompt), *(str(pair.prompt) + answer for answer in answers)]
    else:
        prompt, chosen, rejected = list(pair.prompt), list(pair.chosen), list(pair.rejected)
        options = {"tokenize": False, "tools": pair.tools} | pair.template_kwargs
        try:
            texts = [
                tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options),
                tokenizer.apply_chat_template(prompt + chosen, **options),
                tokenizer.apply_chat_template(prompt + rejected, **options),
            ]
        except Exception as error:  # a template is a program of the model's author: it can raise anything
            way_out = (
                "; system_turn: merged puts the system turn's text into the user's turn" if _has_system(pair) else ""
            )
            return f"the chat template refuses the conversation: {error or type(error).__name__}{way_out}"
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        return f"the text holds half of a surrogate pair ({error.object[error.start]!r}), which is no character"
    return texts


def _has_system(pair: Pair) -> bool:
    return bool(pair.prompt) and isinstance(pair.prompt[0], dict) and pair.prompt[0].get("role") == "system"


def _marks(pair: Pair, texts: list[str], tokenizer: Any, turns: str) -> _Marks | str:
    """Which tokens of prompt + chosen, and of prompt + rejected, are trained on (None: all of the answers'), or why that cannot be told."""
    if len(pair.chosen) == len(pair.rejected) == 1:
        return None
    options = {"tokenize": False, "tools": pair.tools} | pair.template_kwargs
    found = []
    for answer, text in ((pair.chosen, texts[1]), (pair.rejected, texts[2])):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        try:
            marks = scored_tokens(
                lambda messages, opened: str(
                    tokenizer.apply_chat_template(messages, add_generation_prompt=opened, **options)
                ),
                list(pair.prompt),
                list(answer),
                text,
                np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2),
                turns,
            )
        except Exception as error:
            return f"the chat template refuses a part of the conversation, whose turns so cannot be told apart: {error}"
        if isinstance(marks, str):
            return marks
        found.append(marks)
    return found[0], found[1]


def _encode(texts: list[str], tokenizer: Any, layout: Layout) -> list[list[int]]:
    if not texts:
        return []
    # A rendered conversation has its special tokens in it already; text gets the tokenizer's own.
    ids = tokenizer(
        texts,
        add_special_tokens=not layout.chat,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return list(ids)


def _threes(encoded: list[list[int]]) -> Iterator[list[np.ndarray]]:
    for k in range(0, len(encoded), 3):
        yield [np.asarray(ids, np.int32) for ids in encoded[k : k + 3]]


def _entry(
    row: int, pair: Pair, texts: list[str], three: list[np.ndarray], marks: _Marks, tokenizer: Any, layout: Layout
) -> tuple[_Entry, np.ndarray]:
    """The row's entry, and the end of the tokenized prompt that fell to the answers or away."""
    prompt, with_chosen, with_rejected = three
    k = min(common_prefix(prompt, with_chosen), common_prefix(prompt, with_rejected))
    chosen, rejected = with_chosen[k:], with_rejected[k:]
    flags = MOVED if k < len(prompt) else 0
    flags |= EMPTY_CHOSEN if _is_empty(pair.chosen, chosen, tokenizer, layout) else 0
    flags |= EMPTY_REJECTED if _is_empty(pair.rejected, rejected, tokenizer, layout) else 0
    flags |= IDENTICAL if np.array_equal(chosen, rejected) else 0
    flags |= TORN if pair.torn else 0
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest()
    scored = (marks[0][k:], marks[1][k:]) if marks is not None else None
    return _Entry(row, prompt[:k], chosen, rejected, pair.gap, pair.given, flags, digest, scored), prompt[k:]


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading ids `a` [n] and `b` [m] have in common."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n


def _is_empty(answer: Any, ids: np.ndarray, tokenizer: Any, layout: Layout) -> bool:
    """An answer without a token of its own: nothing, blanks, or only what ends every answer."""
    eos = tokenizer.eos_token_id
    if len(ids) == 0 or (eos is not None and bool((ids == eos).all())):
        return True
    if not layout.chat:
        answer = str(answer).replace(tokenizer.eos_token, "")
    return is_blank(answer)


def _table(
    rows: Rows,
    layout: Layout,
    entries: list[_Entry],
    invalid: list[tuple[int, str]],
    moved_end: str,
    asked: Sequence[str],
    there: Sequence[str],
) -> TokenTable:
    loaded = rows.loaded
    row = np.asarray([e.row for e in entries], np.int64)
    pieces = [piece for e in entries for piece in (e.prompt, e.chosen, e.rejected)]
    marked = any(e.scored is not None for e in entries)
    marks = [mark for e in entries for mark in _of_pieces(e)] if marked else []
    first: dict[bytes, int] = {}
    twin = [first.setdefault(e.digest, k) for k, e in enumerate(entries)]
    columns = loaded.columns or tuple(
        dict.fromkeys(str(key) for value in loaded.values if isinstance(value, dict) for key in value)
    )
    numbers = {c: c for c in NUMBER_COLUMNS} | {alias: c for c, alias in REF_ALIASES.items()}
    facts = Facts(
        rows_read=len(loaded.values),
        explicit=layout.explicit,
        chat=layout.chat,
        invalid=[(i, int(loaded.file_of[i]), int(loaded.numbers[i]), problem) for i, problem in invalid],
        unread_columns=[c for c in columns if c not in READ_COLUMNS or (c in numbers and numbers[c] not in asked)],
        moved_end=moved_end,
        absent_columns=[c for c in asked if c not in there],
    )
    return TokenTable(
        ids=np.concatenate(pieces, dtype=np.int32) if pieces else np.zeros(0, np.int32),
        bounds=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        row=row,
        number=loaded.numbers[row],
        file_of=loaded.file_of[row],
        twin=np.asarray(twin, np.int64),
        gap=np.asarray([e.gap for e in entries], np.float64),
        given=np.asarray([e.given for e in entries], np.float64).reshape(-1, len(NUMBER_COLUMNS)),
        scored=np.concatenate(marks, dtype=np.uint8) if marked else np.zeros(0, np.uint8),
        flags=np.asarray([e.flags for e in entries], np.uint8),
        facts=facts,
    )
