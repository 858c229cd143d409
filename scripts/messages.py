"""What the program can say, read from its code: every named message of `jax_dpo`, as text with placeholders.

A message is `UserError(name, text)` or `named(name, text)`. Names that stand in a variable are looked up in its function; texts that
another function of the module gives are looked up there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jax_dpo"

ERROR, WARNING = "error", "warning"
_MAKERS = {"UserError": ERROR, "named": WARNING}
# Functions that hand on a message which was named elsewhere: they have no name of their own.
# Names of files that other modules' constants hold.
FILES = {"CONFIG": "adapter_config.json", "WEIGHTS": "adapter_model.safetensors"}
HANDED_ON = {"errors.py": {"__str__"}, "train/agree.py": {"raise_together"}}
# What warnings are collected in, and functions that make some without saying so in their names.
_LISTS = {"warnings", "notes", "problems", "complaints"}
WARNERS = {"without_effect", "_left_out", "hints", "unused_accelerators"}
# Functions that give a part of a sentence, and no sentence.
_PARTS = {"_kind", "_near", "_place", "__str__", "type_words"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Message:
    """One place of the code that says something: `text` has `<placeholders>`; `where` is file and line."""

    name: str
    kind: str
    text: str
    file: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def messages(package: Path = PACKAGE) -> list[Message]:
    """All of them, in the order of files and lines. Raises ValueError for one whose name the code does not tell."""
    found: list[Message] = []
    for path in sorted(package.rglob("*.py")):
        found += Source(path, path.relative_to(package).as_posix()).messages()
    return found


def sentences(file: str, package: Path = PACKAGE) -> list[str]:
    """What the functions of a module that return a sentence, or none, can return; and the texts of its `Problem`s."""
    source = Source(package / file, file)
    found: list[str] = []
    for node in source.nodes:
        if isinstance(node, ast.Return) and node.value is not None:
            function = source.function(node)
            if function is None or function.returns is None or function.name in _PARTS:
                continue
            if "str" in ast.unparse(function.returns):
                found += [text for text in source.texts(node.value, function) if _is_sentence(text)]
        if isinstance(node, ast.Call) and _called(node) == "Problem" and len(node.args) > 1:
            found += [text for text in source.texts(node.args[1], source.function(node)) if _is_sentence(text)]
    return list(dict.fromkeys(found))


def unnamed(package: Path = PACKAGE) -> list[str]:
    """Sentences that reach a person without a name: put into warnings, notes or problems as they are. File, line and text of each."""
    found: list[str] = []
    for path in sorted(package.rglob("*.py")):
        found += Source(path, path.relative_to(package).as_posix()).unnamed()
    return found


def _is_sentence(text: str) -> bool:
    return " " in text and not re.fullmatch(r"<[^<>]*>", text) and text[0] != ";"


class Source:
    """A module's code."""

    def __init__(self, path: Path, file: str) -> None:
        self.file = file
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.nodes: list[ast.AST] = [self.tree]
        self._parents: dict[ast.AST, ast.AST] = {}
        for node in self.nodes:  # grows while it is gone through
            for child in ast.iter_child_nodes(node):
                self._parents[child] = node
                self.nodes.append(child)

    def messages(self) -> list[Message]:
        found: list[Message] = []
        for node in self.nodes:
            kind = _MAKERS.get(_called(node)) if isinstance(node, ast.Call) else None
            if kind is None or not isinstance(node, ast.Call) or len(node.args) != 2:
                continue
            function = self.function(node)
            if function is not None and function.name in HANDED_ON.get(self.file, ()):
                continue
            names, texts = self._names(node.args[0], function), self.texts(node.args[1], function)
            if not names:
                if _is_name_of_error(node.args[0]):
                    continue
                raise ValueError(f"{self.file}:{node.lineno}: the name of this message is not told by the code")
            for i, name in enumerate(names):  # a name and a text that are chosen together
                own = [texts[i]] if len(texts) == len(names) else texts
                found += [Message(name, kind, text, self.file, node.lineno) for text in own]
        return sorted(found, key=lambda message: message.line)

    def unnamed(self) -> list[str]:
        found: list[tuple[int, str]] = []
        warners = self._warners()
        for node in self.nodes:
            if not isinstance(node, ast.Call | ast.AugAssign | ast.Assign | ast.Return):
                continue
            function = self.function(node)
            warns = function is not None and function.name in warners
            for text in _told(node, everything=warns):
                if len(re.sub(r"<[^<>]*>", "", self.text(text)).split()) >= 5:
                    found.append((text.lineno, f"{self.file}:{text.lineno}: {self.text(text)}"))
        return [words for _, words in sorted(found)]

    def _warners(self) -> set[str]:
        """The functions that make warnings, and those of the module that they call and that give lists of texts."""
        made = {
            node.name: node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.FunctionDef)
            and node.returns is not None
            and ast.unparse(node.returns) == "list[str]"
        }
        found = {name for name in made if "warn" in name or name in WARNERS}
        while True:
            called = {_called(x) for name in found for x in ast.walk(made[name]) if isinstance(x, ast.Call)}
            more = called & set(made) - found
            if not more:
                return found
            found |= more

    def function(self, node: ast.AST) -> _Function | None:
        """The function that a node stands in."""
        while node in self._parents:
            node = self._parents[node]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                return node
        return None

    @cached_property
    def _constants(self) -> dict[str, str]:
        """Texts and numbers of the module's own constants."""
        return {
            target.id: str(node.value.value)
            for node in self.tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str | int | float)
        }

    def _names(self, node: ast.expr, function: _Function | None) -> list[str]:
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.IfExp):
            return [name for branch in (node.body, node.orelse) for name in self._names(branch, function)]
        return [
            name for value in self._assigned(node, function) if value is not node for name in self._names(value, None)
        ]

    def _assigned(self, node: ast.expr, function: _Function | None) -> Iterator[ast.expr]:
        """The values that a variable is given in its function."""
        if not isinstance(node, ast.Name) or function is None:
            return
        for other in ast.walk(function):
            if isinstance(other, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == node.id for target in other.targets
            ):
                yield other.value

    def texts(self, node: ast.expr, function: _Function | None) -> list[str]:
        """What an expression can say; one text, or one for each branch of a choice."""
        if isinstance(node, ast.IfExp):
            return [text for branch in (node.body, node.orelse) for text in self.texts(branch, function)]
        if isinstance(node, ast.Name):
            values = list(self._assigned(node, function))
            if values and not any(isinstance(value, ast.List) for value in values):
                return [text for value in values for text in self.texts(value, None)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            made = [x for x in self.tree.body if isinstance(x, ast.FunctionDef) and x.name == node.func.id]
            given = [x.value for f in made for x in ast.walk(f) if isinstance(x, ast.Return) and x.value is not None]
            if given and _MAKERS.get(node.func.id) is None:
                return [text for value in given for text in self.texts(value, made[0])]
        return [re.sub(r"(<[^<>]+>)\1", r"\1", self.text(node))]  # of a word whose first letter is made a capital

    def text(self, node: ast.AST) -> str:
        """An expression of text as it reads, with `<placeholders>` for what is filled in."""
        match node:
            case ast.Constant(value=None):
                return ""
            case ast.Constant(value=value):
                return str(value)
            case ast.JoinedStr(values=values):
                return "".join(map(self.text, values))
            case ast.FormattedValue(value=value, conversion=conversion):
                return f"'{self.text(value)}'" if conversion == ord("r") else self.text(value)
            case ast.BinOp(left=left, op=ast.Add(), right=right) if not _is_number(right):
                return self.text(left) + self.text(right)
            case ast.BinOp(left=ast.Constant(value=str(value)), op=ast.Mult()):
                return f"({value})"
            case ast.BinOp(left=left, op=ast.Div(), right=right) if _is_path(left):
                return f"{self.text(left)}/{self.text(right)}"
            case ast.IfExp(body=body, orelse=orelse):
                one, other = self.text(body), self.text(orelse).strip(".")
                return f"{one} / {other}" if one and other else f"[{one or other}]" if one or other else ""
            case ast.Name(id=name) if name in self._constants:
                return self._constants[name]
            case ast.Name(id=name) if name in FILES:
                return FILES[name]
        return f"<{_word(node)}>"


def _told(node: ast.AST, everything: bool) -> list[ast.expr]:
    """The texts that a statement puts among warnings: in a function that makes them, whatever it appends or returns in a list."""
    into: ast.expr | None = None
    given: list[ast.expr] = []
    match node:
        case ast.Call(func=ast.Attribute(value=target, attr="append"), args=[text]):
            into, given = target, [text]
        case ast.AugAssign(target=target, value=ast.List(elts=items)):
            into, given = target, items
        case ast.Assign(targets=[target], value=ast.List(elts=items)):
            into, given = target, items
        case ast.Return(value=ast.List(elts=items)) if everything:
            given = items
    if into is not None and not everything and ast.unparse(into).rpartition(".")[2].strip("_") not in _LISTS:
        return []
    return [
        x for x in given if isinstance(x, ast.JoinedStr) or (isinstance(x, ast.Constant) and isinstance(x.value, str))
    ]


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _is_name_of_error(node: ast.expr) -> bool:
    """`error.name`: an error that is raised again with more words."""
    return isinstance(node, ast.Attribute) and node.attr == "name"


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def _is_path(node: ast.expr) -> bool:
    words = ast.unparse(node)
    return any(word in words for word in ("path", "dir", "out", "folder", "root"))


def _word(node: ast.AST) -> str:
    """A short word for what is filled in."""
    match node:
        case ast.Name(id=name):
            return {"n": "number", "k": "number", "e": "what went wrong", "error": "what went wrong"}.get(
                name, name.strip("_").replace("_", " ").lower()
            )
        case ast.Attribute(value=value, attr=attr):
            if attr in ("value", "strerror", "path", "name", "title", "config", "files", "args") and isinstance(
                value, ast.Name | ast.Attribute
            ):
                inner = _word(value)
                return {"strerror": "what went wrong"}.get(attr, inner if attr in ("value", "config", "args") else attr)
            return attr.strip("_").replace("_", " ")
        case ast.Subscript(slice=ast.Constant(value=str(key))):
            return key.replace("_", " ")
        case ast.Subscript(value=value) | ast.Starred(value=value) | ast.FormattedValue(value=value):
            return _word(value)
        case ast.Call(func=ast.Name(id="len" | "int" | "sum")):
            return "number"
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=str(key)), *_]):
            return key.replace("_", " ")
        case ast.Call(func=ast.Attribute(value=ast.Name(id="jax"), attr=attr)):
            return attr.replace("_", " ")
        case ast.Call(func=ast.Name(id="name_rows")) | ast.Call(func=ast.Attribute(attr="row_names")):
            return "rows"
        case ast.Call(func=ast.Name(id="_count")):
            return "number of rows"
        case ast.Call(func=ast.Attribute(attr="join"), args=[argument, *_]):
            return f"{_word(argument)}, ..."
        case ast.Call(args=[*_, argument]) if not isinstance(argument, ast.Constant):
            return _word(argument)
        case ast.Call(func=ast.Attribute(value=value)):
            return _word(value)
        case ast.Call(func=ast.Name(id=name)):
            return name.strip("_").replace("_", " ")
        case ast.BoolOp(values=[first, *_]):
            return _word(first)
        case ast.BinOp(left=left):
            return _word(left)
        case ast.GeneratorExp(elt=elt) | ast.ListComp(elt=elt) | ast.SetComp(elt=elt):
            return _word(elt)
        case ast.JoinedStr(values=[*_, ast.FormattedValue(value=value)]):
            return _word(value)
    return "..."
