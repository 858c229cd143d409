"""The same global batch on one device and on meshes of eight: one trajectory; the oracle is the run on one device."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_engine as tiny

from jax_dpo.ops.token_stats import api, chunked
from jax_dpo.report.terminal import Quiet
from jax_dpo.trainer.models import OTHER, Pairing
from jax_dpo.trainer.precompute import precompute

ONE = (1, 1, 1)
# Adam makes a step of full size of a gradient that is rounding alone, unless its epsilon is well above that. A gradient of an
# adapter's B that ends near 0 spoils a whole row of A after it: at 1e-6 one element of 768 was 9e-6 off, on some processors.
EPSILON = 1e-5


@lru_cache(maxsize=2)
def on_one_device(lora: bool) -> tiny.Trajectory:
    return tiny.run(tiny.engine_on(ONE, lora=lora, adam_epsilon=EPSILON))


def check_start(found: tiny.Trajectory) -> None:
    """Nothing is trained yet: equal to the bit, though the loss's logarithm may round."""
    first, before = found.sums[0], found.evaluation
    assert abs(first["loss"] - math.log(2)) < 2e-7
    assert abs(before["eval_loss"] - math.log(2)) < 2e-7
    for side in ("chosen", "rejected"):
        assert first[f"reward_{side}"] == 0
        assert first[f"kl_{side}"] == 0  # the sum, which no clamp has touched
        assert before[f"eval_rewards/{side}"] == 0
        assert before[f"eval_kl_divergence/{side}"] == 0


def check_same(found: tiny.Trajectory, want: tiny.Trajectory) -> None:
    np.testing.assert_allclose(found.losses, want.losses, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.norms, want.norms, rtol=5e-6)
    for step, (a, b) in enumerate(zip(found.sums, want.sums)):
        for name in b:
            # A sum of 32 differences of sums of about 100 nats, each rounded to 1e-5.
            atol = 5e-4 if name == "logratio" else 5e-5
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, atol=atol, err_msg=f"{name} of step {step + 1}")
    assert found.sums[-1]["kl_chosen"] > 1e-3  # it has moved
    for a, b in zip(found.responses, want.responses, strict=True):
        assert len(a) == len(b) and a.metrics().keys() == b.metrics().keys()
        for name, value in b.metrics().items():
            np.testing.assert_allclose(a.metrics()[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
        # Rows that hold more tokens have room for later positions, at which no answer is.
        shared = min(a.at.shape[1], b.at.shape[1])
        np.testing.assert_allclose(a.at[:, :shared], b.at[:, :shared], rtol=1e-3, atol=5e-5)
        assert not a.at[:, shared:].any() and not b.at[:, shared:].any()
    for path, weight in want.weights.items():
        difference = np.abs(found.weights[path] - weight)
        assert difference.max() < 2e-5, path
        assert difference.mean() < 5e-8, path


@pytest.mark.parametrize("lora", [False, True])
def test_one_device_starts_at_zero(lora: bool) -> None:
    check_start(on_one_device(lora))


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[] if mesh == (2, 2, 2) else pytest.mark.slow) for mesh in tiny.MESHES]
)
def test_meshes_take_the_same_steps(mesh: tuple[int, int, int]) -> None:
    found = tiny.run(tiny.engine_on(mesh, adam_epsilon=EPSILON))
    check_start(found)
    check_same(found, on_one_device(False))


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[] if mesh == (2, 2, 2) else pytest.mark.slow) for mesh in tiny.MESHES]
)
def test_meshes_take_the_same_steps_with_an_adapter(mesh: tuple[int, int, int]) -> None:
    found = tiny.run(tiny.engine_on(mesh, lora=True, adam_epsilon=EPSILON))
    check_start(found)
    check_same(found, on_one_device(True))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_meshes_take_the_same_steps_with_a_vocabulary_that_nothing_divides(lora: bool | dict[str, Any]) -> None:
    """259 tokens, as after three were added: both tables stay whole along `tensor`."""
    shape = tiny.shape_of(vocab_size=259)
    want = tiny.run(tiny.engine_on(ONE, lora=lora, shape=shape, adam_epsilon=EPSILON))
    found = tiny.run(tiny.engine_on((2, 2, 2), lora=lora, shape=shape, adam_epsilon=EPSILON))
    check_start(found)
    check_same(found, want)


@pytest.mark.slow
def test_meshes_take_the_same_steps_with_a_rich_adapter() -> None:
    """DoRA in some layers, ranks that differ, embedding and head trained whole."""
    want = tiny.run(tiny.engine_on(ONE, lora=tiny.RICH, adam_epsilon=EPSILON))
    check_same(tiny.run(tiny.engine_on((2, 2, 2), lora=tiny.RICH, adam_epsilon=EPSILON)), want)


