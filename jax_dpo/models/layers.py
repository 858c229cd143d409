"""The parts of a decoder block, with Hugging Face's names and weight orientation ([out, in]).

Modules only describe: they are built abstractly (`decoder.describe`), and the arrays live in the pure parameter tree.
Shape letters: R rows, T tokens, D model, N heads, G key-value heads, H head size, F feed-forward, L layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_dpo.models.config import ModelConfig, has_bias, layers_of, linear_shapes
from jax_dpo.models.experts import Mixture, Routing, Run, everywhere
from jax_dpo.models.lora import LoraSpec

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Lora(nnx.Param):
    """A trainable low-rank factor."""


@jax.custom_vjp
def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [R, T, in] times weight [out, in] transposed: [R, T, out].

    The backward is written out for the form of the weight's gradient: as x^T dy, transposed when it is done. The form that automatic
    differentiation gives, dy^T x, makes a CPU transpose dy while it computes it, which takes longer than the product itself.
    """
    return jnp.einsum("rti,oi->rto", x, weight)


def _product_fwd(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, weight), (x, weight)


def _product_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    return jnp.einsum("rto,oi->rti", dy, weight), jnp.einsum("rti,rto->io", x, dy).T


product.defvjp(_product_fwd, _product_bwd)


def dora_factor(
    weight: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array, scale: float | jax.Array
) -> jax.Array:
    """magnitude / |W + scale B A|, the norm of each row, [out] float32 (DoRA, arXiv 2402.09353, equation 5; the norm is a constant
    of the gradient, section 4.3).

    Weight [out, in], a [r, in], b [out, r], magnitude [out]. The square is multiplied out, so that no second matrix of the weight's size
    is made. A magnitude of 0 marks a row without an adapter (of another layer's rank, or a row of zeros): its factor is 1.
    """
    w, a, b = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (weight, a, b))
    b, times = scale * b, partial(jnp.matmul, precision="highest")
    crossed, added = jnp.sum(times(w, a.T) * b, axis=1), jnp.sum(times(b, times(a, a.T)) * b, axis=1)
    norm = jnp.sqrt(jnp.sum(jnp.square(w), axis=1) + 2.0 * crossed + added)
    return jnp.where(magnitude == 0, 1.0, magnitude / jnp.where(magnitude == 0, 1.0, norm))


