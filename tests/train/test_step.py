"""Facts about the compiled step, read from its text and its memory analysis; what is counted by hand stands beside each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_engine as tiny

from jax_dpo.arrays import flatten
from jax_dpo.data.pack import RowShape
from jax_dpo.models.decoder import hidden_states
from jax_dpo.ops.token_stats import api, chunked
from jax_dpo.plan.lowered import lower_step, memory_of

# Sizes that name themselves in the text: no other dimension of the tiny model has them.
ROW, SCORED, VOCABULARY = 96, 72, tiny.VOCABULARY
SHAPE = RowShape(ROW, SCORED, 5, 2)
MOVED = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute")


@lru_cache(maxsize=8)
def compiled(mesh: tuple[int, int, int], in_chunks: bool = False) -> Any:
    """The step over two micro-batches of rows of `SHAPE`, the vocabulary whole or in chunks of 48."""
    with pytest.MonkeyPatch.context() as patch:
        if in_chunks:
            patch.setattr(api, "DENSE_BYTES", 0)
            patch.setattr(chunked, "CHUNK", 48)
        return lowered(mesh, SHAPE, 2).compile()


def lowered(mesh: tuple[int, int, int], shape: RowShape, micro_batches: int) -> jax.stages.Lowered:
    e = tiny.engine_on(mesh)
    return lower_step(e.facts, e.options, e.tx, e.mesh, shape, micro_batches=micro_batches, max_grad_norm=1.0)


def arrays(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """Every (type, shape) that the text names."""
    found = re.findall(r"\b(f32|bf16|f64|s32|pred|u32)\[([\d,]+)\]", text)
    return {(kind, tuple(map(int, dims.split(",")))) for kind, dims in found}


def iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers 0 to 7 as 4 x 2, transposed."""
    sizes, _, order = text.partition("T")
    ids = np.arange(np.prod(np.array(sizes[1:-1].split(","), int))).reshape([int(n) for n in sizes[1:-1].split(",")])
    return ids.transpose([int(a) for a in order[1:-1].split(",")]) if order else ids


def replica_groups(line: str) -> np.ndarray:
    """The devices that a collective joins, one row a group, in any of the ways in which XLA writes them."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}", line)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[3])]
        order = re.fullmatch(r", device_ids=\((.*)\)", named[2])
        ids = iota(order[1] if order else f"[{np.prod(list(sizes.values()))}]").reshape(list(sizes.values()))
        last = np.moveaxis(ids, axes, range(-len(axes), 0))
        return last.reshape(-1, int(np.prod([ids.shape[a] for a in axes])))
    plain = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    assert plain, line
    return iota(plain[3]).reshape(int(plain[1]), int(plain[2]))


def collectives(text: str) -> Iterator[tuple[str, set[tuple[str, tuple[int, ...]]], np.ndarray]]:
    """(operation, arrays of its result, groups) of every collective."""
    for line in text.splitlines():
        found = re.search(rf"= (.*?) ({'|'.join((*MOVED, 'all-to-all'))})(?:-start)?\(", line)
        if found:
            yield found[2], arrays(found[1]), replica_groups(line)


def is_activation(kind: str, shape: tuple[int, ...]) -> bool:
    return kind == "f32" and bool({ROW, SCORED} & set(shape)) and np.prod(shape) >= SCORED * 16


@pytest.mark.parametrize("mesh", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_the_vocabulary_never_meets_the_tokens_of_a_row(mesh: tuple[int, int, int]) -> None:
    """Whole logits are made of scored tokens alone; in chunks not even of those."""
    dense, small = (arrays(compiled(mesh, chunks).as_text()) for chunks in (False, True))
    V = VOCABULARY // mesh[2]
    assert any(
        SCORED in shape and V in shape for _, shape in dense
    )  # the reader of the text sees logits where there are any
    assert not [shape for _, shape in dense if ROW in shape and {V, VOCABULARY} & set(shape)]
    assert not [shape for _, shape in small if {ROW, SCORED} & set(shape) and {V, VOCABULARY} & set(shape)]
    assert any(SCORED in shape and 48 in shape for _, shape in small)


@pytest.mark.parametrize("mesh", [pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2)])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_weights_travel_and_activations_stay(mesh: tuple[int, int, int], in_chunks: bool) -> None:
    """Nothing of a row is summed or gathered over data or fsdp; over tensor blocks are, as Megatron has it (arXiv 1909.08053)."""
    gathered, exchanged = set(), 0
    for operation, results, groups in collectives(compiled(mesh, in_chunks).as_text()):
        over_tensor = bool(np.all(groups // mesh[2] == groups[:, :1] // mesh[2]))
        activations = [shape for kind, shape in results if is_activation(kind, shape)]
        if operation == "all-to-all":
            exchanged += 1
            assert activations
        elif not over_tensor:
            assert not activations, (operation, results)
            gathered |= {shape for _, shape in results} if operation == "all-gather" else set()
    assert exchanged == 3  # columns of embeddings for rows: policy, reference, and the policy's gradient
    assert (128 // mesh[2], 64) in gathered  # gate and up of one layer
    if in_chunks:
        assert not [shape for shape in gathered if VOCABULARY // mesh[2] in shape and 64 in shape and len(shape) == 3]


def test_the_state_takes_the_place_of_the_one_before() -> None:
    mesh = (1, 8, 1)
    e = tiny.engine_on(mesh)
    state = e.abstract_state
    bytes_of = lambda x: int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize  # noqa: E731
    held = sum(map(bytes_of, jax.tree.leaves(state)))
    aliased = compiled(mesh).memory_analysis().alias_size_in_bytes
    assert held <= aliased <= held + 64 * len(jax.tree.leaves(state))  # scalars are padded


def test_one_trace_serves_every_count_and_every_knob() -> None:
    e = tiny.engine_on((1, 8, 1), pairs_per_step=64, train=256, micro_batch_tokens=100)
    state = e.fresh_state()
    frozen, before = e.frozen(state), state
    batch = e.batch_at(e.plan.after(0))
    assert batch.micro_batches >= 3
    for count, rate, beta in [(3, 1e-3, 0.1), (2, 5e-4, 0.2), (1, 0.0, 0.05)]:
        knobs = tiny.knobs_of(e, rate, beta)
        state, results = e.step(state, frozen, e.to_devices(batch), jnp.int32(count), knobs, jax.random.key(count))
        assert bool(results["finite"])
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert int(state.step) == 3
    state.params["model"]["norm"]["weight"] = state.params["model"]["norm"]["weight"].at[0].set(jnp.nan)
    _, results = e.step(state, frozen, e.to_devices(batch), jnp.int32(1), knobs, jax.random.key(0))
    assert not bool(results["finite"])
    assert e.step._cache_size() == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_micro_batches() -> None:
    one, four = (memory_of(lowered((1, 1, 1), RowShape(ROW, SCORED, 4, 4), n).compile()) for n in (1, 4))
    assert four.temporary <= 1.3 * one.temporary


def equations(jaxpr: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every equation of a jaxpr and those inside it, with the names of what it is in."""
    for e in jaxpr.eqns:
        yield path, e
        for inner in jax.tree.leaves(
            list(e.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner), f"{path}/{e.primitive.name}")


