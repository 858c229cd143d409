"""Changes to the files of a tokenizer: another chat template, another end of an answer, more tokens.

Only the values that change are written anew, in the files and keys that are there, so that who could read them before still can:
what transformers 5 would write of the same tokenizer transformers 4 does not always read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_dpo.errors import UserError
from jax_dpo.weights.source import resolve_model
from jax_dpo.weights.tokenizer_files import auto_tokenizer, read_tokenizer_files

TEMPLATE, CONFIG, TOKENIZER = "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"
SPECIALS, GENERATION = "special_tokens_map.json", "generation_config.json"
SUFFIXES = (".jinja", ".jinja2", ".j2")


@dataclass(frozen=True)
class TokenizerChanges:
    """What is to be another in a tokenizer; nothing by default.

    template: the chat template. eos_token: the token that ends an answer; it must be in the vocabulary or among those that are added.
    special, plain: tokens that are added where they are not there; the first are left out of decoded text. template_in_config: the
    template is written into tokenizer_config.json too, that of the tokenizer itself where no other is given.
    """

    template: str | None = None
    eos_token: str | None = None
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    template_in_config: bool = False

    def __bool__(self) -> bool:
        return self != UNCHANGED


UNCHANGED = TokenizerChanges()


def read_template(name: str) -> TokenizerChanges:
    """The template at a path, as TRL reads it: that of a .jinja file, or template, end-of-sequence token and added tokens of a directory
    or Hub name.

    Raises UserError: chat-template-path (no such file, no text, no template there), what `resolve_model` raises.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.suffix in SUFFIXES:
        if not path.is_file() or path.suffix not in SUFFIXES:
            what = "ends in none of " + ", ".join(SUFFIXES) if path.is_file() else "is not there"
            raise UserError(
                "chat-template-path",
                f"chat_template_path {name} {what}. Give a Jinja template, or a directory or Hub name with a tokenizer.",
            )
        try:
            return TokenizerChanges(template=path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise UserError("chat-template-path", f"chat_template_path {name} is not text in UTF-8.") from None
    files = read_tokenizer_files(resolve_model(name))
    template = template_of(files)
    if template is None:
        raise UserError(
            "chat-template-path",
            f"chat_template_path {name} has no chat template (no {TEMPLATE}, none in {CONFIG}). Give one whose tokenizer has "
            "one, or a .jinja file.",
        )
    added = _read(files, TOKENIZER).get("added_tokens", [])
    special, plain = (tuple(t["content"] for t in added if t["special"] == kind) for kind in (True, False))
    return TokenizerChanges(template, eos_token_of(files), special, plain)


def template_of(files: Mapping[str, bytes]) -> str | None:
    """The chat template in the files of a tokenizer, found where transformers looks: the file of its own wins."""
    if TEMPLATE in files:
        return files[TEMPLATE].decode("utf-8")
    for name in ("chat_template.json", CONFIG):
        found = _read(files, name).get("chat_template")
        if isinstance(found, list):  # several by name
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        if found:
            return str(found)
    return None


def eos_token_of(files: Mapping[str, bytes]) -> str | None:
    """The tokenizer's end-of-sequence token as text."""
    for name in (CONFIG, SPECIALS):
        found = _read(files, name).get("eos_token")
        found = found.get("content") if isinstance(found, dict) else found
        if found:
            return str(found)
    return None


def change_files(files: Mapping[str, bytes], changes: TokenizerChanges, where: str) -> dict[str, bytes]:
    """The files with the changes made; those that need none stay byte for byte. `where` the tokenizer lies, for messages.

    Raises UserError: chat-template-missing (`template_in_config` without one), eos-token-unknown, tokenizer-broken.
    """
    found = dict(files)
    template = changes.template if changes.template is not None else template_of(found)
    if changes.template_in_config and template is None:
        raise UserError(
            "chat-template-missing",
            f"template_in_tokenizer_config is true, but the tokenizer of {where} has no chat template. Name one with chat_template_path.",
        )
    if changes.template is not None:
        found[TEMPLATE] = changes.template.encode("utf-8")
        found.pop("chat_template.json", None)
    if template is not None and (
        changes.template_in_config or (changes.template is not None and "chat_template" in _read(found, CONFIG))
    ):
        _set(found, CONFIG, "chat_template", _named(_read(found, CONFIG).get("chat_template"), template))
    if changes.special or changes.plain:
        found = _with_tokenizer_json(found, where)
        for tokens, special in ((changes.special, True), (changes.plain, False)):
            _add(found, tokens, special)
    if changes.eos_token is not None:
        found = _set_eos(found, changes.eos_token, where)
    return found


def stop_at(generation_config: bytes | None, hf_config: Mapping[str, Any], token: int) -> bytes | None:
    """generation_config.json with `token` among those that end an answer; as it came where it stops there already.

    Those that it has stay and come first. Where there is no file, config.json's are what counts: they are taken over.
    """
    content = json.loads(generation_config) if generation_config is not None else _of_config(hf_config)
    there = stops_of(content)
    if token in there:
        return generation_config
    content["eos_token_id"] = [*there, token]
    return _dump(content)


def stops_of(content: Mapping[str, Any]) -> list[int]:
    """`eos_token_id` of a generation_config.json or config.json as a list."""
    given = content.get("eos_token_id")
    found = given if isinstance(given, list) else [given]
    return [i for i in found if isinstance(i, int) and i >= 0]


def token_ids(files: Mapping[str, bytes]) -> dict[str, int]:
    """{token: id} of all that a tokenizer.json knows; a token that was added counts before a word of the vocabulary."""
    content = _read(files, TOKENIZER)
    vocabulary = content.get("model", {}).get("vocab", {})
    words = vocabulary if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
    return {**words, **{entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}}


def _of_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: hf_config[name] for name in names if hf_config.get(name) is not None}