class Linear(nnx.Module):
    """x W^T + b, and with an adapter + scale B A dropout(x).

    With DoRA W + scale B A is scaled row by row to the trained magnitude; under dropout, as in PEFT, what the scaling adds to x W^T is
    computed from dropout(x) as well.
    """

    def __init__(self, config: ModelConfig, path: str) -> None:
        out, into = linear_shapes(config)[path]
        stack = (len(layers_of(config, path)),) if path.startswith("model.layers.") else ()
        target = config.lora.target(path) if config.lora else None
        self.lora: LoraSpec | None = config.lora if target else None
        self.dropout_id = zlib.crc32(path.encode()) & 0x7FFFFFFF
        self.weight = nnx.Param(jnp.zeros((*stack, out, into)))
        if has_bias(config, path):
            self.bias = nnx.Param(jnp.zeros((*stack, out)))
        if target and self.lora:
            # Where layers differ in scale, B comes with it (`decoder.blocks`).
            self.scale = 1.0 if target.scale is None else target.scale
            self.lora_a = Lora(jnp.zeros((*stack, target.rank, into)))
            self.lora_b = Lora(jnp.zeros((*stack, out, target.rank)))
            if self.lora.use_dora:
                self.lora_magnitude = Lora(jnp.zeros((*stack, out)))

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """[R, T, in] -> [R, T, out], in the dtype of `x`."""
        # Named, since rematerialisation does not look into `product` for what it may keep.
        weight = self.weight[...].astype(x.dtype)
        y = checkpoint_name(product(x, weight), "linear_out")
        if self.lora is not None:
            y = self._adapted(x, y, weight, self.lora, dropout_key)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y

    def _adapted(
        self, x: jax.Array, y: jax.Array, weight: jax.Array, lora: LoraSpec, dropout_key: jax.Array | None
    ) -> jax.Array:
        """y = x W^T [R, T, out] with the adapter's part."""
        again = y
        if dropout_key is not None and lora.dropout > 0:
            keep = 1.0 - lora.dropout
            kept = jax.random.bernoulli(jax.random.fold_in(dropout_key, self.dropout_id), keep, x.shape)
            x = jnp.where(kept, x / keep, 0).astype(x.dtype)
            again = product(x, weight) if lora.use_dora else y
        a, b = self.lora_a[...], self.lora_b[...]
        low = self.scale * product(product(x, a.astype(x.dtype)), b.astype(x.dtype))
        if not lora.use_dora:
            return y + low
        factor = dora_factor(weight, a, b, self.lora_magnitude[...].astype(jnp.float32), self.scale)
        wide = lambda z: z.astype(jnp.float32)  # noqa: E731
        if again is y:
            return (factor * (wide(y) + wide(low))).astype(x.dtype)
        return (wide(y) + (factor - 1.0) * wide(again) + factor * wide(low)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean x^2 + eps) * (offset + weight) (arXiv 1910.07467), computed in float32; Gemma's offset is 1, else it is 0."""

    def __init__(self, config: ModelConfig, size: int, *, stacked: bool) -> None:
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset
        self.weight = nnx.Param(jnp.ones((config.num_layers, size) if stacked else (size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32)
        return (wide * (weight + self.offset if self.offset else weight)).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding in the half-split layout: x [R, T, N, H], cos and sin [R, T, H/2] float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """The projections round the attention op; the op itself is handed in by the caller."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.q_proj = Linear(config, "model.layers.self_attn.q_proj")
        self.k_proj = Linear(config, "model.layers.self_attn.k_proj")
        self.v_proj = Linear(config, "model.layers.self_attn.v_proj")
        self.o_proj = Linear(config, "model.layers.self_attn.o_proj")
        if config.qk_norm:
            self.q_norm = RMSNorm(config, config.head_dim, stacked=True)
            self.k_norm = RMSNorm(config, config.head_dim, stacked=True)

    def project(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [R, T, D] -> q [R, T, N, H], k and v [R, T, G, H], with positions in q and k."""
        R, T, _ = x.shape
        c = self.config
        q = self.q_proj(x, dropout_key).reshape(R, T, c.num_heads, c.head_dim)
        k = self.k_proj(x, dropout_key).reshape(R, T, c.num_kv_heads, c.head_dim)
        v = self.v_proj(x, dropout_key).reshape(R, T, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def output(self, mixed: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """[R, T, N, H] -> [R, T, D]."""
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1), dropout_key)


class MLP(nnx.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, config: ModelConfig) -> None:
        self.act = config.hidden_act
        self.gate_proj = Linear(config, "model.layers.mlp.gate_proj")
        self.up_proj = Linear(config, "model.layers.mlp.up_proj")
        self.down_proj = Linear(config, "model.layers.mlp.down_proj")

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        gate = ACTIVATIONS[self.act](self.gate_proj(x, dropout_key))
        return self.down_proj(gate * self.up_proj(x, dropout_key), dropout_key)


class Block(nnx.Module):
    """One decoder block; its parameters are those of all layers, stacked, until the scan hands it one layer's.

    Hugging Face's `post_attention_layernorm` is the norm before the MLP, but where branches have norms on both sides (`norms_after`)
    it is the one behind attention.
    """

    def __init__(self, config: ModelConfig, sparse: bool | None = None) -> None:
        """`sparse` says whether the layers have experts, where some have and others have not; None describes all there is."""
        norm = lambda: RMSNorm(config, config.hidden_size, stacked=True)  # noqa: E731
        self.input_layernorm = norm()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm()
        self.norms_after = config.norms_after
        if config.norms_after:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
        self.act = config.hidden_act
        experts = None if sparse is False else config.experts
        self.feed = "mlp" if experts is None else experts.module
        if experts is None:
            self.mlp = MLP(config)
        else:
            setattr(self, experts.module, Mixture(config))
            if experts.dense_layers and sparse is None:
                for name in ("gate_proj", "up_proj", "down_proj"):
                    setattr(getattr(self, experts.module), name, Linear(config, f"model.layers.mlp.{name}"))

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        mix: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        dropout_key: jax.Array | None = None,
        *,
        real: jax.Array,
        experts: Run = everywhere,
    ) -> tuple[jax.Array, Routing | None]:
        """x [R, T, D] -> [R, T, D], and what the router said where there is one.

        `mix(q, k, v)` is the attention op, `real` [R, T] is False on padding, `experts` runs a mixture of experts.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos, sin, dropout_key)
        mixed = self.self_attn.output(mix(q, k, v), dropout_key)
        if not self.norms_after:
            x = x + mixed
            fed, routing = self._fed(self.post_attention_layernorm(x), dropout_key, real, experts)
            return x + fed, routing
        x = x + self.post_attention_layernorm(mixed)
        fed, routing = self._fed(self.pre_feedforward_layernorm(x), dropout_key, real, experts)
        return x + self.post_feedforward_layernorm(fed), routing

    def _fed(
        self, x: jax.Array, dropout_key: jax.Array | None, real: jax.Array, run: Run
    ) -> tuple[jax.Array, Routing | None]:
        feed = getattr(self, self.feed)
        if isinstance(feed, Mixture):
            return feed(x, real, ACTIVATIONS[self.act], run)
        return feed(x, dropout_key), None


class Embedding(nnx.Module):
    """Token embeddings [V, D]."""

    def __init__(self, config: ModelConfig) -> None:
        self.weight = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size)))
