"""Alignment via optimal transport (arXiv 2406.05882): losses that compare the sorted scores of a micro-batch, not pairs.

Notation as in `family`: a, b log-ratios, B beta, e label_smoothing, l log sigmoid. Sorting is within one of TRL's micro-batches, so
which pairs are compared depends on per_device_train_batch_size, as it does in TRL.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_dpo.loss.scores import CHOSEN, REJECTED, PairSums

AOT_TYPES = ("aot", "aot_unpaired")


def aot_losses(
    name: str, sums: PairSums, group: jax.Array, weight: jax.Array, beta: jax.Array, label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """(losses [R * S] in sorted order, the weight of each): -(1-e) l(B d) - e l(-B d) for the sorted differences d of each group.

    "aot": d = sort(log pi+ - log pi-) - sort(log ref+ - log ref-). "aot_unpaired": d = sort(a) - sort(b).

    Args:
      sums: arrays [R, S, B] of one micro-batch that holds whole groups.
      group: [R, S, 2] a pair's group and its place in it; equal values are sorted by place, as a stable sort in TRL's order.
      weight: [R, S] of each pair, the same within a group; 0 in empty slots.
    """
    if name == "aot":
        x = sums.logp[..., CHOSEN] - sums.logp[..., REJECTED]
        y = sums.ref_logp[..., CHOSEN] - sums.ref_logp[..., REJECTED]
    else:
        x, y = sums.logratio[..., CHOSEN], sums.logratio[..., REJECTED]
    which, place = (group[..., i].reshape(-1) for i in (0, 1))

    def in_order(values: jax.Array) -> jax.Array:
        flat = values.reshape(-1)
        return flat[jnp.lexsort((place, jax.lax.stop_gradient(flat), which))]

    z = beta * (in_order(x) - in_order(y))
    e = label_smoothing
    losses = -(1.0 - e) * jax.nn.log_sigmoid(z) - e * jax.nn.log_sigmoid(-z)
    return losses, weight.reshape(-1)[jnp.argsort(which, stable=True)]
