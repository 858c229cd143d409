"""What can go wrong, and how the process ends.

A mistake of the user is a `UserError`: one message, no traceback, exit code 2. Everything else is a bug or the machine.
"""

from __future__ import annotations

OK = 0
UNEXPECTED = 1
USER_INPUT = 2
GATE_FAILED = 3
STOPPED = 75


def named(name: str, text: str) -> str:
    """What a person is told, and behind it in brackets the name under which docs/troubleshooting.md explains it.

    `name` is a short kebab-case word as that of a `UserError`; warnings and notes carry theirs in their text.
    """
    return f"{text} [{name}]"


class UserError(Exception):
    """Input that cannot be used: says where, what was found, what was expected and what to do.

    `name` is a short kebab-case word that stays the same when the wording changes, so that documentation and scripts can refer to it:
    it is an entry of docs/troubleshooting.md.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name
        self.message = message

    def __str__(self) -> str:
        return named(self.name, self.message)


class Stopped(Exception):
    """A signal asked the run to end; what could be saved has been saved."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
