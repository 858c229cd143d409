"""Which files of a local data directory belong to which split.

The data card (`README.md` with `configs:` in its head, as data sets on the Hub have it) decides where there is one; else
each file is the split that its name says: `train.jsonl`, `test_prefs-00000-of-00002.parquet`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jax_dpo.data.files import SUFFIXES, file_format, file_stem
from jax_dpo.errors import UserError

_SHARD = re.compile(r"[-_.]\d+-of-\d+$")
# Names that `datasets` takes for one of its three usual splits.
_ALIASES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}


def is_saved_dataset(directory: Path) -> bool:
    """Whether `datasets`' `save_to_disk` wrote this directory (one data set, or one folder for each split)."""
    return (directory / "dataset_dict.json").is_file() or (
        (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()
    )


def saved_dataset_splits(directory: Path) -> dict[str, list[Path]]:
    """Splits of a `save_to_disk` directory: their names and the folder of each.

    A data set saved alone counts as its own split name, else as `train`.
    """
    try:
        if (directory / "dataset_dict.json").is_file():
            names = json.loads((directory / "dataset_dict.json").read_text("utf-8"))["splits"]
            return {str(name): [directory / str(name)] for name in names}
        state = json.loads((directory / "state.json").read_text("utf-8"))
        return {str(state.get("_split") or "train"): [directory]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("data-directory-damaged", f"{directory} is no complete saved data set: {error!r}.") from error


def directory_splits(directory: Path, config: str | None) -> dict[str, list[Path]]:
    """Splits of a directory of data files, each with its files in order of their names.

    Raises `UserError`: no data file, a data card that cannot be read or names no such configuration or file, two files of
    different formats for one split.
    """
    card = _card_configs(directory)
    if card:
        return _card_splits(directory, card, config)
    if config is not None:
        raise UserError(
            "data-config-missing",
            f"{directory} has no data card with configurations, so there is no {config!r}. Leave the option out.",
        )
    splits: dict[str, list[Path]] = {}
    for folder in (directory, directory / "data"):
        files = sorted(p for p in folder.glob("*") if p.is_file() and not p.name.startswith(".") and file_format(p))
        for file in files:
            name = _SHARD.sub("", file_stem(file))
            splits.setdefault(_ALIASES.get(name, name), []).append(file)
        if splits:
            break
    if not splits:
        raise UserError(
            "data-directory-empty",
            f"{directory} holds no data file. Expected files that end in {', '.join(SUFFIXES)}, named by their split "
            "(train.jsonl, test.jsonl).",
        )
    for name, files in splits.items():
        if len({file_format(file) for file in files}) > 1:
            raise UserError(
                "data-split-ambiguous",
                f"{directory}: {' and '.join(file.name for file in files)} are both the split {name!r}. "
                "Keep one, or name the file itself.",
            )
    if len(splits) == 1 and "train" not in splits:
        # A directory with one set in it: its name need not say that it is for training.
        return {"train": next(iter(splits.values()))}
    return splits


def _card_configs(directory: Path) -> list[dict[str, Any]]:
    """The `configs:` list in the head of `README.md`, empty where there is none."""
    path = directory / "README.md"
    if not path.is_file():
        return []
    import yaml

    try:
        match = re.match(r"---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", path.read_text("utf-8-sig"), re.DOTALL)
        head = yaml.safe_load(match.group(1)) if match else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError("data-card", f"{path}: the head of the data card cannot be read: {error}.") from error
    configs = head.get("configs") if isinstance(head, dict) else None
    if not isinstance(configs, list):
        return []
    return [c for c in configs if isinstance(c, dict) and ("data_files" in c or "data_dir" in c)]


def _card_splits(directory: Path, configs: list[dict[str, Any]], config: str | None) -> dict[str, list[Path]]:
    names = [str(c.get("config_name", "default")) for c in configs]
    if config is None and len(configs) > 1:
        marked = [n for n, c in zip(names, configs) if c.get("default")]
        config = marked[0] if marked else ("default" if "default" in names else None)
        if config is None:
            raise UserError(
                "data-config-needed",
                f"{directory} has the configurations {', '.join(names)}. Set dataset_config to one.",
            )
    if config is not None and config not in names:
        raise UserError("data-config-missing", f"{directory} has no configuration {config!r}, only {', '.join(names)}.")
    chosen = configs[names.index(config)] if config is not None else configs[0]
    if "data_files" not in chosen:
        return directory_splits(directory / str(chosen["data_dir"]), None)
    root = directory / str(chosen.get("data_dir") or "")
    return {split: _matches(root, patterns) for split, patterns in _data_files(chosen["data_files"]).items()}


def _data_files(value: Any) -> dict[str, list[str]]:
    """The forms that a card may give its files in, as {split: patterns}."""
    if isinstance(value, str):
        return {"train": [value]}
    if isinstance(value, dict):
        return {str(split): [p] if isinstance(p, str) else [str(x) for x in p] for split, p in value.items()}
    splits: dict[str, list[str]] = {}
    for item in value if isinstance(value, list) else []:
        if isinstance(item, str):
            splits.setdefault("train", []).append(item)
        elif isinstance(item, dict) and "path" in item:
            paths = [item["path"]] if isinstance(item["path"], str) else list(item["path"])
            splits.setdefault(str(item.get("split", "train")), []).extend(map(str, paths))
    return splits


def _matches(root: Path, patterns: list[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        try:
            found = sorted(p for p in root.glob(pattern) if p.is_file() and file_format(p))
        except (ValueError, NotImplementedError):  # an absolute path or an empty pattern
            found = []
        if not found:
            raise UserError("data-card", f"{root / 'README.md'} names {pattern!r}, but there is no such data file.")
        files += [file for file in found if file not in files]
    return files
