"""The router's balancing loss. Oracles: TRL's numbers for one batch (golden), and the formula over two padded rows a pair."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_engine as tiny
import trl_batch as trl
from safetensors.numpy import load_file

from jax_dpo.arrays import flatten, unflatten
from jax_dpo.data.batch import Batch, Tree, empty_batch, fill_rows
from jax_dpo.data.loader import shares
from jax_dpo.data.pack import RowShape
from jax_dpo.errors import UserError
from jax_dpo.loss.family import LossOptions
from jax_dpo.models.decoder import forward
from jax_dpo.train.evaluate import evaluate
from jax_dpo.train.state import Facts, Frozen, Knobs
from jax_dpo.train.step import micro_batch_loss
from jax_dpo.trainer.engine import Engine
from jax_dpo.trainer.models import router_coef

MOE = json.loads((trl.GOLDEN / "losses" / "moe.json").read_text())


def trl_trees() -> list[Tree]:
    arrays = load_file(trl.GOLDEN / "losses" / "moe_batch.safetensors")
    ids, real, answer = (arrays[k] for k in ("input_ids", "attention_mask", "completion_mask"))
    n = len(ids) // 2
    part = lambda row, mask: ids[row][mask[row] == 1].astype(np.int32)  # noqa: E731
    prompts = real - answer
    sides = lambda i: (part(i, prompts), part(i, answer), part(n + i, prompts), part(n + i, answer))  # noqa: E731
    return [Tree(*sides(i), True) for i in range(n)]


@pytest.mark.parametrize("key", [pytest.param(k, marks=[pytest.mark.slow] * (k != "0.5")) for k in MOE["cases"]])
def test_loss_and_gradient_are_those_of_trl(key: str) -> None:
    """Three pairs in two rows of 64 tokens; TRL lays them out as six rows of 18."""
    want = MOE["cases"][key]
    (config, params), (ref_config, ref) = (trl.model(MOE[m]) for m in ("policy", "reference"))
    coef = router_coef(None if key == "None" else float(key), config)
    assert coef == want["router_aux_loss_coef_in_effect"]
    trees = trl_trees()
    batch = empty_batch(2, RowShape(64, 64, 2, 2), group=coef > 0, router=coef > 0)
    placed = shares([np.arange(3)], None)
    fill_rows(batch, 0, [[placed[0], placed[2]], [placed[1]]], trees.__getitem__)
    facts = Facts(config, ref_config, False, False, "float32", remat=True)
    options = LossOptions(router_coef=coef)
    knobs = Knobs(jnp.float32(0), jnp.float32(MOE["beta"]), jnp.float32(0))

    def run(params: Any) -> tuple[jax.Array, Any]:
        on_device = jax.tree.map(jnp.asarray, batch)
        return micro_batch_loss(facts, options, params, Frozen({}, ref), on_device, knobs, trl.one_device(), None)

    (loss, (sums, _)), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    assert float(loss) == pytest.approx(want["loss"], rel=1e-5)
    assert float(sums.aux_loss) == pytest.approx(want["metrics"].get("aux_loss", 0.0), rel=1e-5)
    flat = flatten(gradient)
    norm = lambda x: float(jnp.linalg.norm(x))  # noqa: E731
    assert np.sqrt(sum(norm(x) ** 2 for x in flat.values())) == pytest.approx(want["grad_norm"], rel=1e-4)
    moe = flat["model.layers.block_sparse_moe.gate.weight"], flat["model.layers.block_sparse_moe.experts.w2.weight"]
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp."
        assert norm(moe[0][layer]) == pytest.approx(want["grad_norms"][f"{name}gate.weight"], rel=2e-4)
        assert norm(moe[1][layer]) == pytest.approx(want["grad_norms"][f"{name}experts.down_proj"], rel=2e-4)


@partial(jax.jit, static_argnums=0)
def routing(
    config: Any, params: Any, ids: jax.Array, places: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Probabilities [L, R, T, E] and choices [L, R, T, k] of ordinary padded rows."""
    watch = lambda routing: (routing.probability, routing.chosen)  # noqa: E731
    return forward(config, params, ids, places, mask, jnp.zeros_like(mask), watch=watch)[1][0]


def by_padded_rows(engine: Engine, data: Any, groups: list[np.ndarray]) -> list[float]:
    """E sum_e share_e probability_e of each group, over the real tokens of its padded rows and all layers: the definition."""
    config = engine.facts.policy
    params = unflatten({path: jnp.asarray(x) for path, x in tiny.weights_of(config).items()})
    found = []
    for group in groups:
        trees = [data.tree(int(i)) for i in group]
        rows = [
            np.concatenate(x) for t in trees for x in ((t.chosen_prompt, t.chosen), (t.rejected_prompt, t.rejected))
        ]
        ids = np.stack([np.pad(row, (0, 64 - len(row))) for row in rows])
        real = np.stack([np.arange(64) < len(row) for row in rows])
        places = np.where(real, np.arange(64), 0)
        mask = jnp.asarray(real, jnp.int32)
        probability, chosen = routing(config, params, jnp.asarray(ids), jnp.asarray(places), mask)
        E = config.experts.count  # type: ignore[union-attr]
        p = np.asarray(probability, np.float64)[:, real].reshape(-1, E)
        share = np.bincount(np.asarray(chosen)[:, real].reshape(-1), minlength=E)[:E] / len(p)
        found.append(E * float(share @ p.mean(0)))
    return found


