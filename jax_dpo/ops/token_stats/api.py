"""Per-token log-probabilities, exact KL and the rest, from hidden states: one call, two implementations."""

from __future__ import annotations

import math

import jax

from jax_dpo.arrays import TokenStats
from jax_dpo.ops.token_stats import chunked, dense

# Below this many bytes of float32 logits a device, whole logits are faster than chunks that are made twice.
DENSE_BYTES = 256 * 2**20

__all__ = ["TokenStats", "token_stats"]


def token_stats(
    hidden: jax.Array,
    ref_hidden: jax.Array,
    unembed: jax.Array,
    ref_unembed: jax.Array | None,
    target: jax.Array,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    row_shards: int = 1,
    vocabulary_shards: int = 1,
) -> TokenStats:
    """What is known of each scored token, [R, K] each, without logits for more than one chunk of the vocabulary.

    Args:
      hidden: [R, K, D] final hidden states of the policy where the targets are predicted.
      ref_hidden: [R, K, D] of the reference; no gradient flows into it.
      unembed: [V, D] the policy's unembedding (the embedding, where the head is tied).
      ref_unembed: [V, D] the reference's, or None where it is the same array as the policy's.
      target: [R, K] int32 token ids.
      softcap, scale: logits become softcap * tanh(scale * z / softcap), where a family has it.
      row_shards, vocabulary_shards: over how many devices rows and vocabulary are spread.
    """
    V = unembed.shape[0]
    if math.prod(target.shape) * V * 4 <= DENSE_BYTES * row_shards * vocabulary_shards:
        return dense.token_stats(hidden, ref_hidden, unembed, ref_unembed, target, softcap=softcap, scale=scale)
    shards = vocabulary_shards if V % vocabulary_shards == 0 else 1
    return chunked.token_stats(
        hidden, ref_hidden, unembed, ref_unembed, target, softcap=softcap, scale=scale, shards=shards
    )
