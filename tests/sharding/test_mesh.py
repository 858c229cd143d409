"""Meshes, rules and placing: sizes by hand, numpy as the oracle of what lies where."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_engine as tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_dpo.arrays import flatten, unflatten
from jax_dpo.errors import UserError
from jax_dpo.models.config import linear_shapes, parameter_shapes
from jax_dpo.models.lora import LoraSpec, LoraTarget
from jax_dpo.sharding import mesh as meshes
from jax_dpo.sharding import place, rules, tables
from jax_dpo.train.optimizer import OptimizerOptions, make_optimizer


@pytest.mark.parametrize(
    ("given", "shape"),
    [((1, -1, 1), (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((-1, 1, 1), (8, 1, 1)), ((2, 2, 2), (2, 2, 2))],
)
def test_minus_one_is_filled_up(given: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    assert meshes.mesh_shape(8, *given) == shape
    assert tuple(meshes.make_mesh(*given).shape.values()) == shape


@pytest.mark.parametrize("given", [(1, 3, 1), (-1, -1, 1), (0, -1, 1), (3, -1, 1), (1, 1, 1)])
def test_a_mesh_that_is_not_all_devices_is_refused(given: tuple[int, int, int]) -> None:
    with pytest.raises(UserError) as refused:
        meshes.mesh_shape(8, *given)
    assert refused.value.name == "mesh-shape"
    assert "mesh_fsdp" in refused.value.message


def test_axes_are_automatic_and_rows_lie_over_data_and_fsdp() -> None:
    mesh = meshes.make_mesh(2, 2, 2)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert meshes.row_shards(mesh) == 4


def test_every_parameter_has_one_rule() -> None:
    plain = tiny.shape_of(num_hidden_layers=2)
    wide = replace(plain, attention_bias=True, attention_out_bias=True, mlp_bias=True, qk_norm=True)
    targets = tuple(LoraTarget(path, (4,), (2.0,)) for path in linear_shapes(wide))
    adapted = replace(wide, lora=LoraSpec(targets, 0.0, use_dora=True))
    mesh = meshes.make_mesh(2, 2, 2)
    for path, shape in parameter_shapes(adapted).items():
        assert len(rules.spec_of(path, shape, mesh)) == len(shape), path


def test_a_parameter_without_a_rule_is_a_fault() -> None:
    with pytest.raises(ValueError, match="0 sharding rules"):
        rules.spec_of("model.layers.self_attn.k_scale", (2, 4), meshes.make_mesh(1, 8, 1))


def test_what_does_not_divide_stays_whole() -> None:
    mesh = meshes.make_mesh(1, 4, 2)
    assert rules.spec_of("lm_head.weight", (10, 64), mesh) == PartitionSpec("tensor", "fsdp")
    assert rules.spec_of("lm_head.weight", (11, 62), mesh) == PartitionSpec(None, None)


def test_moments_lie_as_their_parameters() -> None:
    mesh = meshes.make_mesh(2, 2, 2)
    params = unflatten({p: jax.ShapeDtypeStruct(s, np.float32) for p, s in parameter_shapes(tiny.shape_of()).items()})
    state = jax.eval_shape(optax.scale_by_adam().init, params)
    laid = rules.like_params(state, params, mesh)
    want = flatten(rules.shardings(params, mesh))
    assert flatten(laid.mu) == flatten(laid.nu) == want
    assert laid.count.spec == PartitionSpec()


def test_factored_moments_lie_as_the_axes_that_they_keep() -> None:
    mesh = meshes.make_mesh(2, 2, 2)
    shapes = parameter_shapes(tiny.shape_of(hidden_size=128))  # so that up_proj is square
    params = unflatten({p: jax.ShapeDtypeStruct(s, np.float32) for p, s in shapes.items()})
    state = jax.eval_shape(make_optimizer(OptimizerOptions("adafactor"), params).init, params)
    factored, _ = rules.like_params(state, params, mesh)
    for path, shape in shapes.items():
        spec = tuple(rules.spec_of(path, shape, mesh))
        if len(shape) - path.startswith("model.layers.") == 1:
            assert tuple(flatten(factored.whole)[path].spec) == spec, path
        else:
            assert tuple(flatten(factored.rows)[path].spec) == spec[:-1], path
            assert tuple(flatten(factored.columns)[path].spec) == (*spec[:-2], spec[-1]), path
    up = "model.layers.mlp.up_proj.weight"
    assert shapes[up][1] == shapes[up][2]
    assert tuple(flatten(factored.rows)[up].spec) == (None, "tensor")
    assert tuple(flatten(factored.columns)[up].spec) == (None, "fsdp")
    assert factored.step.spec == PartitionSpec()


def test_heads_that_would_be_cut_are_refused_with_what_fits() -> None:
    rules.check_heads(4, meshes.make_mesh(1, 4, 2))
    with pytest.raises(UserError, match="Use one of 1, 2") as refused:
        rules.check_heads(2, meshes.make_mesh(1, 2, 4))
    assert refused.value.name == "mesh-tensor-heads"


class Arrays(NamedTuple):
    many: np.ndarray
    few: np.ndarray
    none: np.ndarray | None


def test_a_batch_lies_over_rows_and_comes_back() -> None:
    mesh = meshes.make_mesh(2, 2, 2)
    rows = place.row_range(mesh, 8)
    assert rows == (0, 8)
    batch = Arrays(np.arange(48).reshape(3, 8, 2), np.arange(3), None)
    put = place.batch_to_devices(batch, mesh, 8, leading=1)
    assert put.many.sharding.spec == PartitionSpec(None, meshes.ROWS)
    assert put.many.addressable_shards[0].data.shape == (3, 2, 2)
    assert put.few.sharding.is_fully_replicated and put.none is None
    np.testing.assert_array_equal(place.fetch(put.many), batch.many)


def test_a_reader_is_asked_for_its_shards_alone() -> None:
    mesh = meshes.make_mesh(1, 8, 1)
    whole, asked = np.arange(64.0).reshape(16, 4), []

    def read(index: tuple[slice, ...]) -> np.ndarray:
        asked.append(whole[index].shape)
        return whole[index]

    x = place.from_reader(whole.shape, np.float32, read, NamedSharding(mesh, PartitionSpec("fsdp")))
    np.testing.assert_array_equal(x, whole)
    assert set(asked) == {(2, 4)}


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize("width", [16, 18])
def test_lookup_and_its_gradient_are_those_of_a_whole_table(shape: tuple[int, int, int], width: int) -> None:
    mesh = meshes.make_mesh(*shape)
    rng = np.random.default_rng(0)
    table, tokens = rng.standard_normal((10, width)).astype(np.float32), rng.integers(0, 10, (8, 5))
    weight = rng.standard_normal((8, 5, width)).astype(np.float32)

    def total(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.sum(tables.lookup(mesh)(table, tokens) * weight)

    spec = rules.spec_of("lm_head.weight", table.shape, mesh)
    put = (
        jax.device_put(table, NamedSharding(mesh, spec)),
        jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(meshes.ROWS))),
    )
    value, gradient = jax.jit(jax.value_and_grad(total))(*put)
    want = np.zeros_like(table)
    np.add.at(want, tokens.reshape(-1), weight.reshape(-1, width))
    np.testing.assert_allclose(value, np.sum(table[tokens] * weight), rtol=1e-4)
    np.testing.assert_allclose(gradient, want, atol=1e-5)
