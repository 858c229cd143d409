"""docs/troubleshooting.md: an entry for every message of the program, found by the word in brackets at its end. `make docs` writes it.

What is seen comes from the code (`messages.py`), why and what to do from `troubleshooting.yaml`; a test holds the three together.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.messages import ERROR, PACKAGE, ROOT, WARNING, Message, messages, sentences

PAGE = ROOT / "docs" / "troubleshooting.md"
TEXTS = Path(__file__).with_name("troubleshooting.yaml")
OWN = "own"
KINDS = {ERROR: "Error", WARNING: "Warning", "doctor": "`jax-dpo doctor`", OWN: ""}
_FIELDS = {"kind", "own", "places", "seen", "sentences", "why", "do"}
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

HEAD = """\
# Troubleshooting

Made by `make docs` from the code and `scripts/troubleshooting.yaml`: do not edit this page.

Every error and every warning ends in a word in brackets, in the terminal, in `run.jsonl` and in `report.html`:

```text
error: pairs.jsonl, line 3, column 14: not valid JSON (...); found '...'. Expected one JSON object per line. [data-json]
```

The word is an entry of this page (search for it, or put it behind `#`): what is seen, why, and what to do. `<words>` in angle
brackets are filled in by the program, `[words]` in square ones are not always there. An error ends the command with
[exit code 2](#exit-2), unless the program or the machine failed ([1](#exit-1)), and leaves nothing half-written. A warning does not
end anything.
"""

JUDGED = """\
## Gates and diagnosis

What a finished run is judged by. The words stand in the last tables on the screen, in `verdict.json` and in `report.html`;
[diagnosis.md](diagnosis.md) explains when each is seen and what to change.
"""

Areas = list[dict[str, Any]]


def texts() -> Areas:
    """The areas of the page with their entries, {name: fields}."""
    found: Areas = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))
    return found


def problems(found: Sequence[Message], areas: Areas, written: str = "") -> list[str]:
    """What keeps code and entries apart, a sentence each; `written` is the entries' file as it stands, where a name could stand twice."""
    wrong: list[str] = []
    entries: dict[str, dict[str, Any]] = {}
    for area in areas:
        for name, entry in area["entries"].items():
            if name in entries:
                wrong.append(f"{name}: two entries")
            entries[name] = entry
    wrong += [
        f"{name}: two entries in one area"
        for name in entries
        if len(re.findall(rf"^    {re.escape(name)}:$", written, re.M)) > 1
    ]
    places: dict[str, list[str]] = {}
    for message in found:
        if message.where not in places.setdefault(message.name, []):
            places[message.name].append(message.where)
    for name, where in places.items():
        if name not in entries or entries[name].get("own"):
            wrong.append(f"{name} ({where[0]}): no entry in {TEXTS.name}; write why it comes and what to do")
        elif len(where) != entries[name].get("places", 1):
            wrong.append(
                f"{name}: said in {len(where)} places ({', '.join(where)}), its entry knows {entries[name].get('places', 1)}. "
                f"Give a message of another meaning a name of its own, or write places: {len(where)}"
            )
    for name, entry in entries.items():
        wrong += [f"{name}: {fault}" for fault in _faults(name, entry)]
        if name not in places and not entry.get("own"):
            wrong.append(f"{name}: an entry, but no message of the code")
    return wrong


def _faults(name: str, entry: dict[str, Any]) -> list[str]:
    found = [f"{field} is empty" for field in ("why", "do") if not str(entry.get(field) or "").strip()]
    found += [f"unknown field {field}" for field in set(entry) - _FIELDS]
    if not _NAME.fullmatch(name):
        found.append("a name has small letters, digits and hyphens")
    if entry.get("kind", WARNING) not in KINDS:
        found.append(f"kind {entry['kind']} is none of {', '.join(KINDS)}")
    if entry.get("own") and not entry.get("seen"):
        found.append("seen is empty")
    return found


def page() -> str:
    """The whole page. Raises ValueError where code and entries do not agree, with every name."""
    found, areas = messages(), texts()
    wrong = problems(found, areas, TEXTS.read_text(encoding="utf-8"))
    if wrong:
        raise ValueError("\n".join(wrong))
    said: dict[str, list[Message]] = {}
    for message in found:
        said.setdefault(message.name, []).append(message)
    parts = [HEAD, _contents(areas)]
    for area in areas:
        if "exit-0" in area["entries"]:
            parts.append(_judged(said))
        parts.append(f"## {area['area']}\n\n{wrapped(area['intro'])}\n")
        parts += [_entry(name, entry, said.get(name, [])) for name, entry in area["entries"].items()]
    return "\n".join(parts)


def _contents(areas: Areas) -> str:
    titles = []
    for area in areas:
        titles += ["Gates and diagnosis"] * ("exit-0" in area["entries"]) + [area["area"]]
    return "".join(f"- [{title}](#{anchor(title)})\n" for title in titles)


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


def _entry(name: str, entry: dict[str, Any], said: Sequence[Message]) -> str:
    kind = entry.get("kind") or (OWN if entry.get("own") else ERROR if any(m.kind == ERROR for m in said) else WARNING)
    shown = [entry["seen"]] if "seen" in entry else list(dict.fromkeys(m.text for m in said))
    lines = [f"### {name}", ""]
    if KINDS[kind]:
        lines += [f"{KINDS[kind]}:", ""]
    lines += ["```text", *(line for text in shown for line in _folded(text)), "```", ""]
    lines += [wrapped(f"**Why.** {entry['why']}"), "", wrapped(f"**What to do.** {entry['do']}"), ""]
    if "sentences" in entry:
        parts = [text for file in entry["sentences"] for text in sentences(file)]
        lines += ["```text", *(line for text in dict.fromkeys(parts) for line in _folded(text)), "```", ""]
    return "\n".join(lines)


def _folded(text: str) -> list[str]:
    """A message of one or several lines, those that are long broken and indented."""
    fold = textwrap.TextWrapper(118, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return [line for part in text.split("\n") for line in fold.wrap(part) or [""]]


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 130, break_long_words=False, break_on_hyphens=False)


def gate_names() -> list[str]:
    """The gates, in the order in which they are judged."""
    tree = ast.parse((PACKAGE / "train" / "gates.py").read_text(encoding="utf-8"))
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "Gate"
    ]
    names = [n.args[0].value for n in calls if n.args and isinstance(n.args[0], ast.Constant)]
    return list(dict.fromkeys(str(name) for name in names))


def _judged(said: dict[str, list[Message]]) -> str:
    from jax_dpo.report.diagnosis import NAMES

    lines = [JUDGED]
    for title, names, section in (("gate", gate_names(), "gates"), ("finding", list(NAMES), "diagnosis")):
        for name in names:
            also = f" [{name}](#{name}) is also what ends a run." if name in said else ""
            heading = f"### {name}\n\n" if name not in said else ""
            lines.append(f"{heading}`{name}` is a {title}: [diagnosis.md](diagnosis.md#{section}).{also}\n")
    return "\n".join(lines)


def main() -> int:
    """Writes the page; with --check only says whether it is current."""
    try:
        made = page()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
        print(f"{PAGE.relative_to(ROOT)} is not what the code says: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
