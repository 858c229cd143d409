"""What an option is: its type, its help, the values that it takes; and how a text, a YAML value or a Python value becomes one.

An option is a dataclass field made by `option`. `read` turns given values into clean ones and collects every fault instead of
stopping at the first. A class decorated with `validated` does so whenever it is made.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import inspect
import json
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from numbers import Integral, Real
from typing import Any, Self, TypeVar

from jax_dpo.errors import UserError

TRUE_WORDS = frozenset({"true", "yes", "on", "1"})
FALSE_WORDS = frozenset({"false", "no", "off", "0"})
NULL_WORDS = frozenset({"none", "null"})

C = TypeVar("C")


@dataclass(frozen=True)
class Check:
    """A condition on one value, and the words for it ("at least 1")."""

    expected: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Problem:
    """One fault in what was given: the option, and what is wrong with it."""

    option: str
    text: str
    unknown: bool = False


class Advice(str):
    """What to write instead of an option. Its values ask for nothing but what happens anyway, so they are taken; the first is in effect."""

    values: tuple[Any, ...]

    def __new__(cls, text: str, *values: Any) -> Self:
        made = super().__new__(cls, text)
        made.values = values
        return made

    @property
    def hint(self) -> Any:
        """The type by which a command line reads the option."""
        kinds = {type(value) for value in self.values} - {types.NoneType}
        given = [dict[str, Any] if kind is dict else list[str] if kind is list else kind for kind in kinds]
        return functools.reduce(operator.or_, [*given, *([] if kinds == {bool} else [str]), types.NoneType])

    def takes(self, value: Any) -> bool:
        """Whether the value, or the text that stands for it, is one of those that ask for nothing."""
        try:
            clean = coerce(value, self.hint)
        except Unreadable:
            return False
        return any(clean == known and type(clean) is type(known) for known in self.values)


class SameAs(Advice):
    """Another name of an option; unset, it says nothing."""

    option: str
    kind: Any

    def __new__(cls, option: str, kind: Any, *values: Any) -> Self:
        made = super().__new__(cls, f"write {option}", None, *values)
        made.option, made.kind = option, kind
        return made

    @property
    def hint(self) -> Any:
        return self.kind


class Unreadable(ValueError):
    """A value cannot be read as the option's type; the message says what was expected."""


def at_least(bound: float) -> Check:
    return Check(f"a number of at least {bound:g}", lambda value: value >= bound)


def above(bound: float) -> Check:
    return Check(f"a number above {bound:g}", lambda value: value > bound)


def within(low: float, high: float, *, open_high: bool = False, open_low: bool = False) -> Check:
    """A number from `low` to `high`; an open end does not belong to the range."""
    left, right = "(" if open_low else "[", ")" if open_high else "]"

    def holds(value: float) -> bool:
        return (value > low if open_low else value >= low) and (value < high if open_high else value <= high)

    return Check(f"a number in {left}{low:.10g}, {high:.10g}{right}", holds)


def count_or(*special: int) -> Check:
    """A count of at least 1, or one of the special values, such as -1."""
    words = " or ".join(str(value) for value in special)
    return Check(f"a whole number of at least 1, or {words}", lambda value: value >= 1 or value in special)


def steps_or_share(*, zero: bool = False) -> Check:
    """A number of steps (whole), or a share of all steps in (0, 1); with `zero` also 0."""

    def holds(value: float) -> bool:
        return (value > 0 or (zero and value == 0)) and (value < 1 or value == int(value))

    return Check("a whole number of steps, or a share of all steps between 0 and 1", holds)


