"""The options that make a base model a chat model: its template, the token that ends an answer, tokens that it lacks.

`chat_template_path` and `eos_token` have the names and meanings of TRL 1.16's SFTConfig and RewardConfig; its DPOConfig has neither.
"""

# ruff: noqa: RUF009 (`option` makes a dataclass field)
from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from jax_dpo.config.fields import option
from jax_dpo.config.training import TrainingOptions


@dataclass(frozen=True)
class ChatOptions(TrainingOptions):
    """What is changed about the tokenizer before anything is tokenized; all of it is exported with the model."""

    _: KW_ONLY
    chat_template_path: str | None = option(
        None,
        "The chat template that conversations are rendered with, in place of the tokenizer's own: a .jinja file, or a directory or Hub "
        "name whose template, end-of-sequence token and added tokens are taken.",
        group="Chat template and tokens",
    )
    eos_token: str | None = option(
        None,
        "The token that ends an answer, such as <|im_end|>. It becomes the tokenizer's, and generation_config.json stops at it too, beside "
        "the tokens that it has. Unset, the tokenizer's own.",
        group="Chat template and tokens",
    )
    added_special_tokens: list[str] = option(
        [],
        "Tokens that the tokenizer gets if it does not have them, such as <|im_start|> <|im_end|>; each is one token and is left out of "
        "decoded text. They take rows of the model that are to spare, or embedding and head grow; with LoRA both are trained whole.",
        group="Chat template and tokens",
    )
    added_tokens: list[str] = option(
        [],
        "The same for tokens that stay in decoded text, such as <think>.",
        group="Chat template and tokens",
    )
    template_in_tokenizer_config: bool = option(
        False,
        "Write the chat template into tokenizer_config.json too, for readers that look nowhere else (Text Generation Inference, "
        "transformers of 2024 and before).",
        group="Chat template and tokens",
    )
