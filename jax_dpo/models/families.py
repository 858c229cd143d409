"""From a Hugging Face config.json to a `ModelConfig`, one short function per family, with a guard:
every attribute is read, known to change nothing, or refused by name. No model is built from half of its description.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig, Rope
from jax_dpo.models.rope_config import read_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}

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
            listed = ", ".join(f"{name} = {_short(value)}" for name, value in loud.items())
            raise UserError(
                "config-attribute-unknown",
                f"{self.where}: no meaning is known here for {listed} (model_type {self.hf.get('model_type')!r}). "
                "The model could come out wrong, so it is not loaded. If the attribute changes nothing, remove it.",
            )


def model_config(hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a Hugging Face config, in the spelling of transformers 4 or 5.

    `where` names the file in messages. Raises UserError: family-unknown, architecture-unknown,
    config-attribute-unknown, config-attribute-missing, config-attribute-invalid, rope-unknown, rope-disagrees.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(
            "family-unknown", f"{where}: model_type is {family!r}; the families that can be trained are {known}."
        )
    read, architecture = FAMILIES[family]
    found = Attributes(hf, where)
    named = found.get("architectures")
    if named and named != [architecture]:
        raise UserError(
            "architecture-unknown",
            f"{where}: architectures is {named!r}; for model_type {family!r} only [{architecture!r}] can be trained.",
        )
    config = read(found)
    found.refuse_rest()
    return config


def _llama(a: Attributes) -> ModelConfig:
    bias = a.flag("attention_bias", False)
    _all_full(a)
    return _decoder(
        a,
        kv_heads=None,
        window=None,
        length=2048,
        attention_bias=bias,
        out_bias=bias,
        mlp_bias=a.flag("mlp_bias", False),
    )


def _mistral(a: Attributes) -> ModelConfig:
    """Every layer has the sliding window; a file without the attribute means 4096, null means none."""
    window = a.integer("sliding_window", 4096) if a.get("sliding_window", 4096) is not None else None
    kinds = _layer_types(a)
    expected = "full_attention" if window is None else "sliding_attention"
    if kinds and set(kinds) != {expected}:
        raise a.invalid("layer_types", f"{expected} in every layer, as sliding_window is {window}")
    return _decoder(a, kv_heads=8, window=window, length=131072)


def _qwen2(a: Attributes) -> ModelConfig:
    return _decoder(a, kv_heads=32, window=_qwen_window(a), length=32768, attention_bias=True)


def _qwen3(a: Attributes) -> ModelConfig:
    bias = a.flag("attention_bias", False)
    head = 128 if "head_dim" not in a.hf else None
    return _decoder(
        a,
        kv_heads=32,
        head_dim=head,
        window=_qwen_window(a),
        length=32768,
        attention_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )


def _qwen_window(a: Attributes) -> int | None:
    a.read.add("sliding_window")
    if not a.flag("use_sliding_window", False) or a.hf.get("sliding_window", 4096) is None:
        return None
    return a.integer("sliding_window", 4096)


def _layer_types(a: Attributes) -> list[str]:
    kinds = a.get("layer_types") or []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise a.invalid("layer_types", "a list of words, one per layer")
    return kinds


def _all_full(a: Attributes) -> None:
    kinds = _layer_types(a)
    if kinds and set(kinds) != {"full_attention"}:
        raise a.invalid("layer_types", "full_attention in every layer")


def _decoder(
    a: Attributes,
    *,
    kv_heads: int | None,
    window: int | None,
    length: int,
    head_dim: int | None = None,
    attention_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """What all families share. `kv_heads`, `head_dim`, `length` are transformers' defaults for a file without them."""
    layers, hidden = a.integer("num_hidden_layers", None), a.integer("hidden_size", None)
    heads = a.integer("num_attention_heads", None)
    if a.hf.get("num_key_value_heads", kv_heads) is None:
        kv_heads = heads
    kv = a.integer("num_key_value_heads", kv_heads)
    if heads % kv:
        raise a.invalid("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if head_dim is None and a.hf.get("head_dim") is None:
        if hidden % heads:
            raise a.invalid("num_attention_heads", f"a divisor of hidden_size = {hidden}, as there is no head_dim")
        head_dim = hidden // heads
    head = a.integer("head_dim", head_dim)
    if head % 2:
        raise a.invalid("head_dim", "an even number, as rotary embedding turns pairs of dimensions")
    act = a.get("hidden_act", "silu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise a.invalid("hidden_act", "one of " + ", ".join(sorted(ACTIVATIONS)))
    if a.get("attention_dropout", 0.0) not in (0, None):
        raise a.invalid("attention_dropout", "0.0: dropout inside attention is not supported")
    longest = a.integer("max_position_embeddings", length)
    return ModelConfig(
        model_type=a.get("model_type"),
        vocab_size=a.integer("vocab_size", None),
        hidden_size=hidden,
        intermediate_size=a.integer("intermediate_size", None),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head,
        rms_norm_eps=a.number("rms_norm_eps", 1e-6),
        hidden_act=ACTIVATIONS[act],
        tie_word_embeddings=a.flag("tie_word_embeddings", False),
        attention_bias=attention_bias,
        attention_out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        layer_windows=_windows(a, layers, window),
        layer_ropes=(_rope(a, longest),) * layers,
        max_position_embeddings=longest,
    )


def _windows(a: Attributes, layers: int, window: int | None) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types`, else all but the first `max_window_layers` (Qwen), else all."""
    kinds = _layer_types(a)
    full = a.get("max_window_layers", 28) if a.hf["model_type"].startswith("qwen") else 0
    if not kinds:
        if isinstance(full, bool) or not isinstance(full, int) or full < 0:
            raise a.invalid("max_window_layers", "a whole number")
        return tuple(window if i >= full else None for i in range(layers))
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise a.invalid(
            "layer_types", f"full_attention or sliding_attention for each layer, num_hidden_layers = {layers}"
        )
    if "sliding_attention" in kinds and window is None:
        raise a.invalid("layer_types", "no sliding_attention, as no sliding window is switched on")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(a: Attributes, longest: int) -> Rope:
    for name in ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"):
        a.read.add(name)
    if a.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise a.invalid("partial_rotary_factor", "1.0: turning a part of the head is not supported in this family")
    return read_rope(a.hf, longest, a.where)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# name of the family in config.json -> (its reader, the one architecture that is a causal language model)
FAMILIES: dict[str, tuple[Callable[[Attributes], ModelConfig], str]] = {
    "llama": (_llama, "LlamaForCausalLM"),
    "mistral": (_mistral, "MistralForCausalLM"),
    "qwen2": (_qwen2, "Qwen2ForCausalLM"),
    "qwen3": (_qwen3, "Qwen3ForCausalLM"),
}