@pytest.mark.slow
def test_sorted_losses_do_not_depend_on_rows_and_devices() -> None:
    """aot sorts within TRL's micro-batches of 4 pairs, wherever these lie: one at a time, several together, or spread over devices."""
    sorts = {"loss_type": ["aot", "aot_unpaired"], "micro_batch": 4, "adam_epsilon": EPSILON}
    want = tiny.run(tiny.engine_on(ONE, **sorts))
    together = tiny.run(tiny.engine_on(ONE, **sorts, micro_batch_tokens=4096))
    assert max(together.micro_batches) < min(want.micro_batches) == 4
    check_same(together, want)
    check_same(tiny.run(tiny.engine_on((2, 2, 2), **sorts)), want)
    alone = tiny.run(tiny.engine_on(ONE, **{**sorts, "micro_batch": 16}))
    assert abs(alone.losses[-1] - want.losses[-1]) > 1e-4, "other groups sort other pairs together"


@pytest.mark.slow
def test_what_the_data_say_of_pairs_goes_with_them() -> None:
    """All four columns, and a beta that follows the step: at once, and in several micro-batches over four row shards."""
    columns = ["beta", "margin", "label", "weight"]
    given = {"pair_columns": columns, "beta_dpo_alpha": 0.6, "adam_epsilon": EPSILON, "learning_rate": 3e-3}
    given |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "micro_batch": 4}
    want = tiny.run(tiny.engine_on(ONE, **given, micro_batch_tokens=4096))
    apart = tiny.run(tiny.engine_on((2, 2, 2), **given, micro_batch_tokens=100))
    assert set(want.micro_batches) == {1} and min(apart.micro_batches) > 1
    check_same(apart, want)
    assert apart.evaluation["eval_loss"] == pytest.approx(want.evaluation["eval_loss"], rel=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_meshes_hold_the_same_trust_region(lora: bool) -> None:
    """The probe set of one device lies in several micro-batches, that of eight in one row each; the bound acts in every step."""
    options = {
        "kl_trust_region": True,
        "kl_probe_pairs": 12,
        "eval_strategy": "steps",
        "target_kl": 1e-4 if lora else 1e-3,
    }
    options |= {"adam_epsilon": EPSILON, "lora": lora}
    want = tiny.run(tiny.engine_on(ONE, micro_batch=2, **options))
    assert min(scale for scale, _ in want.accepted) < 0.9
    assert all(0 < kl <= options["target_kl"] for _, kl in want.accepted)
    for mesh in ((1, 8, 1), (2, 2, 2)):
        found = tiny.run(tiny.engine_on(mesh, **options))
        np.testing.assert_allclose(found.accepted, want.accepted, rtol=2e-3)
        np.testing.assert_allclose(found.losses, want.losses, rtol=0, atol=2e-6)
        for path, weight in want.weights.items():
            assert np.abs(found.weights[path] - weight).max() < 2e-5, path


@pytest.mark.slow
def test_meshes_move_the_reference_alike() -> None:
    """TR-DPO: the reference lies as the parameters do, and the steps after a move see the same one."""
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 2, "adam_epsilon": EPSILON}
    want = tiny.run(tiny.engine_on(ONE, **moving))
    check_same(tiny.run(tiny.engine_on((2, 2, 2), **moving)), want)
    still = on_one_device(False)
    assert want.losses[:2] == pytest.approx(still.losses[:2], abs=2e-6)
    assert want.sums[2]["kl_chosen"] < 0.5 * still.sums[2]["kl_chosen"]


@lru_cache(maxsize=1)
def gemma2_on_one_device() -> tiny.Trajectory:
    return tiny.run(tiny.engine_on(ONE, adam_epsilon=EPSILON, shape=tiny.gemma2()))


@lru_cache(maxsize=1)
def mixtral_on_one_device() -> tiny.Trajectory:
    return tiny.run(tiny.engine_on(ONE, adam_epsilon=EPSILON, shape=tiny.mixtral(), router_aux_loss_coef=0.0))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)])
def test_meshes_take_the_same_steps_through_experts(mesh: tuple[int, int, int]) -> None:
    """Without the router's loss, which is about the pairs of each device (tests/train/test_router_loss.py)."""
    found = tiny.run(tiny.engine_on(mesh, adam_epsilon=EPSILON, shape=tiny.mixtral(), router_aux_loss_coef=0.0))
    check_start(found)
    check_same(found, mixtral_on_one_device())


