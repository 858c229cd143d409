"""How much arithmetic a step is, and what share of the device's peak that makes (MFU)."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np

from jax_dpo.data.batch import Tree
from jax_dpo.data.pack import Cost
from jax_dpo.models.config import ModelConfig, parameter_shapes

# Dense bfloat16 FLOP/s of one device as JAX counts devices, from the makers' data sheets.
PEAKS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}


class Work(NamedTuple):
    """FLOPs that a step owes, by what they go with; recomputation is not counted.

    A pair costs the policy forward and backward (6 a parameter and token, 4 where only an adapter is trained: no gradient of the
    base's weights) and the reference forward (2). Attention is causal and counted by pairs of tokens that see each other.
    """

    token: float
    attention: float
    scored: float


def work_of(config: ModelConfig, *, adapter: bool, reference: ModelConfig | None) -> Work:
    """Per token of a row, per pair of tokens that attend, and per scored token; `reference` None: it is not run in the step."""
    passes = 4 if adapter else 6

    def parts(c: ModelConfig) -> tuple[int, int, int]:
        shapes = parameter_shapes(c)
        layers = sum(math.prod(s) for p, s in shapes.items() if p.startswith("model.layers.") and len(s) == 3)
        if c.experts is not None:  # a token meets `per_token` of all experts
            every = sum(math.prod(s) for s in shapes.values() if len(s) == 4)
            layers += every * c.experts.per_token // c.experts.count
        return layers, 2 * c.num_layers * c.num_heads * c.head_dim, c.vocab_size * c.hidden_size

    (n, a, h), (n_ref, a_ref, h_ref) = parts(config), (0, 0, 0) if reference is None else parts(reference)
    # Attention has no weights whose gradient LoRA would save.
    return Work(passes * n + 2 * n_ref, 6 * a + 2 * a_ref, passes * h + 2 * h_ref)


def cost_of(work: Work, platform: str) -> Cost:
    """The cost of a row for `pack.choose_shape`. A micro-batch costs some tokens on top: launching it, adding up gradients."""
    overhead = 64 if platform == "cpu" else 1024
    return Cost(work.token, work.attention, work.scored, overhead * work.token)


def attended(tree: Tree) -> int:
    """Pairs of tokens that see each other in one tree (causal, the prompt once where it is shared)."""
    triangle = lambda n: n * (n + 1) // 2  # noqa: E731
    p, c, q, r = (len(x) for x in tree[:4])
    if tree.shared:
        return triangle(p) + p * (c + r) + triangle(c) + triangle(r)
    return triangle(p + c) + triangle(q + r)


def attended_of(branch_lengths: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """`attended` of many pairs: lengths [N, 4] (prompt, chosen, prompt of rejected, rejected), shared [N] -> int64 [N]."""
    p, c, q, r = branch_lengths.astype(np.int64).T
    triangle = lambda n: n * (n + 1) // 2  # noqa: E731
    together = triangle(p) + p * (c + r) + triangle(c) + triangle(r)
    return np.where(shared, together, triangle(p + c) + triangle(q + r))


def peak_of(device_kind: str) -> float | None:
    """Peak FLOP/s of one device, None where it is not known."""
    return PEAKS.get(device_kind)


def matmul_rate() -> float:
    """Measured float32 FLOP/s of this device in a large matrix product; takes well under a second."""
    import jax
    import jax.numpy as jnp

    n = 1024
    x = jnp.ones((n, n), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best
