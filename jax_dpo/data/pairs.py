"""From a row of a data set to a `Pair`: the columns, the two layouts, the prompt that both answers share.

A row is one of four kinds, as in TRL: text or messages, with a `prompt` column or with the prompt as the common beginning
of `chosen` and `rejected`. Which kind a data set holds is decided once, from its first row that can decide; a row of another
kind is then invalid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax_dpo.errors import UserError

SCORE_COLUMNS: tuple[tuple[str, str], ...] = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
)
IMAGE_COLUMNS = ("image", "images")
# What a run may read of each pair, when it is told to, and the numbers that each may hold, in words.
PAIR_COLUMNS = ("beta", "margin", "label", "weight")
# The reference's log-probabilities of the answers, which a run may take from the data; the other names are those of TRL before 0.12.
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
REF_ALIASES = dict(zip(REF_COLUMNS, ("reference_chosen_logps", "reference_rejected_logps")))
NUMBER_COLUMNS = (*PAIR_COLUMNS, *REF_COLUMNS)
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": ("a number above 0", lambda x: x > 0),
    "margin": ("a number", lambda x: True),
    "label": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "weight": ("a number of at least 0", lambda x: x >= 0),
    **dict.fromkeys(REF_COLUMNS, ("a number of at most 0", lambda x: x <= 0)),
}
READ_COLUMNS: frozenset[str] = frozenset(
    [
        "prompt",
        "chosen",
        "rejected",
        "tools",
        "chat_template_kwargs",
        *IMAGE_COLUMNS,
        *(c for p in SCORE_COLUMNS for c in p),
        *NUMBER_COLUMNS,
        *REF_ALIASES.values(),
    ]
)

Side = str | list[dict[str, Any]]


class Layout(NamedTuple):
    """What the rows of a data set are: with a `prompt` column or without, messages or text."""

    explicit: bool
    chat: bool

    def __str__(self) -> str:
        kind = "conversations" if self.chat else "plain text"
        return f"{kind}, {'a prompt column' if self.explicit else 'the prompt is what both answers begin with'}"


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference: a prompt and two answers, all text or all lists of messages.

    `tools` and `template_kwargs` go to the chat template. `gap` is the score of chosen minus that of rejected, NaN where the
    row has no scores. `torn`: the split that found the prompt tore the answers (`torn` below). `given` has what the row says
    in each of `NUMBER_COLUMNS`, NaN where it is not read.
    """

    prompt: Side
    chosen: Side
    rejected: Side
    tools: list[Any] | None
    template_kwargs: dict[str, Any]
    gap: float
    torn: bool = False
    given: tuple[float, ...] = (math.nan,) * len(NUMBER_COLUMNS)


def layout_of(values: Sequence[Any], name: str) -> Layout:
    """The layout of the first row that can decide it.

    A row decides when `chosen` or `rejected` (else `prompt`) is text or a list that begins with an object; rows before it
    are invalid anyway. Where no row decides, text is assumed and every row will be invalid.

    Raises `UserError`: no row at all; a row with images, which are not supported.
    """
    if len(values) == 0:
        raise UserError("data-empty", f"{name} holds no rows. Expected at least one object with chosen and rejected.")
    for row in values:
        if not isinstance(row, dict):
            continue
        if any(row.get(column) for column in IMAGE_COLUMNS):
            raise UserError(
                "data-images",
                f"{name} has images (column {' or '.join(IMAGE_COLUMNS)}). Only text can be trained on: "
                "remove the column to train on the text alone.",
            )
        for key in ("chosen", "rejected", "prompt"):
            value = row.get(key)
            if isinstance(value, str):
                return Layout("prompt" in row, False)
            if isinstance(value, list) and value and isinstance(value[0], dict):
                return Layout("prompt" in row, True)
    return Layout(any(isinstance(row, dict) and "prompt" in row for row in values), False)