@lru_cache(maxsize=2)
def differentiated(remat: bool) -> list[tuple[str, Any]]:
    """The gradient of a decoder of 3 layers over 2 rows of 160 tokens: 3 chunks of queries."""
    config = tiny.shape_of()
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.engine_on((1, 1, 1)).abstract_params)
    ids = jax.ShapeDtypeStruct((2, 160), jnp.int32)
    loss = lambda p, *row: jnp.sum(hidden_states(config, p, *row, remat=remat) ** 2)  # noqa: E731
    return list(equations(jax.make_jaxpr(jax.grad(loss))(params, ids, ids, ids, ids).jaxpr))


@pytest.mark.parametrize("remat", [False, True])
def test_attention_runs_once_forward(remat: bool) -> None:
    """One exponential a chunk in the forward pass, one in the backward, which makes the probabilities again; none more."""
    where = [
        path for path, e in differentiated(remat) if e.primitive.name == "exp" and len(e.outvars[0].aval.shape) == 4
    ]
    assert sorted(where) == ["/scan"] * 3 + ["/scan/remat2"] * 3


@pytest.mark.parametrize("remat", [False, True])
def test_products_of_linear_layers_run_again_where_memory_is_to_be_saved(remat: bool) -> None:
    again = [
        p for p, e in differentiated(remat) if e.primitive.name == "dot_general" and p == "/scan/remat2/custom_vjp_call"
    ]
    assert len(again) == (6 if remat else 0)  # all but down_proj, whose product nothing asks for


@pytest.mark.parametrize("remat", [False, True])
def test_what_a_layer_keeps_for_the_backward(remat: bool) -> None:
    scan = next(e for _, e in differentiated(remat) if e.primitive.name == "scan")
    kept = sum(int(np.prod(v.aval.shape)) for v in scan.outvars if v.aval.shape[0] == 3)
    D, F, N, G, H = 64, 128, 4, 2, 16
    numbers = D + N * H + N  # its input, the attention's output and log-sum-exp
    if not remat:
        numbers += N * H + 2 * G * H + D + 2 * F  # q, k, v, o, gate, up
    assert kept == 3 * 2 * 160 * numbers


@pytest.mark.slow
def test_dropout_follows_its_key() -> None:
    e = tiny.engine_on((1, 1, 1), lora=True, steps=1, dropout=0.3, disable_dropout=False)

    def losses(seed: int) -> list[float]:
        state = e.fresh_state()
        for path in [p for p in flatten(state.params) if p.endswith("lora_b")]:
            node = state.params
            *parents, last = path.split(".")
            for parent in parents:
                node = node[parent]
            node[last] = node[last] + 0.1
        batch = e.batch_at(e.plan.after(0))
        args = (e.to_devices(batch), jnp.int32(1), tiny.knobs_of(e), jax.random.key(seed))
        _, results = e.step(state, e.frozen(state), *args)
        return [float(x) for x in (results["sums"].loss, results["grad_norm"])]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


@pytest.mark.parametrize(("bf16", "whole"), [(False, True), (True, False)])
def test_float32_is_float32_in_every_product(bf16: bool, whole: bool) -> None:
    """Without that a TPU multiplies float32 in one pass of bfloat16, a GPU in TF32. The lowered text says what is asked for."""
    engine = tiny.engine_on((1, 1, 1), bf16=bf16)
    lowered = lower_step(
        engine.facts, engine.options, engine.tx, engine.mesh, engine.feed.shape, micro_batches=1, max_grad_norm=1.0
    )
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    asked = ["HIGHEST" in line for line in products]
    assert len(products) > 20
    assert all(asked) if whole else not all(asked)
