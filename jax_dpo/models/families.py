"""From a Hugging Face config.json to a `ModelConfig`, one short function per family, with a guard:
every attribute is read, known to change nothing, or refused by name. No model is built from half of its description.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jax_dpo.errors import UserError
from jax_dpo.models.attributes import Attributes
from jax_dpo.models.config import Experts, ModelConfig, Rope
from jax_dpo.models.rope_config import read_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}


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


def _gemma(a: Attributes) -> ModelConfig:
    """Its first files say "gelu" and mean the form with tanh, which is what they were trained with."""
    act = a.get("hidden_act", "gelu_pytorch_tanh")
    older = a.get("hidden_activation")
    if older is not None and act not in (older, "gelu"):
        raise a.invalid("hidden_activation", f"hidden_act = {act!r}, or null")
    name = "hidden_act" if older is None else "hidden_activation"
    act = _activation(a, name, "gelu_pytorch_tanh")
    act = "gelu_pytorch_tanh" if act == "gelu" else act
    bias = a.flag("attention_bias", False)
    _all_full(a)
    return _gemma_style(
        _decoder(
            a,
            kv_heads=16,
            head_dim=_head_of_gemma(a),
            window=None,
            length=8192,
            act=act,
            tied=True,
            attention_bias=bias,
            out_bias=bias,
        )
    )


def _gemma2(a: Attributes) -> ModelConfig:
    """Gemma 2 (arXiv 2408.00118): norms before and after both branches, soft caps, a window in every other layer."""
    a.read.add("hidden_act")  # transformers reads hidden_activation alone
    bias = a.flag("attention_bias", False)
    layers = a.integer("num_hidden_layers", None)
    window = a.integer("sliding_window", 4096) if a.get("sliding_window", 4096) is not None else None
    if not _layer_types(a):
        a = a.with_(
            layer_types=[("full_attention" if i % 2 or not window else "sliding_attention") for i in range(layers)]
        )
    config = _decoder(
        a,
        kv_heads=4,
        head_dim=_head_of_gemma(a),
        window=window,
        length=8192,
        act=_activation(a, "hidden_activation", "gelu_pytorch_tanh"),
        tied=True,
        attention_bias=bias,
        out_bias=bias,
    )
    return replace(
        _gemma_style(config),
        norms_after=True,
        attention_scale=a.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=a.number_or_none("attn_logit_softcapping", 50.0),
        logit_softcap=a.number_or_none("final_logit_softcapping", 30.0),
    )


def _head_of_gemma(a: Attributes) -> int | None:
    """A file without head_dim means 256, whatever the sizes are."""
    return 256 if "head_dim" not in a.hf else None


def _gemma_style(config: ModelConfig) -> ModelConfig:
    """What all of Gemma share: norms that multiply by 1 + weight, embeddings times the root of their size."""
    return replace(config, norm_offset=1.0, embedding_scale=config.hidden_size**0.5)


def _mixtral(a: Attributes) -> ModelConfig:
    """Mixtral (arXiv 2401.04088): mistral with eight experts in place of each MLP."""
    window = a.integer("sliding_window", None) if a.get("sliding_window") is not None else None
    config = _decoder(a, kv_heads=8, window=window, length=131072, eps=1e-5, theta=1e6)
    if a.get("router_jitter_noise") not in (0, None):
        raise a.invalid("router_jitter_noise", "0.0: noise on the router's input is not supported")
    return replace(
        config,
        experts=_experts(
            a, default=8, size=config.intermediate_size, module="block_sparse_moe", projections=("w1", "w3", "w2")
        ),
    )


def _qwen3_moe(a: Attributes) -> ModelConfig:
    """Qwen3's mixture (arXiv 2505.09388); layers that `mlp_only_layers` names, or `decoder_sparse_step` leaves out, are plain."""
    a.read.add("max_window_layers")  # transformers does not read it in this family
    bias, window = a.flag("attention_bias", False), _qwen_window(a)
    config = _decoder(
        a,
        kv_heads=4,
        window=window,
        length=32768,
        attention_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
    plain, step = a.get("mlp_only_layers") or [], a.integer("decoder_sparse_step", 1)
    if not isinstance(plain, list) or not set(plain) <= set(range(config.num_layers)):
        raise a.invalid("mlp_only_layers", f"a list of layers below num_hidden_layers = {config.num_layers}")
    dense = tuple(i for i in range(config.num_layers) if i in plain or (i + 1) % step)
    experts = _experts(
        a,
        default=128,
        size=a.integer("moe_intermediate_size", 768),
        module="mlp",
        projections=("gate_proj", "up_proj", "down_proj"),
        per_token=8,
        renormalise=a.flag("norm_topk_prob", False),
        dense=dense,
    )
    all_dense = len(dense) == config.num_layers
    return replace(config, layer_windows=(window,) * config.num_layers, experts=None if all_dense else experts)


def _experts(
    a: Attributes,
    *,
    default: int | None,
    size: int,
    module: str,
    projections: tuple[str, str, str],
    per_token: int = 2,
    renormalise: bool = True,
    dense: tuple[int, ...] = (),
) -> Experts:
    """What mixtures share. transformers 4 calls the count `num_experts` in some families, 5 `num_local_experts` in all."""
    given = [name for name in ("num_local_experts", "num_experts") if a.hf.get(name) is not None]
    counts = {name: a.integer(name, default) for name in given or ["num_local_experts"]}
    if len(set(counts.values())) > 1:
        raise a.invalid("num_experts", f"num_local_experts = {counts['num_local_experts']}")
    count, chosen = next(iter(counts.values())), a.integer("num_experts_per_tok", per_token)
    if chosen > count:
        raise a.invalid("num_experts_per_tok", f"at most {count}, the number of experts")
    coef = a.get("router_aux_loss_coef", 0.001)
    if isinstance(coef, bool) or not isinstance(coef, (int, float)) or coef < 0:
        raise a.invalid("router_aux_loss_coef", "0 or a number above it")
    return Experts(count, chosen, size, renormalise, module, projections, float(coef), dense)


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
    act: str | None = None,
    eps: float = 1e-6,
    theta: float = 10000.0,
    tied: bool = False,
    attention_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """What all families share. `kv_heads`, `head_dim`, `length` and `tied` are transformers' defaults for a file without them;
    `act` is the activation where its attribute is not `hidden_act`."""
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
        rms_norm_eps=a.number("rms_norm_eps", eps),
        hidden_act=act or _activation(a, "hidden_act", "silu"),
        tie_word_embeddings=a.flag("tie_word_embeddings", tied),
        attention_bias=attention_bias,
        attention_out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        layer_windows=_windows(a, layers, window),
        layer_ropes=(_rope(a, longest, theta),) * layers,
        max_position_embeddings=longest,
        attention_scale=head**-0.5,
    )


