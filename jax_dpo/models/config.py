"""The axes on which decoder families differ, as plain data: what `decoder` builds and runs.

`families.model_config` makes a `ModelConfig` from a Hugging Face config.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jax_dpo.models.lora import LoraSpec


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one layer (RoFormer, arXiv 2104.09864) and how it is stretched to longer texts.

    `kind` is Hugging Face's `rope_type`:
    - "default": theta ** (-2i/H);
    - "linear": the same divided by `factor` (position interpolation, arXiv 2306.15595);
    - "llama3": long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1);
    - "yarn": a ramp over dimensions between kept and divided (YaRN, arXiv 2309.00071); cos and sin are multiplied by
      `attention_factor`, which is 1 for the other kinds.
    `original_length` is the length in tokens before stretching; only "llama3" and "yarn" use it.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each pair of dimensions: [H/2] float32, computed in float32 as transformers does."""
        exponent = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
        plain = np.float32(1.0) / np.float32(self.theta) ** exponent
        if self.kind == "default":
            return plain
        slow = plain / np.float32(self.factor)
        if self.kind == "linear":
            return slow
        if self.kind == "llama3":
            return self._llama3(plain, slow)
        if self.kind == "yarn":
            return self._yarn(plain, slow, head_dim)
        raise ValueError(f"RoPE kind {self.kind!r} has no formula")

    def _llama3(self, plain: np.ndarray, slow: np.ndarray) -> np.ndarray:
        """Keep what turns more than `high_freq_factor` times in `original_length` tokens, divide what turns less than
        `low_freq_factor` times, and go linearly from one to the other between."""
        turns = self.original_length * plain / np.float32(2 * math.pi)
        share = (turns - np.float32(self.low_freq_factor)) / np.float32(self.high_freq_factor - self.low_freq_factor)
        share = np.clip(share, np.float32(0), np.float32(1))
        return ((1 - share) * slow + share * plain).astype(np.float32)

    def _yarn(self, plain: np.ndarray, slow: np.ndarray, head_dim: int) -> np.ndarray:
        """A linear ramp from kept to divided between the dimensions that turn `beta_fast` and `beta_slow` times."""

        def dimension(turns: float) -> float:
            return head_dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # a ramp of no width would divide by zero
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
        return slow * ramp + plain * (1 - ramp)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP (arXiv 2101.03961), and where the family's files keep it.

    Each token goes through `per_token` of `count` experts, each an MLP of `size`; `renormalise`: the shares of those chosen are made to
    sum to 1. `module` is its name inside a block, `projections` those of an expert's gate, up and down. `dense_layers` have a plain MLP.
    `aux_loss_coef` is the config's own weight of the router's balancing loss.
    """

    count: int
    per_token: int
    size: int
    renormalise: bool
    module: str
    projections: tuple[str, str, str]
    aux_loss_coef: float
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the decoder needs to know; hashable, so that it can be a static argument of jit.

    `layer_windows` and `layer_ropes` have one entry per layer: the sliding window in tokens, the query itself included
    (None: full attention), and the rotary embedding. `attention_bias` is that of q, k and v, `attention_out_bias` of o.

    Scores of attention are `attention_scale` q k, and capped to `softcap * tanh(score / softcap)` where `attention_softcap` is given;
    so are logits by `logit_softcap`. `norm_offset` is added to the weights of norms, embeddings are multiplied by `embedding_scale`.
    With `norms_after` each branch has a norm before it and one after it, before it is added.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layer_windows: tuple[int | None, ...]
    layer_ropes: tuple[Rope, ...]
    max_position_embeddings: int
    attention_scale: float
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    norm_offset: float = 0.0
    norms_after: bool = False
    embedding_scale: float = 1.0
    experts: Experts | None = None
    lora: LoraSpec | None = None


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear layer by its dotted tree path, `lm_head` included where it is not tied.

    Routers and experts are no linear layers, neither here nor in transformers 5.
    """
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * h, config.num_kv_heads * h
    shapes = {
        "model.layers.self_attn.q_proj": (q, d),
        "model.layers.self_attn.k_proj": (kv, d),
        "model.layers.self_attn.v_proj": (kv, d),
        "model.layers.self_attn.o_proj": (d, q),
    }
    if config.experts is None or config.experts.dense_layers:
        shapes["model.layers.mlp.gate_proj"] = shapes["model.layers.mlp.up_proj"] = (f, d)
        shapes["model.layers.mlp.down_proj"] = (d, f)
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, d)
    return shapes


def layers_of(config: ModelConfig, path: str) -> tuple[int, ...]:
    """The layers that the leaf (or linear layer) at a dotted path in `model.layers` stacks, in order."""
    every = range(config.num_layers)
    e = config.experts
    if e is None or not e.dense_layers or not path.startswith(f"model.layers.{e.module}."):
        return tuple(every)
    inside = path.removeprefix(f"model.layers.{e.module}.")
    sparse = inside.startswith(("gate.", "experts."))
    return tuple(i for i in every if (i in e.dense_layers) != sparse)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of the parameter tree by its dotted path; leaves in `model.layers` are [L, ...], those of experts [L, E, ...].

    With `config.lora`, the adapter's leaves `lora_a` [L, r, in] and `lora_b` [L, out, r] are among them, and with DoRA
    `lora_magnitude` [L, out].
    """
    layers, d = config.num_layers, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
        "model.layers.input_layernorm.weight": (layers, d),
        "model.layers.post_attention_layernorm.weight": (layers, d),
    }
    if config.norms_after:
        shapes["model.layers.pre_feedforward_layernorm.weight"] = (layers, d)
        shapes["model.layers.post_feedforward_layernorm.weight"] = (layers, d)
    if config.qk_norm:
        shapes["model.layers.self_attn.q_norm.weight"] = (layers, config.head_dim)
        shapes["model.layers.self_attn.k_norm.weight"] = (layers, config.head_dim)
    if config.experts is not None:
        shapes |= _expert_shapes(config, config.experts)
    for path, (out, into) in linear_shapes(config).items():
        stack = (len(layers_of(config, path)),) if path.startswith("model.layers.") else ()
        shapes[f"{path}.weight"] = (*stack, out, into)
        if has_bias(config, path):
            shapes[f"{path}.bias"] = (*stack, out)
        target = config.lora.target(path) if config.lora is not None else None
        if target is not None:
            shapes[f"{path}.lora_a"] = (*stack, target.rank, into)
            shapes[f"{path}.lora_b"] = (*stack, out, target.rank)
            if config.lora is not None and config.lora.use_dora:
                shapes[f"{path}.lora_magnitude"] = (*stack, out)
    return shapes


def _expert_shapes(config: ModelConfig, e: Experts) -> dict[str, tuple[int, ...]]:
    root, d = f"model.layers.{e.module}.", config.hidden_size
    stack = len(layers_of(config, f"{root}gate."))
    gate, up, down = e.projections
    return {
        f"{root}gate.weight": (stack, e.count, d),
        f"{root}experts.{gate}.weight": (stack, e.count, e.size, d),
        f"{root}experts.{up}.weight": (stack, e.count, e.size, d),
        f"{root}experts.{down}.weight": (stack, e.count, d, e.size),
    }


def has_bias(config: ModelConfig, path: str) -> bool:
    """Whether the linear layer at this dotted tree path has a bias."""
    if ".mlp." in path:
        return config.mlp_bias
    if path.endswith("o_proj"):
        return config.attention_out_bias
    return config.attention_bias and ".self_attn." in path
