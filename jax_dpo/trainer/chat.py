"""The tokenizer of a run as it was asked for, the model files that go with it, and whether what comes out stops where the data stop."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from typing import Any

from jax_dpo.config import DPOConfig
from jax_dpo.data.tokens import TokenizedPairs
from jax_dpo.errors import UserError, named
from jax_dpo.policy import Policy
from jax_dpo.trainer.datasets import Tokenizer
from jax_dpo.weights.model_files import ModelFiles
from jax_dpo.weights.tokenizer_changes import TokenizerChanges, read_template, stop_at, stops_of

# Marks that templates write as one token: <|im_start|>, <start_of_turn>.
_MARKS = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>")
_TAIL = 4  # tokens at the end of an answer among which the one that ends it is looked for: templates put a line break after it


def changes_of(config: DPOConfig) -> TokenizerChanges:
    """What the options change about the tokenizer; `eos_token` wins over that of `chat_template_path`.

    Raises UserError: what `read_template` raises.
    """
    found = read_template(config.chat_template_path) if config.chat_template_path else TokenizerChanges()
    return replace(
        found,
        eos_token=config.eos_token or found.eos_token,
        template_in_config=config.template_in_tokenizer_config,
    )


def fit(policy: Policy, given: Any, config: DPOConfig) -> tuple[Policy, Tokenizer]:
    """The policy and its tokenizer as the options ask for them. `given`: a tokenizer in place of the model's own, or None.

    Raises:
      UserError: what `read_template` and `change_files` raise; a template that is no Jinja.
    """
    changes = changes_of(config)
    tokenizer = Tokenizer(given, policy, changes)
    if not changes:
        return policy, tokenizer
    if changes.template is not None:
        _check_template(tokenizer.loaded, str(config.chat_template_path))
    if changes.eos_token is None:
        return policy, tokenizer
    files, end = policy.files, int(tokenizer.loaded.eos_token_id)
    generation = stop_at(files.generation_config, files.hf_config, end)
    if generation == files.generation_config:
        return policy, tokenizer
    return replace(policy, files=replace(files, generation_config=generation, altered=True)), tokenizer


def _check_template(tokenizer: Any, path: str) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            "chat-template-broken",
            f"chat_template_path {path}, line {error.lineno} of the template: {error.message}. Expected a Jinja template.",
        ) from None
    except Exception:
        pass


def chat_warnings(
    pairs: TokenizedPairs, name: str, tokenizer: Tokenizer, files: ModelFiles, config: DPOConfig
) -> list[str]:
    """Sentences on answers at whose end the served model would not stop, and on marks of a new template that are cut in pieces."""
    if not len(pairs):
        return []
    loaded = tokenizer.loaded
    found = _unstopped(pairs, name, loaded, files)
    if config.chat_template_path:
        marks = dict.fromkeys(_MARKS.findall(str(loaded.chat_template)))
        pieces = {mark: len(loaded(mark, add_special_tokens=False)["input_ids"]) for mark in marks}
        cut = [f"{mark} ({n})" for mark, n in pieces.items() if n > 1]
        if cut:
            found.append(
                named(
                    "template-marks-cut",
                    f"the chat template writes marks that this tokenizer cuts into several tokens: {', '.join(cut)}. They are "
                    "trained as that text.",
                )
            )
    return found


def _unstopped(pairs: TokenizedPairs, name: str, tokenizer: Any, files: ModelFiles) -> list[str]:
    """A sentence for each token that ends answers and is in no stop list, or only where transformers does not look."""
    decoder = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in decoder.items() if token.special)}
    ends: Counter[int | None] = Counter()
    for i in range(len(pairs)):
        tail = pairs.prepared(i)[1][-_TAIL:].tolist()
        ends[next((t for t in reversed(tail) if t in special), None)] += 1
    # transformers takes config.json's where there is no generation_config.json; vLLM adds the tokenizer's own.
    stops = stops_of(json.loads(files.generation_config) if files.generation_config is not None else files.hf_config)
    where = "generation_config.json" if files.generation_config is not None else "config.json"
    found = []
    for end, count in ends.items():
        share = "the answers end" if count == len(pairs) else f"{count:,} of {len(pairs):,} answers end"
        if end is None:
            found.append(
                named(
                    "answers-without-stop",
                    f"{name}: {share} without a token that tells a server to stop. Let the chat template write one after each "
                    "answer.",
                )
            )
        elif end not in stops:
            token = tokenizer.convert_ids_to_tokens(end)
            what = f"no stop token ({where} has {stops}, the tokenizer {tokenizer.eos_token_id}): servers go on there"
            if end == tokenizer.eos_token_id:
                what = f"the tokenizer's eos_token but not in {where} ({stops}): transformers goes on there, vLLM stops"
            found.append(
                named(
                    "stop-token-missing",
                    f"{name}: {share} with {token} (id {end}), which is {what}. eos_token: '{token}' adds it.",
                )
            )
    return found
