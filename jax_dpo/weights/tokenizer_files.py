"""The files that belong to a tokenizer: copied as they are, never rewritten, wherever that can be done.

A rewritten file may carry another form than the one that its readers know (transformers 4 and 5 differ in several keys).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

# Every name under which a tokenizer or a chat template is looked for.
NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
TEMPLATE_FOLDER = "additional_chat_templates"


def auto_tokenizer() -> Any:
    """transformers' AutoTokenizer, imported without its advice that torch is missing: nothing here needs torch."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return AutoTokenizer


def read_tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files in a directory by name relative to it; empty where there are none."""
    found = [directory / name for name in NAMES]
    found += sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in found if p.is_file()}


def files_of_tokenizer(tokenizer: Any) -> dict[str, bytes]:
    """The files of a transformers tokenizer object.

    They are those of the directory that it was loaded from, byte for byte, if it still is what that directory gives; a
    tokenizer that was changed since (a pad token set, another template) is written anew by transformers.
    """
    origin = Path(str(getattr(tokenizer, "name_or_path", "") or ""))
    if str(origin) != "." and origin.is_dir():
        files = read_tokenizer_files(origin)
        if "tokenizer_config.json" in files and _same(tokenizer, origin):
            return files
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return read_tokenizer_files(Path(folder))


def _same(tokenizer: Any, origin: Path) -> bool:
    try:
        fresh = auto_tokenizer().from_pretrained(str(origin), local_files_only=True)
    except (OSError, ValueError):
        return False
    return type(fresh) is type(tokenizer) and _state(fresh) == _state(tokenizer)


def _state(tokenizer: Any) -> tuple[Any, ...]:
    """What decides about ids and templates. Padding and truncation are set by each call, so they do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = ""
    if backend is not None:
        import json

        content = json.loads(backend.to_str())
        content["padding"] = content["truncation"] = None
        text = json.dumps(content, sort_keys=True)
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return text, specials, tokenizer.chat_template, tokenizer.get_added_vocab(), tokenizer.model_max_length
