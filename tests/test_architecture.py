"""The shape of the package, read from its source: who imports whom, how long things are, whether every option is read.

Oracle: the list of levels below, which docs/design.md draws. Imports inside functions and those for type checkers count too.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from jax_dpo.config import DPOConfig, ScriptArguments
from jax_dpo.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

# The parts of the package, lowest first. A part imports from lower levels and from itself, nothing else.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "arrays"),
    ("ops", "loss", "data", "sharding"),
    ("models",),
    ("weights", "report"),
    ("train", "policy"),
    ("plan",),
    ("config", "doctor"),
    ("trainer",),
    ("cli", "__init__"),
    ("__main__",),
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
KNOW_DPO_CONFIG = {"config", "trainer", "cli", "__init__"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
TORCH = {"torch", "trl", "peft", "accelerate"}

FILE_LINES, FUNCTION_LINES = 450, 60
KERNEL_FILE_LINES, KERNEL_FUNCTION_LINES = 600, 150

# Options that can only say one thing, so that nobody has to ask (test_options_that_nobody_reads_say_one_thing).
SAY_ONE_THING = {"fp16"}

Sources = Mapping[str, Path]
Rule = Callable[[Sources], list[str]]


def sources_of(folder: Path) -> dict[str, Path]:
    """{module: file} of everything below a folder of the repository."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        names = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


SOURCES = sources_of(ROOT / "jax_dpo")
SCRIPTS = sources_of(ROOT / "scripts")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part_of(module: str) -> str:
    """The part that a module belongs to: `ops` of jax_dpo.ops.attention.api, `__init__` of jax_dpo itself."""
    return [*module.split("."), "__init__"][1]


def imports(sources: Sources) -> Iterator[tuple[str, int, str]]:
    """(module, line, module that it imports), wherever the import stands; of `from p import m` the module p.m where there is one."""
    for module, path in sources.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                yield from ((module, node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{path}:{node.lineno}: write the whole path of the module"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield module, node.lineno, inner if inner in sources else node.module


def top(module: str) -> str:
    return module.partition(".")[0]


def not_downward(sources: Sources) -> list[str]:
    faults = []
    for module, line, target in imports(sources):
        if top(target) != "jax_dpo":
            continue
        here, there = part_of(module), part_of(target)
        if here != there and LEVEL[there] >= LEVEL[here]:
            faults.append(f"{module}:{line} imports {target}, which is not below it")
    return faults


def circles(sources: Sources) -> list[str]:
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for module, _, target in imports(sources):
        if target in graph and target != module:
            graph[module].add(target)
    done: set[str] = set()
    faults: list[str] = []

    def walk(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            faults.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                walk(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        walk(module, ())
    return faults


def knows_the_options(sources: Sources) -> list[str]:
    faults = []
    for module, path in sources.items():
        if part_of(module) in KNOW_DPO_CONFIG:
            continue
        for node in ast.walk(tree_of(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else []
            if "DPOConfig" in names:
                faults.append(f"{module}:{node.lineno} knows DPOConfig")
    return faults


def imports_torch(sources: Sources) -> list[str]:
    return [f"{module}:{line} imports {target}" for module, line, target in imports(sources) if top(target) in TORCH]


def data_with_jax(sources: Sources) -> list[str]:
    return [
        f"{module}:{line} imports {target}"
        for module, line, target in imports(sources)
        if part_of(module) == "data" and top(target) in JAX
    ]


def too_long(sources: Sources) -> list[str]:
    """Lines of the file, docstrings and comments among them."""
    faults = []
    for module, path in sources.items():
        kernel = path.stem.startswith("pallas") and part_of(module) == "ops"
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > (KERNEL_FILE_LINES if kernel else FILE_LINES):
            faults.append(f"{module} has {lines} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > (KERNEL_FUNCTION_LINES if kernel else FUNCTION_LINES):
                    faults.append(f"{module}:{node.lineno} {node.name} has {length} lines")
    return faults


@pytest.mark.parametrize(
    "rule", [not_downward, circles, knows_the_options, imports_torch, data_with_jax, too_long], ids=lambda r: r.__name__
)
def test_the_package_keeps(rule: Rule) -> None:
    faults = rule(SOURCES)
    assert not faults, "\n".join(faults)


def test_every_part_has_a_level() -> None:
    assert {part_of(module) for module in SOURCES} == set(LEVEL)


def test_the_scripts_are_short_too() -> None:
    assert not too_long(SCRIPTS)


def options_read(sources: Sources) -> set[str]:
    """What is read off a configuration (`config`, `args`, `script`; `c` and `a` for short) outside jax_dpo/config."""
    found = set()
    for module, path in sources.items():
        for node in ast.walk(tree_of(path)) if part_of(module) != "config" else ():
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                if name in ("config", "args", "script", "c", "a"):
                    found.add(node.attr)
    return found


def test_every_option_is_read() -> None:
    options = {item.name for cls in (DPOConfig, ScriptArguments) for item in dataclasses.fields(cls)}
    assert options - options_read(SOURCES) == SAY_ONE_THING


def test_options_that_nobody_reads_say_one_thing() -> None:
    with pytest.raises(UserError, match="fp16"):
        DPOConfig(fp16=True)


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        (not_downward, "train.x", "from jax_dpo.trainer import DPOTrainer"),
        (not_downward, "ops.x", "import jax_dpo.loss.family"),
        (not_downward, "weights.x", "def f():\n    from jax_dpo import __version__"),
        (not_downward, "report.x", "if TYPE_CHECKING:\n    from jax_dpo.weights.peft import Adapter"),
        (circles, "loss.family", "from jax_dpo.loss.scores import x\nfrom jax_dpo.loss import family2"),
        (knows_the_options, "policy", "def f():\n    from jax_dpo.config import DPOConfig"),
        (knows_the_options, "train.x", "def f(config: jax_dpo.DPOConfig): ..."),
        (imports_torch, "weights.x", "if TYPE_CHECKING:\n    import torch.nn"),
        (data_with_jax, "data.x", "def f():\n    import jax.numpy as jnp"),
        (too_long, "train.x", "def f():\n" + "    pass\n" * FUNCTION_LINES),
        (too_long, "ops.pallas_x", "def f():\n" + "    pass\n" * KERNEL_FUNCTION_LINES),
        (too_long, "report.x", "x = 1\n" * (FILE_LINES + 1)),
    ],
)
def test_a_planted_fault_is_found(rule: Rule, module: str, text: str, tmp_path: Path) -> None:
    """A rule that finds nothing, ever, would pass the tests above."""
    planted = tmp_path / f"{module.rpartition('.')[2]}.py"
    planted.write_text(text, encoding="utf-8")
    back = tmp_path / "back.py"
    back.write_text("from jax_dpo.loss.family import y", encoding="utf-8")
    more = {f"jax_dpo.{module}": planted, "jax_dpo.loss.family2": back}
    assert rule({**SOURCES, **more})
    assert not rule({**SOURCES, "jax_dpo.loss.family2": back})