def read_pair(
    row: Any, layout: Layout, columns: Sequence[str] = (), roles: Collection[str] | None = None
) -> Pair | str:
    """The pair of a row, or, where the row is invalid, a sentence that says what was found and what was expected.

    columns: those of `NUMBER_COLUMNS` that are read; a row without a usable number there is invalid.
    roles: those that a turn may have; None for any.
    """
    if not isinstance(row, dict):
        return f"the row is {_kind(row)}, an object with chosen and rejected was expected"
    if not layout.explicit and row.get("prompt") is not None:
        return "the row has a prompt, the first row has none: give all rows a prompt or none"
    for key in ("prompt", "chosen", "rejected") if layout.explicit else ("chosen", "rejected"):
        problem = _side_problem(row, key, layout) or _role_problem(row[key], key, roles)
        if problem:
            return problem
    tools, problem = _tools(row.get("tools"))
    template_kwargs, problem_kwargs = _template_kwargs(row.get("chat_template_kwargs"))
    if problem or problem_kwargs:
        return problem or problem_kwargs
    given, problem = _given(row, columns)
    if problem:
        return problem
    chosen, rejected = row["chosen"], row["rejected"]
    if layout.explicit:
        prompt = row["prompt"]
    else:
        if not layout.chat and (chosen == "" or rejected == ""):
            key = "chosen" if chosen == "" else "rejected"
            return f"{key} is empty, and without a prompt column both answers must hold the prompt"
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
        if layout.chat and not prompt:
            return "chosen and rejected have no first message in common, so the row has no prompt"
    if layout.chat:
        for key, answer in (("chosen", chosen), ("rejected", rejected)):
            role = answer[-1]["role"]
            if role != "assistant":
                place = f"{key}[{len(row[key]) - 1}].role"
                return f"{place} is {role!r}: an answer must end in a turn of 'assistant'"
    is_torn = not layout.explicit and torn(row["chosen"], row["rejected"])
    return Pair(prompt, chosen, rejected, tools, template_kwargs, score_gap(row), is_torn, given)


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split off what `chosen` and `rejected` begin with together: by character in text, by message in conversations.

    As TRL does it: a space right before the split goes to the answers; words and tokens are not respected; where one side
    begins with the whole other, all but the last common item is the prompt. At a split at 0 TRL takes the last item for the
    one before it, so that `"alpha "` against `"beta"` gives the prompt `"alpha"` and the answers `" "` and `"a"`: see `torn`.

    Both sides must hold at least one item.
    """
    shorter = min(len(chosen), len(rejected))
    split = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if split is None:
        split = shorter - 1
    elif chosen[split - 1] == " ":
        split -= 1
    return chosen[:split], chosen[split:], rejected[split:]


def torn(chosen: Any, rejected: Any) -> bool:
    """Whether TRL's split tears the pair: nothing in common, and `chosen` ends in a space."""
    return bool(chosen[:1] != rejected[:1] and chosen[-1:] == " ")


def score_gap(row: dict[str, Any]) -> float:
    """Score of chosen minus score of rejected from the first pair of `SCORE_COLUMNS` that holds two numbers, else NaN."""
    for first, second in SCORE_COLUMNS:
        if first in row and second in row:
            a, b = _number(row[first]), _number(row[second])
            if not (math.isnan(a) or math.isnan(b)):
                return a - b
    return math.nan


def is_blank(side: Side) -> bool:
    """True where an answer has nothing of its own: blank text, or only messages with blank content and no tool calls."""
    if isinstance(side, str):
        return not side.strip()
    return all(not content_text(message.get("content")).strip() and not message.get("tool_calls") for message in side)


def content_text(content: Any) -> str:
    """The text of a message's content, which is text or a list of parts."""
    if isinstance(content, list):
        return "".join(str(block.get("text", "")) for block in content if isinstance(block, dict))
    return content if isinstance(content, str) else ""


