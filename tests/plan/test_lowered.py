"""The abstract step against the real one. Oracle: what the engine of a run puts onto the devices."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_engine as tiny

from jax_dpo.models.decoder import without_adapter
from jax_dpo.plan import lowered
from jax_dpo.trainer.engine import Engine
from jax_dpo.trainer.models import ADAPTER, OTHER, Pairing

AOT = Path(__file__).parents[2] / "scripts" / "aot.py"


def described(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype).name, x.sharding.spec), tree)


def engine_of(kind: str) -> Engine:
    """A run of each way in which a policy can stand to its reference."""
    full, options = ("start", "moves", "beforehand"), {}
    if kind == "moves":
        options = {"sync_ref_model": True}
    if kind == "beforehand":
        options = {"precompute_ref_log_probs": True, "kl_coef": 0.0}
    engine = tiny.engine_on(
        (2, 2, 2), lora=tiny.RICH if kind == "rich" else kind not in full, bf16=True, micro_batch_tokens=100, **options
    )
    if kind == "beforehand":
        engine.ref_logps = np.zeros((len(engine.train_set), 2), np.float32)
    policy = engine.pairing.policy
    if kind == "adapter":
        engine.pairing = replace(engine.pairing, kind=ADAPTER)
    if kind == "another":
        other = tiny.policy_of(without_adapter(policy.config), seed=3)
        engine.pairing = Pairing(policy, OTHER, other)
    return engine


@pytest.mark.parametrize("kind", ["start", "base", "rich", "adapter", "another", "moves", "beforehand"])
def test_shapes_and_shardings_are_those_of_a_run(kind: str) -> None:
    engine = engine_of(kind)
    state = engine.fresh_state()
    assert described(engine.abstract_state) == described(state)
    if kind not in (
        "adapter",
        "moves",
    ):  # whose frozen leaves are a copy of the trained ones: in the compute dtype, as every reference
        assert described(lowered.abstract_frozen(engine.facts, engine.mesh)) == described(engine.frozen(state))
    batch = engine.to_devices(engine.batch_at(engine.plan.after(0)))
    abstract = lowered.abstract_batch(engine.mesh, engine.feed.shape, engine.feed.most, ref_logps=kind == "beforehand")
    assert described(abstract) == described(batch)


def test_memory_is_what_lies_there() -> None:
    engine = tiny.engine_on((1, 8, 1))
    compiled = lowered.lower_step(
        engine.facts, engine.options, engine.tx, engine.mesh, engine.feed.shape, micro_batches=1, max_grad_norm=1.0
    ).compile()
    need = lowered.memory_of(compiled)
    state = engine.fresh_state()
    held = [state, engine.frozen(state), engine.to_devices(engine.batch_at(engine.plan.after(0)))]
    local = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(held))
    assert abs(need.arguments - local) < 8192  # count, knobs and key are there too, what the step does not read is not
    assert need.total >= need.arguments + need.temporary > need.arguments
    weights = sum(np.prod(x.shape) for x in jax.tree.leaves(engine.abstract_params)) * 4
    assert need.temporary > weights / 8  # a gradient at least


@pytest.mark.slow
def test_a_reference_that_was_precomputed_takes_no_memory() -> None:
    """Its weights are no argument of the step, and its activations and logits are not made: its forward pass is not in the program."""
    need, work = [], []
    for before in (False, True):
        engine = tiny.engine_on((1, 1, 1), kl_coef=0.0, precompute_ref_log_probs=before, gradient_checkpointing=False)
        lower = (engine.facts, engine.options, engine.tx, engine.mesh, engine.feed.shape)
        compiled = lowered.lower_step(*lower, micro_batches=1, max_grad_norm=1.0).compile()
        need.append(lowered.memory_of(compiled))
        work.append(compiled.cost_analysis()["flops"])
    weights = sum(np.prod(x.shape) for x in jax.tree.leaves(engine.abstract_params)) * 4
    with_it, without = need
    assert abs(with_it.arguments - without.arguments - weights) < 4096  # but for the sums, eight bytes a pair
    # A forward pass of the reference beside one of the policy and its backward, which is twice as much.
    assert 0.7 < work[1] / work[0] < 0.85


def test_a_topology_that_is_not_there_is_no_yes() -> None:
    ended = subprocess.run(
        [sys.executable, AOT, "--topology", "v0:1x1"], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("aot: no topology v0:1x1: ") and ended.stdout == ""