def engine(mesh: tuple[int, int, int] = (1, 1, 1), **options: Any) -> Engine:
    return tiny.engine_on(mesh, shape=tiny.mixtral(), kl_coef=0.0, adam_epsilon=1e-6, **options)


@pytest.mark.slow
def test_groups_are_trls_micro_batches_however_they_are_packed() -> None:
    """Four groups of 4 pairs a step, in one micro-batch and in several; and in evaluation, where the last group is short."""
    options: dict[str, Any] = {"micro_batch": 4, "router_aux_loss_coef": 0.5}
    found = {}
    for name, more in (("one", {"micro_batch_tokens": 10_000}), ("several", {})):
        e = engine(**options, **more)
        assert e.train_set is not None and e.plan is not None
        found[name] = run = tiny.run(e, steps=2)
        first = run.sums[0]
        wanted = by_padded_rows(e, e.train_set, e.groups(e.plan.after(0)))
        assert first["aux_loss"] == pytest.approx(np.mean(wanted), rel=1e-5)
        assert first["loss"] - 0.5 * first["aux_loss"] == pytest.approx(np.log(2), abs=1e-6)
        # Evaluation batches are of 8 pairs: the last of 12 holds 4.
        wanted = by_padded_rows(e, e.eval_sets[None], [np.arange(8), np.arange(8, 12)])
        assert run.evaluation["eval_aux_loss"] == pytest.approx((8 * wanted[0] + 4 * wanted[1]) / 12, rel=1e-5)
    assert found["one"].micro_batches == [1, 1] and min(found["several"].micro_batches) > 1
    np.testing.assert_allclose(found["several"].losses, found["one"].losses, atol=2e-6)
    np.testing.assert_allclose(found["several"].norms, found["one"].norms, rtol=1e-5)
    for path, weight in found["one"].weights.items():
        assert np.abs(found["several"].weights[path] - weight).max() < 2e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"lora": True}])
def test_meshes_balance_the_same_groups(more: dict[str, Any]) -> None:
    """Groups of 4 pairs: of one device after each other, or of four devices at once."""
    options: dict[str, Any] = {"router_aux_loss_coef": 0.5, **more}
    want = tiny.run(engine(micro_batch=4, **options))
    found = tiny.run(engine((2, 2, 2), **options))
    assert want.sums[0]["aux_loss"] > 2
    for a, b in zip(found.sums, want.sums):
        assert a["aux_loss"] == pytest.approx(b["aux_loss"], rel=1e-5)
    np.testing.assert_allclose(found.losses, want.losses, atol=5e-6)
    np.testing.assert_allclose(found.norms, want.norms, rtol=2e-5)
    for path, weight in want.weights.items():
        assert np.abs(found.weights[path] - weight).max() < 2e-5, path


def test_off_is_off_and_a_plain_model_has_no_router() -> None:
    off = engine(router_aux_loss_coef=0.0)
    batch: Batch = off.batch_at(off.plan.after(0)).batch  # type: ignore[union-attr]
    assert off.options.router_coef == 0 and batch.owner is None and batch.group is None
    assert engine().options.router_coef == 0.001  # the config's own
    plain = tiny.engine_on((1, 1, 1), router_aux_loss_coef=0.0)
    assert plain.options.router_coef == 0
    with pytest.raises(UserError, match=r"router_aux_loss_coef is 0\.1.*llama") as caught:
        tiny.engine_on((1, 1, 1), router_aux_loss_coef=0.1).check()
    assert caught.value.name == "router-missing"
    with pytest.raises(UserError, match=r"micro_batch_tokens 50: the router's loss .* 4 pairs") as caught:
        _ = engine(micro_batch=4, micro_batch_tokens=50).feed
    assert caught.value.name == "micro-batch-tokens-small"


@pytest.mark.slow
def test_evaluation_loss_has_the_routers_share() -> None:
    with_it, without = (tiny_evaluation(c) for c in (0.5, 0.0))
    assert "eval_aux_loss" not in without
    assert with_it["eval_loss"] == pytest.approx(without["eval_loss"] + 0.5 * with_it["eval_aux_loss"], rel=1e-6)


def tiny_evaluation(coef: float) -> dict[str, float]:
    e = engine(router_aux_loss_coef=coef)
    state = e.fresh_state()
    frozen = e.frozen(state)
    return evaluate(e.evaluator, e.held_out(None, e.eval_sets[None]), state.params, frozen, tiny.knobs_of(e), e.options)
