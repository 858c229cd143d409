"""A beta that follows the batch (beta-DPO, arXiv 2407.08639): higher where the policy already tells the pairs of a step apart, lower
where it does not yet.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Of the beta in force. The paper has no bound, and below 1/alpha under the threshold its beta would be negative.
LEAST_FACTOR = 0.1


def batch_beta(beta: jax.Array, margin: jax.Array, threshold: jax.Array, alpha: float) -> jax.Array:
    """beta (1 + alpha (M - M0)), eq. 7 of the paper: M = beta * margin is the mean reward margin of the step's pairs, M0 the threshold.

    Args:
      beta: the beta in force, a scalar.
      margin: the mean of a - b over the pairs of the step, with their shares.
    """
    still = jax.lax.stop_gradient
    return beta * jnp.maximum(1.0 + alpha * (beta * still(margin) - threshold), LEAST_FACTOR)


def next_threshold(threshold: jax.Array, beta: jax.Array, margin: jax.Array, momentum: float) -> jax.Array:
    """M0 <- momentum M0 + (1 - momentum) M: the moving average of the mean reward margin."""
    return momentum * threshold + (1.0 - momentum) * beta * margin
