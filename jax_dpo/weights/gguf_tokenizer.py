"""The tokenizer in the metadata of a GGUF file as Hugging Face's files: tokenizer.json, tokenizer_config.json, templates.

Byte-level BPE (`tokenizer.ggml.model` gpt2) carries its merges; how text is cut into words before merging is only a name
(`tokenizer.ggml.pre`), so each name needs an entry here. SentencePiece BPE (`llama`) carries scores, from which the merges
follow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jax_dpo.errors import UserError

# Token types of the format.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(digits: str) -> dict[str, Any]:
    pattern = {"Regex": "|".join((_CONTRACTIONS, _WORDS, digits, _REST))}
    return _sequence({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, _byte_level(False))


_GPT2 = _byte_level(True)
_DIGITS_GPT2 = _sequence({"type": "Digits", "individual_digits": True}, _byte_level(True))
_LLAMA3 = _split(r"\p{N}{1,3}")
_QWEN2 = _split(r"\p{N}")

# name in the file -> how text is cut into words
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
_NFC = frozenset({"qwen2", "deepseek-r1-qwen"})
_BOS_BY_DEFAULT = frozenset({"llama-bpe", "llama3", "llama-v3"})


def tokenizer_files(metadata: dict[str, Any], path: Path) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja and further templates, by name.

    Raises UserError tokenizer-unknown for a kind without an entry here, gguf-metadata where something is missing.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        content = _byte_level_bpe(metadata, path)
    elif kind == "llama":
        content = _sentencepiece(metadata, path)
    else:
        raise UserError(
            "tokenizer-unknown",
            f"{path}: tokenizer.ggml.model is {kind!r}; gpt2 and llama can be converted. Give the tokenizer's own directory.",
        )
    files = {
        "tokenizer.json": json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(),
        "tokenizer_config.json": (json.dumps(_config(metadata), indent=2, ensure_ascii=False) + "\n").encode(),
    }
    for key, value in metadata.items():
        if key == "tokenizer.chat_template":
            files["chat_template.jinja"] = value.encode()
        elif key.startswith("tokenizer.chat_template."):
            files[f"additional_chat_templates/{key.removeprefix('tokenizer.chat_template.')}.jinja"] = value.encode()
    return files


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    arch = metadata.get("general.architecture")
    config: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{arch}.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = _special(metadata, name)
        if token is not None:
            config[f"{key}_token"] = token
    return config


def _special(metadata: dict[str, Any], name: str) -> str | None:
    number, tokens = metadata.get(f"tokenizer.ggml.{name}_token_id"), metadata["tokenizer.ggml.tokens"]
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _tokens(metadata: dict[str, Any], path: Path, *more: str) -> tuple[list[str], list[int]]:
    for name in ("tokens", "token_type", *more):
        if not isinstance(metadata.get(f"tokenizer.ggml.{name}"), list):
            raise UserError(
                "gguf-metadata", f"{path} has no tokenizer.ggml.{name}, without which there is no tokenizer."
            )
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if len(tokens) != len(kinds):
        raise UserError("gguf-metadata", f"{path} has {len(tokens)} tokens, but {len(kinds)} token types.")
    return tokens, kinds


def _byte_level_bpe(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    tokens, kinds = _tokens(metadata, path, "merges")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(
            "tokenizer-unknown",
            f"{path}: tokenizer.ggml.pre is {pre!r}, a way of cutting words that is not known here; known are {known}. "
            "Give the tokenizer's own directory.",
        )
    # Padding of the vocabulary is left out, as in the original files: no text may turn into it.
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind != UNUSED}
    return _tokenizer_json(
        metadata,
        tokens,
        kinds,
        normalizer={"type": "NFC"} if pre in _NFC else None,
        pre_tokenizer=PRE_TOKENIZERS[pre],
        decoder=_byte_level(True),
        add_bos=pre in _BOS_BY_DEFAULT,
        model={
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # Llama 3 takes a word that is a token as it is, even where its merges would not lead there.
            "ignore_merges": pre in _BOS_BY_DEFAULT,
            "vocab": vocabulary,
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    )


def _sentencepiece(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """SentencePiece's BPE: spaces are written as a mark, unknown characters fall back to bytes."""
    tokens, kinds = _tokens(metadata, path, "scores")
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [{"type": "Prepend", "prepend": "\u2581"}, mark] if prefix else [mark]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unmark = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    unknown = next((token for token, kind in zip(tokens, kinds) if kind == UNKNOWN), None)
    return _tokenizer_json(
        metadata,
        tokens,
        kinds,
        normalizer={"type": "Sequence", "normalizers": steps},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [unmark, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        add_bos=True,
        model={
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges_by_score(tokens, kinds, metadata["tokenizer.ggml.scores"]),
        },
    )


def _merges_by_score(tokens: list[str], kinds: list[int], scores: list[float]) -> list[list[str]]:
    """All ways to put a token together from two others, best score of the result first: the order in which they join."""
    ids = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == 1}
    found = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[i], ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _tokenizer_json(
    metadata: dict[str, Any],
    tokens: list[str],
    kinds: list[int],
    *,
    model: dict[str, Any],
    add_bos: bool,
    **steps: dict[str, Any] | None,
) -> dict[str, Any]:
    """The whole of tokenizer.json. Control and user-defined tokens are matched in the text before anything else."""
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **steps,
        "post_processor": _post_processor(metadata, add_bos),
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
        },
    }


def _post_processor(metadata: dict[str, Any], add_bos: bool) -> dict[str, Any] | None:
    """Puts the beginning-of-text token in front, or the end-of-text token behind, where the file says so."""
    before = _special(metadata, "bos") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None
    after = _special(metadata, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if before is None and after is None:
        return None
    ids = {token: metadata["tokenizer.ggml.tokens"].index(token) for token in (before, after) if token is not None}

    def around(letter: str, kind: int) -> list[dict[str, Any]]:
        def special(token: str | None) -> list[dict[str, Any]]:
            return [] if token is None else [{"SpecialToken": {"id": token, "type_id": kind}}]

        return [*special(before), {"Sequence": {"id": letter, "type_id": kind}}, *special(after)]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ids.items()},
    }