def _side_problem(row: dict[str, Any], key: str, layout: Layout) -> str | None:
    if key not in row:
        return f"{key} is missing; the row has {', '.join(map(repr, row)) or 'no fields'}"
    value = row[key]
    if value is None:
        return f"{key} is null"
    if not layout.chat:
        if isinstance(value, str):
            return None
        return f"{key} is {_kind(value)}, text was expected as in the first row"
    if isinstance(value, str):
        hint = "; remove the prompt column if the answers hold the whole conversation" if key == "prompt" else ""
        return f"{key} is text, a list of messages was expected as in the first row{hint}"
    if not isinstance(value, list):
        return f"{key} is {_kind(value)}, a list of messages was expected"
    if not value:
        return f"{key} is an empty list, at least one message was expected"
    return next((problem for i, m in enumerate(value) if (problem := _message_problem(m, f"{key}[{i}]"))), None)


def _role_problem(side: Any, key: str, roles: Collection[str] | None) -> str | None:
    if roles is None or isinstance(side, str):
        return None
    for i, message in enumerate(side):
        if message["role"] not in roles:
            known = ", ".join(roles)
            return f"{key}[{i}].role is {message['role']!r}, expected one of {known} (data_format: trl takes any role)"
    return None


def _message_problem(message: Any, place: str) -> str | None:
    if not isinstance(message, dict):
        return f"{place} is {_kind(message)}, a message with role and content was expected"
    role = message.get("role")
    if not isinstance(role, str):
        found = "missing" if "role" not in message else _kind(role)
        return f"{place}.role is {found}, text such as 'user' or 'assistant' was expected"
    content = message.get("content")
    if content is None or isinstance(content, str):
        return None
    if not isinstance(content, list):
        return f"{place}.content is {_kind(content)}, text was expected"
    for block in content:
        if not isinstance(block, dict) or not isinstance(block.get("text"), str):
            found = repr(block.get("type")) if isinstance(block, dict) else _kind(block)
            return f"{place}.content has a part of type {found}, only parts of type 'text' can be trained on"
    return None


def _tools(value: Any) -> tuple[list[Any] | None, str]:
    """The `tools` column is a list or a list as JSON text; nothing or an empty text stand for no tools."""
    if isinstance(value, str):
        if not value.strip():
            return None, ""
        try:
            value = json.loads(value)
        except ValueError as error:
            return None, f"tools is not valid JSON: {error}"
    if value is not None and not isinstance(value, list):
        return None, f"tools is {_kind(value)}, a list (or a list as JSON text) was expected"
    return value, ""


def _template_kwargs(value: Any) -> tuple[dict[str, Any], str]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            return {}, f"chat_template_kwargs is not valid JSON: {error}"
    if value is None:
        return {}, ""
    if not isinstance(value, dict):
        return {}, f"chat_template_kwargs is {_kind(value)}, an object was expected"
    return value, ""


def name_in(row: Collection[str], column: str) -> str:
    """The name under which a row has one of `NUMBER_COLUMNS`."""
    return REF_ALIASES[column] if column in REF_ALIASES and column not in row else column


def _given(row: dict[str, Any], columns: Sequence[str]) -> tuple[tuple[float, ...], str]:
    """The numbers of `columns` in the order of `NUMBER_COLUMNS` (NaN for the others), or what is wrong with one of them."""
    found = dict.fromkeys(NUMBER_COLUMNS, math.nan)
    for column in columns:
        words, holds = _NUMBERS[column]
        name = name_in(row, column)
        value = row.get(name)
        found[column] = _number(value)
        if not (math.isfinite(found[column]) and holds(found[column])):
            kind = "missing" if name not in row else repr(value) if isinstance(value, str) else _kind(value)
            return (), f"{name} is {kind}, {words} was expected"
    return tuple(found.values()), ""


def _number(value: Any) -> float:
    """A score as a float; CSV files hold numbers as text. NaN for what is not a number."""
    if isinstance(value, bool) or value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _kind(value: Any) -> str:
    """The type of a JSON value in words, with the value where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return f"of type {type(value).__name__}"
