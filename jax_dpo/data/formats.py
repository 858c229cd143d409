"""Layouts of other tools, read as TRL's: which one a data set has is seen from its first rows, said once, and can be told.

Each step turns a row into one in TRL's columns (`prompt`, `chosen`, `rejected`) or leaves it as it is. What a step changes is what TRL
could not read, or would read as something that nobody means; `trl` switches all of them off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

from jax_dpo.data import system_turns
from jax_dpo.errors import UserError, named

AUTO, TRL, SHAREGPT, REPEATED, TRANSCRIPT = DATA_FORMATS = ("auto", "trl", "sharegpt", "repeated_prompt", "transcript")
AS_GIVEN, PARSED = TOOL_ARGUMENTS = ("as_given", "parsed")
_, MERGED = SYSTEM_TURNS = (AS_GIVEN, "merged")
LOOKED_AT = 64  # rows that decide

CONVERSATIONS = ("conversations", "conversation", "messages")
# The names under which Argilla's, Intel's and others' data sets have TRL's three columns.
PROMPTS = ("instruction", "question", "query", "input")
ANSWERS = {
    "chosen": ("chosen_response", "response_chosen", "preferred"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred"),
}
FORMAT_COLUMNS = frozenset([*CONVERSATIONS, *PROMPTS, *(name for names in ANSWERS.values() for name in names)])
"""columns that are TRL's under another name"""

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "environment", "documents", "context")
"""roles that chat templates know; any other is asked about"""
_SAME_ROLE = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One change: whether a row asks for it, the row after it, what is said of a data set in which it is made, and the columns that
    stand in for TRL's in a row."""

    name: str
    said: str
    asks: Callable[[Row], bool]
    change: Callable[[Row], Row]
    uses: Callable[[Row], Iterable[str]] = lambda row: ()


class Mapped(Sequence[Any]):
    """Rows, changed when they are looked at."""

    def __init__(self, rows: Sequence[Any], steps: Sequence[Step]) -> None:
        self.rows, self.steps = rows, steps

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> list[Any]: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        row = self.rows[i]
        for step in self.steps:
            if isinstance(row, dict) and step.asks(row):
                row = step.change(row)
        return row

    def stood_in(self) -> set[str]:
        """The columns of the first rows that were read in place of TRL's."""
        found: set[str] = set()
        for i, step in enumerate(self.steps):
            for row in islice(_rows(Mapped(self.rows, self.steps[:i])), LOOKED_AT):
                if isinstance(row, dict) and step.asks(row):
                    found |= set(step.uses(row))
        return found

    @property
    def said(self) -> list[str]:
        """A sentence for each change that was not told."""
        return [step.said for step in self.steps if step.said]


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    data_format: `auto` makes the changes that the first rows ask for; `trl` makes none; another name makes that one, and `auto`'s.
    tool_arguments: `parsed` turns arguments of tool calls that are JSON text into objects.
    system_turn: `merged` puts a system turn's text at the head of the user's turn that follows it.
    system_column: the text of the column `system` becomes the system turn of a conversation that has none.
    """

    data_format: str = AUTO
    tool_arguments: str = AS_GIVEN
    system_turn: str = AS_GIVEN
    system_column: bool = False


PLAIN = Reading()


def read_as(rows: Sequence[Any], reading: Reading = PLAIN, name: str = "the data") -> Mapped:
    """The rows in TRL's columns, changed as `reading` says.

    Raises `UserError`: no row of the first ones has the layout that was told.
    """
    chosen: list[Step] = []
    data_format = reading.data_format
    for step in _STEPS:
        if data_format == TRL:
            break
        seen = Mapped(rows, chosen)
        first = [row for row in islice(_rows(seen), LOOKED_AT) if isinstance(row, dict)]
        told = step.name == data_format
        if step.name == TRANSCRIPT and not told:
            continue
        asking = [step.asks(row) for row in first]
        if step.name == REPEATED and not told:
            # In text it may be meant: an answer may begin with what was asked.
            asking = [ask and isinstance(row["prompt"], list) for ask, row in zip(asking, first)]
        if told and not any(asking):
            raise UserError(
                "data-format-other",
                f"{name}: data_format is {data_format}, and none of its first {len(first)} rows is such a one "
                f"({_LOOK[data_format]}). Set data_format to auto, or mend the data.",
            )
        if any(asking):
            chosen.append(step)
    return Mapped(rows, chosen + _told(reading))


def _told(reading: Reading) -> list[Step]:
    """The changes that are made because an option says so, whatever the rows look like."""
    found = []
    if reading.tool_arguments == PARSED:
        found.append(Step("tool_arguments", "", lambda row: True, _parse_arguments))
    if reading.system_column:
        used = lambda row: [system_turns.COLUMN]  # noqa: E731
        found.append(Step("system_column", "", system_turns.in_column, system_turns.from_column, used))
    if reading.system_turn == MERGED:
        found.append(Step("system_turn", "", system_turns.has_system, system_turns.merged))
    return found


def columns_to_read(columns: Sequence[str], known: Container[str]) -> list[str]:
    """Those of a file's columns that are looked at: the `known` ones, `system`, and those that may stand in for TRL's three."""
    whole = {"prompt", "chosen", "rejected"} <= set(columns)
    return [c for c in columns if c in known or c == system_turns.COLUMN or (c in FORMAT_COLUMNS and not whole)]


def hints(rows: Mapped, reading: Reading) -> list[str]:
    """What may have been meant otherwise, and the option that says so; from the first rows."""
    first = [row for row in islice(_rows(rows), LOOKED_AT) if isinstance(row, dict)]
    found = []
    if reading.data_format != TRANSCRIPT and any(map(is_transcript, first)):
        found.append(
            named(
                "data-transcripts",
                "these are transcripts (Human: .. Assistant: ..), split where chosen and rejected part, as in TRL, which may be "
                "in the middle of a word; data_format: transcript splits after the last Assistant: that both share.",
            )
        )
    if reading.data_format != REPEATED and any(_repeated(row) for row in first):
        found.append(
            named(
                "data-prompt-repeated",
                "chosen and rejected begin with the prompt once more, so the model sees it twice, as in TRL; data_format: repeated_prompt "
                "takes it off.",
            )
        )
    arguments = next((text for row in first if (text := text_arguments(row)) is not None), None)
    if reading.tool_arguments == AS_GIVEN and arguments is not None:
        found.append(
            named(
                "data-tool-arguments",
                f"the arguments of tool calls are JSON text, which templates write with escaped quotes ({json.dumps(arguments)}); "
                "tool_arguments: parsed makes objects of them.",
            )
        )
    return found


def is_transcript(row: Any) -> bool:
    """Whether both answers are plain text of the form of Anthropic's hh-rlhf: turns that begin with Human: and Assistant:."""
    if not isinstance(row, dict) or "prompt" in row:
        return False
    sides = (row.get("chosen"), row.get("rejected"))
    return all(isinstance(side, str) and _HUMAN in "\n\n" + side.lstrip() and _ASSISTANT in side for side in sides)


