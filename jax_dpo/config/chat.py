"""The options that make a base model a chat model: its template, the token that ends an answer, tokens that it lacks.

`chat_template_path` and `eos_token` have the names and meanings of TRL 1.16's SFTConfig and RewardConfig; its DPOConfig has neither.
"""

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
        "name whose template and end-of-sequence token are taken.",
        group="Chat template and tokens",
    )
    eos_token: str | None = option(
        None,
        "The token that ends an answer, such as <|im_end|>. It becomes the tokenizer's, and generation_config.json stops at it too, beside "
        "the tokens that it has. Unset, the tokenizer's own.",
        group="Chat template and tokens",
    )
    template_in_tokenizer_config: bool = option(
        False,
        "Write the chat template into tokenizer_config.json too, for readers that look nowhere else (Text Generation Inference, "
        "transformers of 2024 and before).",
        group="Chat template and tokens",
    )
