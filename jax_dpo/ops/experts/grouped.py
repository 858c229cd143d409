"""Tokens laid out by expert, in blocks that each belong to one expert, and one matrix product a block.

A place is a row of the layout: expert after expert, each group filled up with empty rows to whole blocks. What is computed is the
tokens' own work plus those empty rows, less than a block an expert. `jax.lax.ragged_dot` does the same products; it is used where it
is an instruction of the machine (TPU). Elsewhere JAX 0.10 makes it a product of every token with every expert, E / k times the work,
so there a loop over the blocks that hold something takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

LARGEST, SMALLEST = 512, 8  # rows of a block


class Layout(NamedTuple):
    """P places in B = P / blocks rows a block; places and tokens name each other, and one past the end means none."""

    item: jax.Array
    """[P] int32 which choice lies here: k * token + number of the choice; N k where none does"""
    place: jax.Array
    """[N, k] int32 where each choice lies; P where it lies nowhere"""
    expert: jax.Array
    """[blocks] int32 whose block it is"""
    rows: jax.Array
    """[E] int32 rows of each expert's group, empty ones included: a multiple of B"""


def block_rows(items: int, experts: int) -> int:
    """A power of two near a quarter of an expert's mean group: enough rows for a product, few of them empty."""
    quarter = max(1, items // (4 * experts))
    return max(SMALLEST, min(LARGEST, 1 << (quarter.bit_length() - 1)))


def layout(chosen: jax.Array, experts: int) -> Layout:
    """`chosen` [N, k] int32, `experts` for none."""
    flat = chosen.reshape(-1)
    M, B = flat.size, block_rows(flat.size, experts)
    blocks = -(-M // B) + experts
    P = blocks * B
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    by_expert = flat[order]
    start = jnp.searchsorted(by_expert, jnp.arange(experts + 1, dtype=flat.dtype)).astype(jnp.int32)
    own = -(-(start[1:] - start[:-1]) // B)  # blocks of each expert
    end = jnp.cumsum(own)
    first = jnp.concatenate([end - own, jnp.zeros(1, jnp.int32)]) * B
    place = first[by_expert] + jnp.arange(M, dtype=jnp.int32) - start[by_expert]
    place = jnp.where(by_expert < experts, place, P)
    return Layout(
        item=jnp.full(P, M, jnp.int32).at[place].set(order, mode="drop"),
        place=jnp.full(M, P, jnp.int32).at[order].set(place).reshape(chosen.shape),
        expert=jnp.minimum(jnp.searchsorted(end, jnp.arange(blocks), side="right"), experts - 1).astype(jnp.int32),
        rows=own * B,
    )


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], 0 for an index past the end."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _summed(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [A, ...], index [N, k] -> [N, ...]: the sum of the rows that each token names, in float32."""
    return jnp.sum(_rows(x, index).astype(jnp.float32), axis=1).astype(x.dtype)


# Two permutations that are each other's transpose: their backward passes read rows as well, where that of a plain index would
# scatter.
@jax.custom_vjp
def _spread(x: jax.Array, to: jax.Array, back: jax.Array) -> jax.Array:
    """x [A, ...] -> [P, ...]: row `to[p]` at place p; `back` [A, k] are the places where each row went."""
    return _rows(x, to)


@jax.custom_vjp
def _collect(y: jax.Array, back: jax.Array, to: jax.Array) -> jax.Array:
    """y [P, ...] -> [A, ...]: for each row the sum over its places."""
    return _summed(y, back)


_spread.defvjp(lambda x, to, back: (_rows(x, to), back), lambda back, g: (_summed(g, back), None, None))
_collect.defvjp(lambda y, back, to: (_summed(y, back), to), lambda to, g: (_rows(g, to), None, None))


def _loop(x: jax.Array, w: jax.Array, plan: Layout, turned: bool) -> jax.Array:
    """x [P, i] with w [E, o, i] of each block's expert -> [P, o]; `turned`: with w [E, i, o]. Blocks behind the last stay 0."""
    B = x.shape[0] // plan.expert.size
    spec = "bi,io->bo" if turned else "bi,oi->bo"
    out = jnp.zeros((x.shape[0], w.shape[2 if turned else 1]), x.dtype)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x, i * B, B)
        mine = jax.lax.dynamic_index_in_dim(w, plan.expert[i], keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.einsum(spec, part, mine), i * B, 0)

    return jax.lax.fori_loop(0, jnp.sum(plan.rows) // B, body, out)


def _loop_weights(x: jax.Array, dy: jax.Array, plan: Layout) -> jax.Array:
    """sum over each expert's rows of x^T dy, [E, i, o] float32."""
    B = x.shape[0] // plan.expert.size
    total = jnp.zeros((plan.rows.size, x.shape[1], dy.shape[1]), jnp.float32)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i * B, B)  # noqa: E731
        more = jnp.einsum("bi,bo->io", cut(x), cut(dy), preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_index_in_dim(total, plan.expert[i], keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + more, plan.expert[i], 0)

    return jax.lax.fori_loop(0, jnp.sum(plan.rows) // B, body, total)


def _ragged(x: jax.Array, w: jax.Array, plan: Layout, turned: bool) -> jax.Array:
    """As `_loop`."""
    return jax.lax.ragged_dot(x, w if turned else w.swapaxes(1, 2), plan.rows).astype(x.dtype)


_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _ragged_weights(x: jax.Array, dy: jax.Array, plan: Layout) -> jax.Array:
    """As `_loop_weights`."""
    return jax.lax.ragged_dot_general(x, dy, plan.rows, _OVER_ROWS, preferred_element_type=jnp.float32)


def _by_platform(tpu: Callable[..., jax.Array], default: Callable[..., jax.Array], *args: Any) -> jax.Array:
    return jax.lax.platform_dependent(*args, tpu=tpu, default=default)


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array, plan: Layout) -> jax.Array:
    """Each row of x [P, in] times the weight [out, in] of the expert whose place it lies in, transposed: [P, out]."""
    return _by_platform(partial(_ragged, turned=False), partial(_loop, turned=False), x, w, plan)


def _product_fwd(x: jax.Array, w: jax.Array, plan: Layout) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Layout]]:
    return product(x, w, plan), (x, w, plan)


def _product_bwd(saved: tuple[jax.Array, jax.Array, Layout], dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, plan = saved
    dx = _by_platform(partial(_ragged, turned=True), partial(_loop, turned=True), dy, w, plan)
    # A loop of its own, so that it is not run where nobody asks for the weights' gradient (a frozen base).
    dw = _by_platform(_ragged_weights, _loop_weights, x, dy, plan)
    return dx, dw.swapaxes(1, 2).astype(w.dtype), None


product.defvjp(_product_fwd, _product_bwd)


def mixture(
    x: jax.Array,
    chosen: jax.Array,
    share: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    act: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """See `api.mixture`."""
    k, plan = chosen.shape[1], layout(chosen, gate.shape[0])
    token = plan.item // k  # N where nothing lies
    laid = _spread(x, token, plan.place)
    # Named, since rematerialisation does not look into `product` for what it may keep.
    inner = [checkpoint_name(product(laid, w, plan), "linear_out") for w in (gate, up)]
    out = checkpoint_name(product(act(inner[0]) * inner[1], down, plan), "linear_out")
    weight = _spread(share.reshape(-1, 1), plan.item, plan.place.reshape(-1, 1))
    return _collect((out.astype(jnp.float32) * weight).astype(x.dtype), plan.place, token)