def _activation(a: Attributes, name: str, default: str) -> str:
    """The activation that the attribute `name` says, by its name in `layers.ACTIVATIONS`."""
    act = a.get(name, default)
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise a.invalid(name, "one of " + ", ".join(sorted(ACTIVATIONS)))
    return ACTIVATIONS[act]


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


def _rope(a: Attributes, longest: int, theta: float) -> Rope:
    for name in ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"):
        a.read.add(name)
    if a.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise a.invalid("partial_rotary_factor", "1.0: turning a part of the head is not supported in this family")
    return read_rope(a.hf, longest, a.where, default_theta=theta)


# name of the family in config.json -> (its reader, the one architecture that is a causal language model)
FAMILIES: dict[str, tuple[Callable[[Attributes], ModelConfig], str]] = {
    "gemma": (_gemma, "GemmaForCausalLM"),
    "gemma2": (_gemma2, "Gemma2ForCausalLM"),
    "llama": (_llama, "LlamaForCausalLM"),
    "mixtral": (_mixtral, "MixtralForCausalLM"),
    "mistral": (_mistral, "MistralForCausalLM"),
    "qwen2": (_qwen2, "Qwen2ForCausalLM"),
    "qwen3_moe": (_qwen3_moe, "Qwen3MoeForCausalLM"),
    "qwen3": (_qwen3, "Qwen3ForCausalLM"),
}