def _named(before: Any, template: str) -> Any:
    """The template in the form that tokenizer_config.json has it in: alone, or among others by name."""
    if not isinstance(before, list):
        return template
    return [*(e for e in before if e.get("name") != "default"), {"name": "default", "template": template}]


def _set_eos(files: dict[str, bytes], token: str, where: str) -> dict[str, bytes]:
    """The token as the end of an answer. Everyone must read it as one token, also who reads tokenizer.json alone."""
    if eos_token_of(files) == token:
        return files
    found = _with_tokenizer_json(files, where)
    ids = token_ids(found)
    if token not in ids:
        raise UserError(
            "eos-token-unknown",
            f"eos_token {token!r} is no token of the tokenizer of {where}. Name one that it has "
            "(on a command line in quotes), or add it: added_special_tokens.",
        )
    _mark(found, {token: ids[token]}, special=True)
    _set(found, CONFIG, "eos_token", token)
    if "eos_token" in _read(found, SPECIALS):
        _set(found, SPECIALS, "eos_token", token)
    return found


def _add(files: dict[str, bytes], tokens: Sequence[str], special: bool) -> None:
    """Tokens as transformers' `add_tokens` numbers them: after all that are there."""
    content, ids = _read(files, TOKENIZER), token_ids(files)
    numbers = [entry["id"] for entry in content.get("added_tokens", [])]
    first = max(len(content["model"]["vocab"]), max(numbers, default=-1) + 1)
    new = [token for token in dict.fromkeys(tokens) if token not in ids]
    _mark(files, {t: ids[t] for t in tokens if t in ids} | {t: first + i for i, t in enumerate(new)}, special)


def _mark(files: dict[str, bytes], tokens: Mapping[str, int], special: bool) -> None:
    """Tokens, by their ids, as such that are never cut, where they are none yet."""
    content = _read(files, TOKENIZER)
    there = {entry["content"] for entry in content["added_tokens"]}
    flags: dict[str, Any] = {"single_word": False, "lstrip": False, "rstrip": False}
    flags |= {"normalized": not special, "special": special}
    new: dict[int, dict[str, Any]] = {
        number: {"content": token, **flags} for token, number in tokens.items() if token not in there
    }
    if not new:
        return
    entries = [*content["added_tokens"], *({"id": number, **entry} for number, entry in new.items())]
    content["added_tokens"] = sorted(entries, key=lambda entry: int(entry["id"]))
    files[TOKENIZER] = _dump(content)
    decoder = _read(files, CONFIG).get("added_tokens_decoder")
    if decoder is not None:
        _set(files, CONFIG, "added_tokens_decoder", {**decoder, **{str(number): e for number, e in new.items()}})
    if "added_tokens.json" in files:
        files["added_tokens.json"] = _dump(
            _read(files, "added_tokens.json") | {entry["content"]: number for number, entry in new.items()}
        )


def _with_tokenizer_json(files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    """The files with a tokenizer.json, which transformers makes where there are only those of a slow tokenizer."""
    if TOKENIZER in files:
        return dict(files)
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
        write_files(files, Path(before))
        try:
            auto_tokenizer().from_pretrained(before, local_files_only=True).save_pretrained(after)
        except Exception as error:
            raise UserError("tokenizer-broken", f"The tokenizer of {where} cannot be loaded: {error}.") from error
        return {**files, **read_tokenizer_files(Path(after))}


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """The files into a folder that is there."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _read(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return dict(json.loads(files[name])) if name in files else {}


def _set(files: dict[str, bytes], name: str, key: str, value: Any) -> None:
    files[name] = _dump({**_read(files, name), key: value})


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
