"""The tokenizer of a run as it was asked for, the model files that go with it, and whether what comes out stops where the data stop."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from jax_dpo.config import DPOConfig
from jax_dpo.data.tokens import TokenizedPairs
from jax_dpo.errors import UserError, named
from jax_dpo.models.lora import LoraConfig
from jax_dpo.policy import Policy, load_model
from jax_dpo.trainer.datasets import Tokenizer
from jax_dpo.weights.grow import TABLES
from jax_dpo.weights.model_files import ModelFiles
from jax_dpo.weights.tokenizer_changes import TokenizerChanges, read_template, stop_at, stops_of

# Marks that templates write as one token: <|im_start|>, <start_of_turn>.
_MARKS = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>")
_TAIL = 4  # tokens at the end of an answer among which the one that ends it is looked for: templates put a line break after it


def changes_of(config: DPOConfig) -> TokenizerChanges:
    """What the options change about the tokenizer; `eos_token` wins over that of `chat_template_path`.

    Raises UserError: what `read_template` raises; a token to add that is blank.
    """
    if any(not token.strip() for token in (*config.added_special_tokens, *config.added_tokens)):
        raise UserError(
            "added-token-blank",
            f"added_special_tokens is {config.added_special_tokens}, added_tokens is {config.added_tokens}; none may be blank.",
        )
    found = read_template(config.chat_template_path) if config.chat_template_path else TokenizerChanges()
    return replace(
        found,
        eos_token=config.eos_token or found.eos_token,
        special=(*config.added_special_tokens, *(t for t in found.special if t not in config.added_tokens)),
        plain=(*config.added_tokens, *(t for t in found.plain if t not in config.added_special_tokens)),
        template_in_config=config.template_in_tokenizer_config,
    )


@dataclass(frozen=True)
class Fitted:
    """A policy and its tokenizer as the options ask for them.

    `new`: ids of tokens whose rows were never trained: the tokenizer did not have them, or the model had no row. `rows_before`: how many
    rows for tokens the model came with.
    """

    policy: Policy
    tokenizer: Tokenizer
    new: dict[str, int] = field(default_factory=dict)
    rows_before: int = 0

    def reference(self, given: Any, revision: str | None) -> Any:
        """An explicit reference, with as many rows where it came with as many as the policy: its own means, as in the policy."""
        if given is None or self.policy.config.vocab_size == self.rows_before:
            return given
        other = load_model(given, revision=revision)
        lora = other.config.lora
        alike = other.config.vocab_size == self.rows_before and not (lora is not None and set(lora.saved) & set(TABLES))
        return other.with_rows(self.policy.config.vocab_size) if alike else other

    def adapter(self, given: Any) -> LoraConfig | None:
        """The adapter that is asked for; where there are new rows, embedding and head are trained whole beside it."""
        if given is None:
            return None
        config = LoraConfig.of(given)
        if not self.new:
            return config
        there = config.modules_to_save or []
        tied = self.policy.config.tie_word_embeddings
        wanted = [name for name in (["embed_tokens"] if tied else ["embed_tokens", "lm_head"]) if name not in there]
        return replace(
            config, modules_to_save=[*there, *wanted], ensure_weight_tying=tied or config.ensure_weight_tying
        )

    def notes(self, peft_config: Any) -> list[str]:
        """What was done about new tokens, for the user to read."""
        if not self.new:
            return []
        names = ", ".join(f"{token} ({number})" for token, number in list(self.new.items())[:6])
        more = f" and {len(self.new) - 6} more" if len(self.new) > 6 else ""
        rows = self.policy.config.vocab_size
        where = f"take rows of the model's {rows} that were to spare, as they are"
        if rows != self.rows_before:
            where = f"the model grows from {self.rows_before} to {rows} rows for tokens, each new one the mean of the others"
        found = [named("tokens-added", f"added tokens: {names}{more}: {where}")]
        if peft_config is not None:
            both = "embed_tokens is" if self.policy.config.tie_word_embeddings else "embed_tokens and lm_head are"
            found.append(
                named(
                    "tokens-added-adapter",
                    f"an adapter would not train the rows of added tokens, so {both} trained whole beside it and saved with it "
                    "(modules_to_save)",
                )
            )
        return found


def fit(policy: Policy, given: Any, config: DPOConfig) -> Fitted:
    """The policy and its tokenizer as the options ask for them. `given`: a tokenizer in place of the model's own, or None.

    Raises:
      UserError: what `changes_of` and `change_files` raise; a template that is no Jinja; new tokens for a model with a trained adapter.
    """
    changes = changes_of(config)
    tokenizer = Tokenizer(given, policy, changes)
    fitted = Fitted(policy, tokenizer, {}, policy.config.vocab_size)
    if changes.template is not None:
        _check_template(tokenizer.loaded, str(config.chat_template_path))
    if changes.special or changes.plain:
        fitted = _with_rows(fitted, Tokenizer(given, policy), (*changes.special, *changes.plain))
    if changes.eos_token is None:
        return fitted
    files, end = fitted.policy.files, int(tokenizer.loaded.eos_token_id)
    generation = stop_at(files.generation_config, files.hf_config, end)
    if generation == files.generation_config:
        return fitted
    files = replace(files, generation_config=generation, altered=True)
    return replace(fitted, policy=replace(fitted.policy, files=files))


def _with_rows(fitted: Fitted, before: Tokenizer, tokens: tuple[str, ...]) -> Fitted:
    """Rows for the tokens that are named."""
    policy, loaded = fitted.policy, fitted.tokenizer.loaded
    known, ids = before.loaded.get_vocab(), loaded.get_vocab()
    new = {token: ids[token] for token in tokens if token not in known or ids[token] >= fitted.rows_before}
    if not new:
        return fitted
    if policy.config.lora is not None:
        raise UserError(
            "added-tokens-adapter",
            f"{policy.title} has a trained adapter, beside which the rows of {', '.join(new)} would not be trained. Merge "
            "it first (jax-dpo convert) and train the result, with use_peft: true for a new adapter.",
        )
    rows = max(new.values()) + 1
    if rows > fitted.rows_before:
        policy = policy.with_rows(max(rows, len(loaded)))
    fitted.tokenizer.rows = policy.config.vocab_size
    return replace(fitted, policy=policy, new=new)


def _check_template(tokenizer: Any, path: str) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            "chat-template-broken",
            f"chat_template_path {path}, line {error.lineno} of the template: {error.message}. Expected a Jinja template.",
        ) from None
    except Exception:  # it may refuse this conversation and take those of the data, whose rows say so themselves
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
                    "trained as that text; added_special_tokens makes each one token.",
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