def text_arguments(row: Any) -> str | None:
    """The arguments of the first tool call of a row that are text which holds a JSON object, else None."""
    for message in _messages(row) if isinstance(row, dict) else ():
        for call in message.get("tool_calls") or []:
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(_object(function.get("arguments")), dict):
                return str(function["arguments"])
    return None


def _rows(rows: Mapped) -> Iterator[Any]:
    return (rows[i] for i in range(len(rows)))


def _messages(row: Row) -> Iterator[dict[str, Any]]:
    for key in ("prompt", "chosen", "rejected"):
        value = row.get(key)
        if isinstance(value, list):
            yield from (message for message in value if isinstance(message, dict))


def _object(text: Any) -> Any:
    """What JSON text holds; None where it is no text or no JSON."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None


# Columns under other names


def _other_names(row: Row) -> dict[str, str]:
    """{TRL's column: the row's own name for it}, where the row has text or messages there and not TRL's column."""
    found = {side: next((n for n in names if row.get(n)), "") for side, names in ANSWERS.items() if side not in row}
    answers = [row.get(found.get(side) or side) for side in ANSWERS]
    if "prompt" not in row and all(isinstance(a, str) for a in answers) and not _conversation(row):
        asked = next((n for n in PROMPTS if isinstance(row.get(n), str) and row[n].strip()), "")
        # Answers that begin with it hold the prompt already.
        if asked and not any(str(answer).startswith(row[asked]) for answer in answers):
            found["prompt"] = asked
    return {column: own for column, own in found.items() if own}


def _rename(row: Row) -> Row:
    names = _other_names(row)
    return {**row, **{column: row[own] for column, own in names.items()}}


# The conversation in a column of its own


def _conversation(row: Row) -> str:
    """The column that holds the conversation up to the answers; empty where there is none."""
    if "prompt" in row:
        return ""
    for name in CONVERSATIONS:
        value = row.get(name)
        if (
            isinstance(value, list)
            and value
            and isinstance(value[0], dict)
            and ("from" in value[0] or "role" in value[0])
        ):
            return name if all(_is_answer(row.get(side)) for side in ANSWERS) else ""
    return ""


def _is_answer(value: Any) -> bool:
    """An answer alone: a text, a message, or messages that do not begin with the user's."""
    if isinstance(value, list):
        first = value[0] if value and isinstance(value[0], dict) else {}
        return _role(first.get("role", first.get("from"))) == "assistant"
    return isinstance(value, str | dict)


def _apart(row: Row) -> Row:
    return {**row, "prompt": row[_conversation(row)], **{side: _as_list(row[side]) for side in ANSWERS}}


def _as_list(answer: Any) -> Any:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return [answer] if isinstance(answer, dict) else answer


