"""TRL once more, another way: what it differs by from itself is what nobody can be blamed for."""

from __future__ import annotations

from scripts.parity import theirs

theirs.AGAIN = True
DO = theirs.DO
