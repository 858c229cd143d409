"""Which tokens of an answer of several turns are trained on: all of them, those of the assistant's turns, or those of its last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_dpo.data.pairs import content_text

ALL, ASSISTANT, LAST = COMPLETION_TURNS = ("all", "assistant", "last")

Render = Callable[[Sequence[Any], bool], str]
"""(messages, whether the beginning of the assistant's turn follows) -> text"""


def scored_tokens(
    render: Render, prompt: Sequence[Any], answer: Sequence[Any], text: str, offsets: np.ndarray, turns: str
) -> np.ndarray | str:
    """bool [n]: which tokens of a rendered conversation belong to turns that are trained on; or why that cannot be told.

    Args:
      render: renders the messages of a conversation, see `Render`.
      prompt, answer: its messages; the answer's last one is the assistant's.
      text: all of them rendered.
      offsets: [n, 2] where each token begins and ends in `text`, in characters.
      turns: `assistant` or `last`.

    A turn goes from what invites it (the template's generation prompt) to the end of what the template writes after it, so the token
    that ends it is trained on too. The first turn of the answer goes from where the prompt ends.
    """
    last = len(answer) - 1
    chosen = [i for i, m in enumerate(answer) if m["role"] == "assistant" and (turns == ASSISTANT or i == last)]
    found = np.zeros(len(offsets), bool)
    for i in chosen:
        before = [*prompt, *answer[:i]]
        begin = 0 if i == 0 else _begin(render, before, text)
        end = len(text) if i == last else _end(render, before, answer[i], text, begin)
        if begin is None or end is None:
            return (
                f"turn {i + 1} of an answer: the chat template writes the conversation differently once more turns follow, so the tokens "
                "of a turn cannot be told apart (completion_turns: all trains on every token)"
            )
        found |= (offsets[:, 0] >= begin) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
    return found


def _begin(render: Render, before: Sequence[Any], text: str) -> int | None:
    """Where the assistant's turn after `before` begins; None where the text does not begin with `before`.

    What invites a turn may hold more than is kept of it (an opened thought), so it counts as far as the text goes along with it.
    """
    so_far, invited = render(before, False), render(before, True)
    if not text.startswith(so_far):
        return None
    return next((i for i, (a, b) in enumerate(zip(text, invited)) if a != b), min(len(text), len(invited)))


def _end(render: Render, before: Sequence[Any], turn: Any, text: str, begin: int | None) -> int | None:
    """Where a turn ends that others follow; None where that cannot be told.

    Some templates write a turn differently while it is the last one (an empty thought before it, say); then it is found by its content
    and by what stands behind that.
    """
    alone = render([*before, turn], False)
    if text.startswith(alone):
        return len(alone)
    content = content_text(turn.get("content")).strip()
    at, here = alone.rfind(content), text.find(content, begin or 0)
    if not content or min(at, here) < 0:
        return None
    behind = alone[at + len(content) :]
    return here + len(content) + len(behind) if text.startswith(behind, here + len(content)) else None
