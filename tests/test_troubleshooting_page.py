"""docs/troubleshooting.md has every message of the program. Oracle: the syntax trees of `jax_dpo`, read by scripts/messages.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jax_dpo.cli import main
from jax_dpo.errors import UserError, named
from jax_dpo.report.diagnosis import NAMES
from scripts.messages import Message, messages, sentences, unnamed
from scripts.troubleshooting_page import PAGE, TEXTS, gate_names, page, problems, texts


def written() -> str:
    return PAGE.read_text(encoding="utf-8")


def headings() -> list[str]:
    return [line[4:] for line in written().splitlines() if line.startswith("### ")]


def test_every_message_has_an_entry_and_every_entry_a_message() -> None:
    wrong = problems(messages(), texts(), TEXTS.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


def test_no_warning_is_without_a_name() -> None:
    found = unnamed()
    assert not found, "write named(name, text):\n" + "\n".join(found)


def test_the_page_is_current() -> None:
    assert written() == page(), "docs/troubleshooting.md is not what the code says: run `make docs`"


def test_names_find_their_entries() -> None:
    there = headings()
    assert len(set(there)) == len(there)
    assert {m.name for m in messages()} | {*NAMES, *gate_names()} <= set(there)
    titles = re.findall(r"^#{2,3} (.*)$", written(), re.M)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", written()):
        file, _, place = target.partition("#")
        assert (PAGE.parent / file).exists() if file else place in anchors, target


def test_an_error_on_the_screen_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonsense"]) == 2
    name = re.search(r"\[([a-z0-9-]+)\]$", capsys.readouterr().err.strip())
    assert name is not None and name[1] in headings()
    assert str(UserError("a-name", "what happened.")) == named("a-name", "what happened.") == "what happened. [a-name]"


def collected(tmp_path: Path, code: str) -> list[Message]:
    (tmp_path / "module.py").write_text(code)
    return messages(tmp_path)


def test_messages_are_read_from_the_code(tmp_path: Path) -> None:
    found = collected(
        tmp_path,
        "LIMIT = 3\n"
        "def f(path, error, there):\n"
        "    name = 'one' if there else 'two'\n"
        "    raise UserError(name, f'{path} has {LIMIT} {error.kind!r}' if there else _words(path))\n"
        "def _words(path):\n"
        "    return f'{path}: gone'\n"
        "def g(rows):\n"
        "    return named('three', f'{len(rows)} rows' + (', twice' if rows else ''))\n",
    )
    assert [(m.name, m.kind, m.text, m.line) for m in found] == [
        ("one", "error", "<path> has 3 '<kind>'", 4),
        ("two", "error", "<path>: gone", 4),
        ("three", "warning", "<number> rows[, twice]", 8),
    ]


def test_what_is_apart_is_told_by_name(tmp_path: Path) -> None:
    code = "def f():\n    raise UserError('new', 'a')\ndef g():\n    raise UserError('known', 'b')\n"
    found = collected(tmp_path, code + "def h():\n    raise UserError('known', 'c')\n")
    entry = {"why": "w", "do": "d"}
    areas = [{"area": "A", "entries": {"known": entry, "gone": entry, "Bad": {"own": True, "why": "", "do": "d"}}}]
    wrong = "\n".join(problems(found, areas, "    known:\n    known:\n"))
    for words in (
        "new (module.py:2): no entry",
        "known: said in 2 places (module.py:4, module.py:6), its entry knows 1",
        "known: two entries in one area",
        "gone: an entry, but no message",
        "Bad: why is empty",
        "Bad: seen is empty",
        "Bad: a name has small letters",
    ):
        assert words in wrong, words
    with pytest.raises(ValueError, match=r"module\.py:2: the name"):
        collected(tmp_path, "def f(name):\n    raise UserError(name, 'a')\n")


def test_a_warning_without_a_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "def _more(n) -> list[str]:\n    return [f'{n} rows were left out of the set']\n"
        "def some_warnings(n) -> list[str]:\n"
        "    found = _more(n)\n"
        "    found.append('the rate is far too high for this')\n"
        "    found.append(named('x', 'the rate is far too high for this'))\n"
        "    return found\n"
        "def other(run, lines):\n"
        "    run.notes.append('the cache is no longer where it was')\n"
        "    lines.append('the cache is no longer where it was')\n"
    )
    assert [text.split(":")[1] for text in unnamed(tmp_path)] == ["2", "5", "9"]


def test_the_sentences_of_a_module_are_found() -> None:
    found = sentences("config/kl_rules.py")
    assert "found an empty list, expected eval, train or both" in found
