"""The attributes of a Hugging Face config.json, read one by one, so that what nobody read can be refused by its name."""

from __future__ import annotations

from typing import Any

from jax_dpo.errors import UserError

# Attributes that say nothing about the forward pass of a causal language model: bookkeeping, initial values, outputs of
# transformers' classes, classification heads, and generation settings that old versions kept here.
IGNORABLE = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "add_cross_attention",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_implementation",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "model_type",
        "name_or_path",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)


class Attributes:
    """The attributes of one config.json; remembers which were read, so that the rest can be refused."""

    def __init__(self, hf: dict[str, Any], where: str) -> None:
        self.hf = hf
        self.where = where
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return self.hf.get(name, default)

    def with_(self, **values: Any) -> Attributes:
        """The same attributes with values of others put in; what is read counts for both."""
        more = Attributes(self.hf | values, self.where)
        more.read = self.read
        return more

    def integer(self, name: str, default: int | None) -> int:
        """A positive whole number; `default` None means that the attribute must be there."""
        value = self.get(name, default)
        if value is None:
            value = default
        if value is None:
            raise UserError(
                "config-attribute-missing", f"{self.where} has no {name}, without which the model cannot be built."
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.invalid(name, "a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise self.invalid(name, "a number above 0")
        return float(value)

    def number_or_none(self, name: str, default: float | None) -> float | None:
        """A number above 0; null switches off what the attribute is about."""
        return None if self.get(name, default) is None else self.number(name, default or 0.0)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.invalid(name, "true or false")
        return value

    def invalid(self, name: str, expected: str) -> UserError:
        return UserError(
            "config-attribute-invalid", f"{self.where}: {name} is {self.hf.get(name)!r}; expected {expected}."
        )

    def refuse_rest(self) -> None:
        """Raise UserError for every attribute that was not read, is not ignorable and says something."""
        rest = set(self.hf) - self.read - IGNORABLE
        loud = {name: self.hf[name] for name in sorted(rest) if self.hf[name] not in (None, False, [], {}, "")}
        if loud:
            listed = ", ".join(f"{name} = {short(value)}" for name, value in loud.items())
            raise UserError(
                "config-attribute-unknown",
                f"{self.where}: no meaning is known here for {listed} (model_type {self.hf.get('model_type')!r}). "
                "The model could come out wrong, so it is not loaded. If the attribute changes nothing, remove it.",
            )


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
