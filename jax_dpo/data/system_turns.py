"""System turns: from a column of their own, and into the user's turn for chat templates that have none."""

from __future__ import annotations

from typing import Any

from jax_dpo.data.pairs import content_text

Row = dict[str, Any]
COLUMN = "system"
_SIDES = ("prompt", "chosen", "rejected")


def _conversations(row: Row) -> dict[str, list[dict[str, Any]]]:
    """The sides of a row that begin a conversation: the prompt, or both answers where there is no prompt column."""
    found = {key: row.get(key) for key in (_SIDES[:1] if row.get("prompt") is not None else _SIDES[1:])}
    whole = all(isinstance(side, list) and side and all(isinstance(m, dict) for m in side) for side in found.values())
    return {key: side for key, side in found.items() if isinstance(side, list)} if whole else {}


def in_column(row: Row) -> bool:
    """Whether a row has a text in the column `system`, and a conversation without a system turn."""
    text, sides = row.get(COLUMN), _conversations(row)
    return isinstance(text, str) and bool(text.strip()) and bool(sides) and not _begins_with_system(sides)


def from_column(row: Row) -> Row:
    turn = {"role": "system", "content": row[COLUMN]}
    return {**row, **{key: [turn, *side] for key, side in _conversations(row).items()}}


def has_system(row: Row) -> bool:
    """Whether the conversation of a row begins with a system turn that a user's turn follows."""
    sides = _conversations(row)
    followed = all(len(side) > 1 and side[1].get("role") == "user" for side in sides.values())
    return _begins_with_system(sides) and followed


def merged(row: Row) -> Row:
    """The system turn's text at the head of the user's turn, an empty line between them."""
    return {**row, **{key: [_joined(side[0], side[1]), *side[2:]] for key, side in _conversations(row).items()}}


def _begins_with_system(sides: dict[str, list[dict[str, Any]]]) -> bool:
    return bool(sides) and all(side[0].get("role") == "system" for side in sides.values())


def _joined(system: dict[str, Any], user: dict[str, Any]) -> dict[str, Any]:
    before, after = (content_text(turn.get("content")) for turn in (system, user))
    return {**user, "content": f"{before}\n\n{after}"}