@pytest.mark.slow
@pytest.mark.parametrize("in_chunks", [pytest.param(False, marks=pytest.mark.slow), True])
def test_meshes_take_the_same_steps_where_logits_are_capped(in_chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2, its vocabulary over two devices."""
    want = gemma2_on_one_device()
    if in_chunks:
        monkeypatch.setattr(api, "DENSE_BYTES", 0)
        monkeypatch.setattr(chunked, "CHUNK", 48)
    found = tiny.run(tiny.engine_on((2, 2, 2), adam_epsilon=EPSILON, shape=tiny.gemma2()))
    check_start(found)
    check_same(found, want)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False])
def test_a_reference_of_another_width_is_the_same_on_a_mesh(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr(api, "DENSE_BYTES", 0)
        monkeypatch.setattr(chunked, "CHUNK", 48)
    found = []
    for mesh in (ONE, (2, 2, 2)):
        engine = tiny.engine_on(mesh)
        wide = tiny.policy_of(tiny.shape_of(hidden_size=96, num_hidden_layers=2), seed=5)
        engine.pairing = Pairing(engine.pairing.policy, OTHER, wide)
        found.append(tiny.run(engine, steps=1))
    want, other = found
    assert want.evaluation["eval_kl_divergence"] > 0.1
    for name in ("eval_loss", "eval_kl_divergence", "eval_rewards/margins"):
        assert other.evaluation[name] == pytest.approx(want.evaluation[name], rel=2e-5), name
    assert other.losses == pytest.approx(want.losses, rel=2e-5) and other.norms == pytest.approx(want.norms, rel=2e-5)


def precomputed(mesh: tuple[int, int, int], cache: Path, **options: Any) -> tuple[Any, np.ndarray]:
    engine = tiny.engine_on(mesh, precompute_ref_log_probs=True, precompute_ref_batch_size=3, kl_coef=0.0, **options)
    assert engine.train_set is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DPO_CACHE", str(cache / str(mesh)))
        return engine, precompute(engine, engine.train_set, display=Quiet(), asked=lambda: False).values


def test_meshes_precompute_alike(tmp_path: Path) -> None:
    (_, found), (_, want) = (precomputed(mesh, tmp_path, ld_alpha=0.5) for mesh in ((2, 2, 2), ONE))
    assert found.shape == (64, 2) and found.max() < -5
    np.testing.assert_allclose(found, want, rtol=3e-6)


@pytest.mark.slow
def test_meshes_take_the_same_steps_with_precomputed_sums(tmp_path: Path) -> None:
    """Oracle: one device with the reference in its step."""
    want = tiny.run(tiny.engine_on(ONE, kl_coef=0.0, adam_epsilon=EPSILON))
    engine, engine.ref_logps = precomputed((2, 2, 2), tmp_path, adam_epsilon=EPSILON)
    found = tiny.run(engine)
    np.testing.assert_allclose(found.losses, want.losses, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.norms, want.norms, rtol=5e-6)
    assert found.evaluation["eval_kl_divergence"] == 0 and found.sums[-1]["kl_tokens"] == 0
    for path, weight in want.weights.items():
        assert np.abs(found.weights[path] - weight).max() < 2e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [ONE, (4, 1, 2)])
def test_micro_batches_take_the_same_steps(mesh: tuple[int, int, int]) -> None:
    found = tiny.run(tiny.engine_on(mesh, micro_batch_tokens=100, adam_epsilon=EPSILON))
    if mesh == ONE:
        assert min(found.micro_batches) > 4 and len(set(found.micro_batches)) > 1
    check_start(found)
    check_same(found, on_one_device(False))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "lora"), [(ONE, False), ((1, 8, 1), False), ((2, 2, 2), True)])
def test_vocabulary_chunks_take_the_same_steps(
    mesh: tuple[int, int, int], lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = on_one_device(lora)
    monkeypatch.setattr(api, "DENSE_BYTES", 0)
    monkeypatch.setattr(chunked, "CHUNK", 48)
    found = tiny.run(tiny.engine_on(mesh, lora=lora, adam_epsilon=EPSILON))
    check_start(found)
    check_same(found, want)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [ONE, (2, 2, 2)])
@pytest.mark.parametrize(
    "options",
    [{"bf16": True}, {"gradient_checkpointing": False}, {"bf16": True, "lora": True}],
    ids=["bf16", "no recomputation", "bf16 adapter"],
)
def test_every_way_of_computing_starts_at_zero(mesh: tuple[int, int, int], options: dict[str, bool]) -> None:
    tied = tiny.shape_of(tie_word_embeddings=True, num_hidden_layers=2)
    check_start(tiny.run(tiny.engine_on(mesh, shape=tied, **options), steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_factored_optimizer_takes_the_same_steps(lora: bool) -> None:
    """Means over rows, columns and whole layers, each of which a mesh of eight has cut."""
    options = {"optim": "adafactor", "lora": lora}
    found, want = (tiny.run(tiny.engine_on(mesh, **options)) for mesh in ((2, 2, 2), ONE))
    check_start(found)
    np.testing.assert_allclose(found.losses, want.losses, rtol=0, atol=2e-6)
    for path, weight in want.weights.items():
        # Where a gradient is rounding alone, its direction is too: a step of full size, as in AdamW without its epsilon.
        difference = np.abs(found.weights[path] - weight)
        assert np.quantile(difference, 0.99) < 2e-5, path