# from and value


def _has_from(row: Row) -> bool:
    return any("role" not in message and "from" in message for message in _messages(row))


def _from_value(row: Row) -> Row:
    def change(message: Any) -> Any:
        if not isinstance(message, dict) or "role" in message or "from" not in message:
            return message
        rest = {k: v for k, v in message.items() if k not in ("from", "value")}
        return {"role": message["from"], "content": message.get("value"), **rest}

    return _each_message(row, change)


# Roles under other names


def _role(role: Any) -> Any:
    if not isinstance(role, str) or role in ROLES:
        return role
    plain = role.strip().lower()
    return _SAME_ROLE.get(plain, plain if plain in ROLES else role)


def _foreign_role(row: Row) -> bool:
    return any(_role(message.get("role")) != message.get("role") for message in _messages(row))


def _map_roles(row: Row) -> Row:
    def change(message: Any) -> Any:
        return {**message, "role": _role(message.get("role"))} if isinstance(message, dict) else message

    return _each_message(row, change)


def _each_message(row: Row, change: Callable[[Any], Any]) -> Row:
    lists = {key: row[key] for key in ("prompt", "chosen", "rejected") if isinstance(row.get(key), list)}
    return {**row, **{key: [change(message) for message in value] for key, value in lists.items()}}


# A prompt as text beside answers that are messages


def _text_prompt(row: Row) -> bool:
    answers = [row.get(side) for side in ANSWERS]
    chat = all(isinstance(a, list) and a and isinstance(a[0], dict) for a in answers)
    return isinstance(row.get("prompt"), str) and chat


def _prompt_as_message(row: Row) -> Row:
    """The prompt is the user's turn, unless the answers hold it: then they say what stands around it."""
    if any(m.get("role") == "user" for side in ANSWERS for m in row[side] if isinstance(m, dict)):
        return {key: value for key, value in row.items() if key != "prompt"}
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}


# The prompt once more at the beginning of both answers


def _repeated(row: Row) -> bool:
    prompt, answers = row.get("prompt"), [row.get(side) for side in ANSWERS]
    if isinstance(prompt, str) and prompt.strip() and all(isinstance(a, str) for a in answers):
        return all(str(a).startswith(prompt) and len(str(a)) > len(prompt) for a in answers)
    if isinstance(prompt, list) and prompt and all(isinstance(a, list) for a in answers):
        return all(a[: len(prompt)] == prompt and len(a) > len(prompt) for a in answers if isinstance(a, list))
    return False


def _strip_prompt(row: Row) -> Row:
    return {**row, **{side: row[side][len(row["prompt"]) :] for side in ANSWERS}}


# Transcripts


def _at_last_turn(row: Row) -> Row:
    """Split after the last `Assistant:` that both sides share, up to which they are equal."""
    chosen, rejected = row["chosen"], row["rejected"]
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    end = chosen.rfind(_ASSISTANT, 0, shared)
    if end < 0:
        return row
    end += len(_ASSISTANT)
    return {**row, "prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _parse_arguments(row: Row) -> Row:
    def parsed(call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        found = _object(function.get("arguments")) if isinstance(function, dict) else None
        return {**call, "function": {**function, "arguments": found}} if isinstance(found, dict) and function else call

    def change(message: Any) -> Any:
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        return {**message, "tool_calls": [parsed(call) for call in calls]} if isinstance(calls, list) else message

    return _each_message(row, change)


def _renamed(row: Row) -> Iterable[str]:
    return _other_names(row).values()


_STEPS = (
    Step(
        "names",
        "columns under other names are read as prompt, chosen and rejected",
        lambda r: bool(_other_names(r)),
        _rename,
        _renamed,
    ),
    Step(
        SHAREGPT,
        "the conversation is a column of its own, and chosen and rejected are the answers to it",
        lambda r: bool(_conversation(r)),
        _apart,
        lambda r: [_conversation(r)],
    ),
    Step("from_value", "messages with from and value are read as role and content (ShareGPT)", _has_from, _from_value),
    Step(
        "roles",
        "roles under other names, such as human and gpt, are read as user and assistant",
        _foreign_role,
        _map_roles,
    ),
    Step(
        "text_prompt",
        "a prompt that is text beside answers that are messages is the user's turn",
        _text_prompt,
        _prompt_as_message,
    ),
    Step(
        REPEATED,
        "the prompt, which chosen and rejected begin with once more, is taken off both",
        _repeated,
        _strip_prompt,
    ),
    Step(
        TRANSCRIPT,
        "transcripts are split after the last Assistant: that both sides share",
        is_transcript,
        _at_last_turn,
    ),
)
_LOOK = {
    SHAREGPT: "a column conversations or messages with the turns, chosen and rejected with the answers alone",
    REPEATED: "a prompt that both chosen and rejected begin with",
    TRANSCRIPT: "no prompt column, chosen and rejected with turns that begin with Human: and Assistant:",
}
