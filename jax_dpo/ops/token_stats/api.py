"""Per-token log-probabilities, exact KL and the rest, from hidden states: one call, and which implementation it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax

from jax_dpo.arrays import TokenStats
from jax_dpo.ops.token_stats import chunked, dense, reference

# Up to this many bytes of float32 logits a device, whole logits are faster than chunks that are made twice.
DENSE_BYTES = 256 * 2**20

__all__ = ["TokenStats", "token_stats"]

Place = Callable[[jax.Array], jax.Array]


def _same(x: jax.Array) -> jax.Array:
    return x


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(unembed: jax.Array, gather: Place, spread: Place) -> jax.Array:
    """An unembedding [S, V/S, D] on every device that needs it; its gradient is laid out as it came, and never whole."""
    del spread
    return gather(unembed)


def _gathered_fwd(unembed: jax.Array, gather: Place, spread: Place) -> tuple[jax.Array, None]:
    del spread
    return gather(unembed), None


def _gathered_bwd(gather: Place, spread: Place, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    del gather
    return (spread(cotangent),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def token_stats(
    hidden: jax.Array,
    ref_hidden: jax.Array | None,
    unembed: jax.Array,
    ref_unembed: jax.Array | None,
    target: jax.Array,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    row_shards: int = 1,
    vocabulary_shards: int = 1,
    gather: Place = _same,
    spread: Place = _same,
    implementation: str = "auto",
) -> TokenStats:
    """What is known of each scored token, [R, K] each, without logits for more than one chunk of the vocabulary.

    Args:
      hidden: [R, K, D] final hidden states of the policy where the targets are predicted.
      ref_hidden: [R, K, D] of the reference; no gradient flows into it. None where it is not at hand: there is no ref_logp and no KL.
      unembed: [V, D] the policy's unembedding (the embedding, where the head is tied).
      ref_unembed: [V, D] the reference's (of a width D of its own), or None where it is the same array as the policy's.
      target: [R, K] int32 token ids.
      softcap, scale: logits become softcap * tanh(scale * z / softcap), where a family has it.
      row_shards, vocabulary_shards: over how many devices rows and vocabulary are spread; the latter divides V.
      gather: puts a part [vocabulary_shards, C, D] of an unembedding that is cut along D onto every device, whole but for its first
        axis.
      spread: lays the gradient of an unembedding [vocabulary_shards, V/vocabulary_shards, D] out as the unembedding lies.
      implementation: "auto" takes whole logits where they are small and chunks where not; "reference" is the plain formula, to compare.
    """
    if implementation == "reference":
        return reference.token_stats(hidden, ref_hidden, unembed, ref_unembed, target, softcap=softcap, scale=scale)
    V, shards = len(unembed), vocabulary_shards
    widest = max(w.shape[1] for w in (unembed, ref_unembed) if w is not None)
    cut = lambda w: w.reshape(shards, V // shards, w.shape[1])  # noqa: E731
    ref = None if ref_unembed is None else cut(ref_unembed)
    # Where the unembedding is cut over devices, whole logits need the whole of it (and of its gradient) on each.
    gathered = V * widest * 4 if row_shards > 1 else 0
    if max(math.prod(target.shape) * V * 4 // row_shards, gathered) <= DENSE_BYTES * shards:
        whole = lambda w: _gathered(w, gather, spread).reshape(V, w.shape[2])  # noqa: E731
        ref = None if ref is None else whole(ref)
        return dense.token_stats(hidden, ref_hidden, whole(cut(unembed)), ref, target, softcap=softcap, scale=scale)
    # Many tokens get smaller chunks: logits of one chunk are within the same bound, where that leaves matrices worth multiplying.
    fits = DENSE_BYTES * row_shards // (4 * math.prod(target.shape)) // 128 * 128
    return chunked.token_stats(
        hidden,
        ref_hidden,
        cut(unembed),
        ref,
        target,
        softcap=softcap,
        scale=scale,
        chunk=min(chunked.CHUNK, max(1024, fits)),
        gather=gather,
        spread=spread,
    )