def option(
    default: Any,
    help: str,
    *,
    group: str,
    choices: Sequence[str] = (),
    check: Check | None = None,
) -> Any:
    """A dataclass field. `choices` holds for every item where the option is a list; `check` holds for the value."""
    metadata = {"help": help, "group": group, "choices": tuple(choices), "check": check}
    if isinstance(default, (list, dict)):
        return field(default_factory=functools.partial(type(default), default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(item: dataclasses.Field[Any]) -> Any:
    """The value of an option that nobody sets."""
    return item.default if item.default_factory is MISSING else item.default_factory()


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """{option: its type}, the annotations evaluated."""
    return typing.get_type_hints(cls)


def members(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have: (int, NoneType) of `int | None`, (bool,) of `bool`."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def is_list(hint: Any) -> bool:
    return any(typing.get_origin(member) is list for member in members(hint))


_ITEMS = {str: "names", float: "numbers"}


def type_words(hint: Any) -> str:
    """The type in words, for messages: "a whole number or null"."""
    names: list[str] = []
    for member in members(hint):
        origin = typing.get_origin(member)
        if origin is list:
            names.append("a list of " + _ITEMS.get(typing.get_args(member)[0], "mappings"))
        elif origin is dict:
            names.append("a mapping (JSON)")
        else:
            words = {
                bool: "true or false",
                int: "a whole number",
                float: "a number",
                str: "text",
                types.NoneType: "null",
            }
            names.append(words[member])
    return " or ".join(names)


def coerce(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, from Python, YAML or a text of the command line; raises `Unreadable`."""
    if isinstance(value, enum.Enum):
        value = value.value
    kinds = members(hint)
    if types.NoneType in kinds and (value is None or (isinstance(value, str) and value.lower() in NULL_WORDS)):
        return None
    found = _first_reading(value, kinds)
    if found is MISSING:
        raise Unreadable(type_words(hint))
    return found


def _first_reading(value: Any, kinds: tuple[Any, ...]) -> Any:
    """The value read by the first of `kinds` that can read it, else MISSING. Narrow types come before `str`, which reads nearly all."""
    wide_last = sorted(kinds, key=lambda kind: (kind is str, typing.get_origin(kind) is list))
    for kind in wide_last:
        origin = typing.get_origin(kind)
        if origin is list:
            found = _as_list(value, typing.get_args(kind)[0], lone=str not in kinds)
        elif origin is dict:
            found = _as_dict(value, typing.get_args(kind)[1])
        elif kind in _READERS:
            found = _READERS[kind](value)
        else:
            found = MISSING
        if found is not MISSING:
            return found
    return MISSING


def _as_bool(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else None
    return True if word in TRUE_WORDS else False if word in FALSE_WORDS else MISSING


def _as_float(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, Real)):
        return MISSING
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return MISSING
    return number if math.isfinite(number) else MISSING


def _as_int(value: Any) -> Any:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        return int(value)
    number = _as_float(value)
    # 1e3 is a whole number of steps, 0.0 in "steps or share" is not one: shares stay floats.
    return int(number) if number is not MISSING and number.is_integer() and abs(number) >= 1 else MISSING


def _as_text(value: Any) -> Any:
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    # A run called 2024 in YAML is a number there.
    return str(value) if isinstance(value, (Integral, Real)) and not isinstance(value, bool) else MISSING


def _as_list(value: Any, kind: Any, *, lone: bool) -> Any:
    """`lone`: a single value stands for a list of one."""
    if value is None or (isinstance(value, str) and lone and value.lower() in NULL_WORDS):
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value)
    if isinstance(value, str) or (lone and isinstance(value, (Real, enum.Enum))):
        value = [value] if lone else MISSING
    if value is MISSING or isinstance(value, Mapping) or not isinstance(value, Iterable):
        return MISSING
    if typing.get_origin(kind) is dict:
        items = [_as_dict(item, typing.get_args(kind)[1]) for item in value]
        return MISSING if MISSING in items else items
    items = [_READERS[kind](item.value if isinstance(item, enum.Enum) else item) for item in value]
    if lone and len(items) == 1 and isinstance(items[0], str) and items[0].lower() in NULL_WORDS:
        return []
    return MISSING if MISSING in items else items


def _as_dict(value: Any, kind: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _json(value)
    if not isinstance(value, Mapping):
        return MISSING
    if kind is Any:
        return {str(key): item for key, item in value.items()}
    items = {str(key): _READERS[kind](item) for key, item in value.items()}
    return MISSING if MISSING in items.values() else items


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return MISSING


_READERS: dict[Any, Callable[[Any], Any]] = {bool: _as_bool, int: _as_int, float: _as_float, str: _as_text}


def show(value: Any) -> str:
    """A value as a message shows it: as it would be written in YAML, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr) if not isinstance(value, float) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(word: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known words that look most like `word`, best first: at most `n`, and none that is much worse than the best."""
    alike = sorted(
        ((difflib.SequenceMatcher(None, other, word.lower()).ratio(), other) for other in known), reverse=True
    )
    return [other for likeness, other in alike[:n] if likeness >= max(0.6, alike[0][0] - 0.08)]


def unknown_option(name: str, known: Iterable[str], advice: Mapping[str, str]) -> Problem:
    """What to say of a name that no option has: what to write instead, or the names that look like it."""
    if name in advice:
        return Problem(name, f"is not an option here: {advice[name]}", unknown=True)
    close = nearest(name, known)
    words = f"did you mean {' or '.join(close)}?" if close else "--help lists all options"
    return Problem(name, f"there is no such option; {words}", unknown=True)


def sort_out(
    given: Mapping[str, Any], known: Collection[str], advice: Mapping[str, str]
) -> tuple[dict[str, Any], list[Problem]]:
    """(the options among what was given, what is wrong with the other names).

    `advice` answers names that are no options: a value that asks for nothing is left out of both, another name's goes to its option.
    """
    problems = []
    options = {name: value for name, value in given.items() if name in known}
    for name, value in given.items():
        words = advice.get(name)
        if name in known or (isinstance(words, Advice) and words.takes(value)):
            continue
        if isinstance(words, SameAs):
            if options.setdefault(words.option, value) != value:
                problems.append(
                    Problem(
                        name,
                        f"found {show(value)}, but {words.option} {show(options[words.option])}; it is the same option",
                    )
                )
        elif isinstance(words, Advice):
            problems.append(Problem(name, f"found {show(value)}, which is not an option here: {words}", unknown=True))
        else:
            problems.append(unknown_option(name, known, advice))
    return options, problems


def read_value(
    item: dataclasses.Field[Any], hint: Any, value: Any, advice: Mapping[tuple[str, str], str]
) -> tuple[Any, str | None]:
    """(clean value, None), or (value, what is wrong with it). `advice` is what to write instead of a known but unsupported value."""
    meta = item.metadata
    if value is False and "no" in meta["choices"]:
        value = "no"  # YAML reads a bare `no` as false
    if value is False and "none" in meta["choices"]:
        value = "none"
    if value is None and "none" in meta["choices"]:
        value = "none"
    try:
        clean = coerce(value, hint)
    except Unreadable as wrong:
        return value, f"found {show(value)}, expected {wrong}"
    if clean is None:
        return clean, None
    items = clean if isinstance(clean, list) else [clean]
    faults = [fault for one in items if (fault := _fault_of(item, one, advice))]
    if faults:
        return clean, "; ".join(faults)
    if meta["check"] is not None and not meta["check"].holds(clean):
        return clean, f"found {show(clean)}, expected {meta['check'].expected}"
    return clean, None


def _fault_of(item: dataclasses.Field[Any], one: Any, advice: Mapping[tuple[str, str], str]) -> str | None:
    """What is wrong with a value, or with one item of a list."""
    choices = item.metadata["choices"]
    known = (item.name, str(one).lower())
    if isinstance(one, (str, bool)) and known in advice:
        return f"found {show(one)}: {advice[known]}"
    if choices and one not in choices:
        close = nearest(str(one), choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"found {show(one)}, expected one of {', '.join(choices)}{hint}"
    return None


def read(
    cls: Any, given: Mapping[str, Any], advice: Mapping[tuple[str, str], str]
) -> tuple[dict[str, Any], list[Problem]]:
    """Values for every field of `cls` (those that are not given at their defaults; faulty ones left out), and what is wrong."""
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for item in dataclasses.fields(cls):
        if item.name not in given:
            values[item.name] = default_of(item)
            continue
        clean, wrong = read_value(item, types_of(cls)[item.name], given[item.name], advice)
        if wrong is None:
            values[item.name] = clean
        else:
            problems.append(Problem(item.name, wrong))
    return values, problems


def refuse(problems: Sequence[Problem], origins: Mapping[str, str] | None = None) -> None:
    """Raises one UserError that tells all problems, if there are any. `origins` says where each option was written."""
    if not problems:
        return
    lines = []
    for problem in problems:
        origin = (origins or {}).get(problem.option)
        lines.append(f"{problem.option}{f' ({origin})' if origin else ''}: {problem.text}")
    name = "unknown-option" if all(problem.unknown for problem in problems) else "invalid-option"
    if len(lines) == 1:
        raise UserError(name, f"option {lines[0]}")
    raise UserError(name, f"{len(lines)} options cannot be used:\n" + "\n".join(f"  {line}" for line in lines))


def validated(
    check: Callable[[type, Mapping[str, Any]], tuple[dict[str, Any], list[Problem]]],
) -> Callable[[type[C]], type[C]]:
    """Class decorator, put above `@dataclass`: the class takes what `check(cls, given)` makes of the given values, or raises one
    UserError that names all faults. Unknown names are faults like others (a plain dataclass raises a TypeError for them)."""

    def decorate(cls: type[C]) -> type[C]:
        plain = cls.__init__
        positional = [item.name for item in dataclasses.fields(cls) if not item.kw_only]  # type: ignore[arg-type]

        @functools.wraps(plain)
        def checked(self: Any, *args: Any, **given: Any) -> None:
            if len(args) > len(positional):
                raise TypeError(f"{cls.__name__} takes its options by name, such as {cls.__name__}(learning_rate=1e-6)")
            named = dict(zip(positional, args))
            if twice := named.keys() & given.keys():
                raise TypeError(f"{cls.__name__} got {', '.join(twice)} twice")
            values, problems = check(cls, named | given)
            refuse(problems)
            plain(self, **values)

        checked.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
        cls.__init__ = checked  # type: ignore[method-assign, assignment]
        return cls

    return decorate
