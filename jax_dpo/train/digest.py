"""The digest of a checkpoint: which files were written, how long each is, and what is in it.

Orbax restores a file with a flipped bit without a word. So every checkpoint carries `digest.json`: size and blake2b of
each of its files, and the shape and dtype of each array. It is written last, so a directory that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jax_dpo.errors import UserError

DIGEST = "digest.json"
FORMAT = "jax_dpo checkpoint 1"
_BLOCK = 4 << 20


def write_json(path: Path, value: Any) -> None:
    """Write `value` under another name, flush it to the disk and move it into place: it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_digest(directory: Path, *, step: int, arrays: Mapping[str, tuple[str, list[int]]]) -> None:
    """Read every file below `directory` back and write `digest.json` beside them.

    `arrays` maps the path of an array in the state to (dtype, shape).
    """
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    names = [name for name in names if name != DIGEST]
    hashes = _hash_all([directory / name for name in names])
    files = {name: [(directory / name).stat().st_size, digest] for name, digest in zip(names, hashes, strict=True)}
    content = {
        "format": FORMAT,
        "step": step,
        "files": files,
        "arrays": {path: [dtype, list(shape)] for path, (dtype, shape) in arrays.items()},
    }
    write_json(directory / DIGEST, {**content, "digest": _seal(content)})


def read_digest(directory: Path) -> dict[str, Any] | None:
    """What `digest.json` of `directory` says, or None where there is none that is whole and ours."""
    try:
        content = json.loads((directory / DIGEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    seal = content.pop("digest", None)
    return content if seal == _seal(content) else None


def damage(directory: Path, *, part: int = 0, parts: int = 1) -> str:
    """What is wrong with the checkpoint in `directory`, as a clause that names the file; "" where nothing is.

    Of several processes each checks its own share of the files: number `part` of `parts`.
    """
    if not directory.is_dir():
        return "there is no such directory"
    if not (directory / DIGEST).is_file():
        return f"{DIGEST} is missing: its save was not finished, or something else made it"
    content = read_digest(directory)
    if content is None:
        return f"{DIGEST} is not readable: it is cut short, changed, or not from this version of jax_dpo"
    names = sorted(content["files"])[part::parts]
    for name in names:
        size = content["files"][name][0]
        try:
            found = (directory / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        if found != size:
            return f"{name} has {found} bytes, {size} were written"
    try:
        hashes = _hash_all([directory / name for name in names])
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror or error})"
    for name, found_hash in zip(names, hashes, strict=True):
        if found_hash != content["files"][name][1]:
            return f"{name} is not what was written: its blake2b differs"
    return ""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, in the order of the tree: `params.model.norm.weight`, `opt_state.0.mu...`."""
    import jax

    named: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in named:
            raise ValueError(f"two leaves of the state have one name: {name}")
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(f"{name} is a {type(leaf).__name__}, not an array")
        named[name] = leaf
    return named


def compare_arrays(directory: Path, written: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a state of another build: Orbax would cast another dtype without a word."""
    wrong = []
    for name, leaf in wanted.items():
        here = f"{leaf.dtype}{list(leaf.shape)}"
        if name not in written:
            wrong.append(f"{name} ({here} in this run) is not in the checkpoint")
        elif written[name] != [str(leaf.dtype), list(leaf.shape)]:
            dtype, shape = written[name]
            wrong.append(f"{name} is {dtype}{shape} in the checkpoint and {here} in this run")
    wrong += [f"{name} is in the checkpoint and not in this run" for name in written if name not in wanted]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            "checkpoint-does-not-fit",
            f"{directory} was written by a run with another model, LoRA, dtype, optimizer or beta_dpo_alpha: "
            f"{'; '.join(wrong[:3])}{more}. Set these options as they were, or start with a new output_dir.",
        )


def plain(value: Any) -> Any:
    """JSON's own types: numpy and JAX scalars and arrays as numbers and lists. Raises TypeError for anything else."""

    def convert(item: Any) -> Any:
        if hasattr(item, "tolist"):
            return item.tolist()
        raise TypeError(f"{type(item).__name__} cannot be written as JSON: {item!r}")

    return json.loads(json.dumps(value, default=convert))


def _seal(content: Mapping[str, Any]) -> str:
    """A hash over the digest itself, so that a bit flipped in it is not taken for one in a file."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _hash_all(paths: list[Path]) -> list[str]:
    # hashlib lets other threads run. A quarter of the cores, so that training beside it keeps its own.
    workers = min(8, max(1, (os.cpu_count() or 1) // 4))
    if workers == 1:
        return [_hash(path) for path in paths]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(_hash, paths))


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    buffer = bytearray(min(_BLOCK, max(1, path.stat().st_size)))
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()
