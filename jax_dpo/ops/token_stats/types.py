"""What is known of a scored token under policy and reference."""

from __future__ import annotations

from typing import NamedTuple

import jax


class TokenStats(NamedTuple):
    """Arrays [R, K], float32, natural logarithms. `logp` and `kl` carry gradients to the policy; nothing else carries any."""

    logp: jax.Array
    """log pi(y): log-probability of the target under the policy, nats."""
    ref_logp: jax.Array
    """log ref(y)."""
    kl: jax.Array
    """sum_v pi(v) (log pi(v) - log ref(v)) over the whole vocabulary, nats; not clamped."""
    entropy: jax.Array
    """-sum_v pi(v) log pi(v), nats."""
    mean_logit: jax.Array
    """mean of the policy's logits over the vocabulary."""
    log_sum_sq: jax.Array
    """log sum_v pi(v)^2 (the weight of WPO, arXiv 2406.11827)."""
    top1: jax.Array
    """1 where the target is the policy's most likely token, the lowest id winning a tie; else 0."""
