"""A tiny model, random pairs and the run's own `Engine` over any part of the virtual devices, without a file on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_dpo.arrays import flatten
from jax_dpo.config import DPOConfig
from jax_dpo.data.prepare import DataOptions, PreparedData
from jax_dpo.data.tokens import Facts, TokenizedPairs, TokenTable
from jax_dpo.models.config import ModelConfig, parameter_shapes
from jax_dpo.models.families import model_config
from jax_dpo.models.lora import LoraConfig
from jax_dpo.policy import Policy
from jax_dpo.sharding.mesh import make_mesh, row_shards
from jax_dpo.train.evaluate import evaluate
from jax_dpo.train.kl import ResponseKL
from jax_dpo.train.plan import Plan
from jax_dpo.train.state import Knobs
from jax_dpo.trainer.datasets import PairSet
from jax_dpo.trainer.engine import Engine
from jax_dpo.trainer.models import BASE, START, Pairing
from jax_dpo.weights.leaves import InMemory
from jax_dpo.weights.model_files import ModelFiles

VOCABULARY = 256
MESHES = [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)]


def shape_of(**changes: Any) -> ModelConfig:
    """A llama of 3 layers, hidden 64, 4 heads, 2 key-value heads."""
    attributes = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    return model_config({**attributes, **changes})


def gemma2() -> ModelConfig:
    """All that Gemma 2 has and llama has not, in two layers of the same sizes; both caps bite."""
    return replace(
        shape_of(num_hidden_layers=2, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"),
        layer_windows=(5, None),
        norms_after=True,
        norm_offset=1.0,
        attention_scale=0.3,
        attention_softcap=4.0,
        logit_softcap=6.0,
        embedding_scale=8.0,
    )


def mixtral(**changes: Any) -> ModelConfig:
    """Four experts, two of them for each token, in two layers of the sizes of `shape_of`."""
    wanted = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return shape_of(**{**wanted, **changes})


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by tree path; norms multiply by around 1, wide enough that no branch is idle."""
    flat = {}
    for i, (path, shape) in enumerate(parameter_shapes(config).items()):
        noise = np.random.default_rng([seed, i]).standard_normal(shape).astype(np.float32)
        flat[path] = 1 - config.norm_offset + 0.2 * noise if path.endswith("norm.weight") else 0.15 * noise
    return flat


def policy_of(config: ModelConfig, seed: int = 0) -> Policy:
    leaves = {path: InMemory(x) for path, x in weights_of(config, seed).items()}
    files = ModelFiles(Path("tiny"), {}, config, dict(leaves), "float32", None, dict)
    return Policy(files, dict(leaves), config)


def pairing_of(
    config: ModelConfig, *, lora: bool | Mapping[str, Any] = False, dropout: float = 0.0, seed: int = 0
) -> Pairing:
    """The policy held against its own start, or a fresh adapter held against its base; `lora` may say more of it."""
    policy = policy_of(config, seed)
    if not lora:
        return Pairing(policy, START)
    targets = ["q_proj", "o_proj"] + (["down_proj"] if config.experts is None else [])
    more = {} if lora is True else dict(lora)
    wanted = LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": dropout, "target_modules": targets, **more})
    return Pairing(policy.with_new_adapter(wanted, 0), BASE)


RICH: dict[str, Any] = {
    "use_dora": True,
    "use_rslora": True,
    "rank_pattern": {"o_proj": 2, "layers.1.self_attn.q_proj": 3},
    "layers_to_transform": [1, 2],
    "modules_to_save": ["lm_head", "embed_tokens", "norm"],
    "init_lora_weights": False,
}
"""An adapter with all that adapters have, B not 0 at the start."""


def pair_set(n: int, seed: int = 0, vocabulary: int = VOCABULARY, columns: Sequence[str] = ()) -> PairSet:
    """Random token ids: prompts of 3 to 20 tokens, answers of 2 to 24; and numbers of every pair, of which `columns` are read."""
    rng = np.random.default_rng([seed, n])
    lengths = np.stack([rng.integers(3, 21, n), rng.integers(2, 25, n), rng.integers(2, 25, n)], 1)
    bounds = np.concatenate([[0], np.cumsum(lengths.reshape(-1))]).astype(np.int64)
    rows = np.arange(n)
    table = TokenTable(
        ids=rng.integers(0, vocabulary, bounds[-1]).astype(np.int32),
        bounds=bounds,
        row=rows,
        number=rows + 1,
        file_of=np.zeros(n, np.int32),
        twin=rows,
        gap=np.full(n, np.nan),
        given=np.stack(
            [rng.uniform(low, high, n) for low, high in ((0.03, 0.3), (-0.5, 1), (0, 1), (0, 2), (-9, 0), (-9, 0))], 1
        ),
        scored=np.zeros(0, np.uint8),
        flags=np.zeros(n, np.uint8),
        facts=Facts(n, True, False),
    )
    prepared = PreparedData("tiny", DataOptions(columns=tuple(columns)), TokenizedPairs(table, rows), [], {}, [], False)
    return PairSet(prepared, share_prompt=True)


@dataclass
class Trajectory:
    """What a few steps left behind: the sums of every step, the metrics of an evaluation before the first, the weights at the end."""

    losses: list[float]
    norms: list[float]
    sums: list[dict[str, float]]
    evaluation: dict[str, float]
    weights: dict[str, np.ndarray]
    micro_batches: list[int]
    accepted: list[tuple[float, float]] = field(default_factory=list)
    """scale and KL of the probe set of every step, with a trust region"""
    responses: list[ResponseKL] = field(default_factory=list)
    """the KL of every step's responses"""


def engine_on(
    mesh: tuple[int, int, int],
    *,
    pairs_per_step: int = 16,
    train: int = 64,
    held_out: int = 12,
    steps: int = 4,
    lora: bool | Mapping[str, Any] = False,
    dropout: float = 0.0,
    shape: ModelConfig | None = None,
    micro_batch: int | None = None,
    **options: Any,
) -> Engine:
    """The engine of a run over the first devices; the global batch is the same on every mesh.

    `micro_batch`: pairs of one of TRL's micro-batches; None: a step is one micro-batch on each device.
    """
    devices = jax.devices()[: int(np.prod(mesh))]
    grid = make_mesh(*mesh, devices=devices)
    per_device = micro_batch or pairs_per_step // row_shards(grid)
    chosen: dict[str, Any] = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": per_device,
        "weight_decay": 0.1,
        "gradient_checkpointing": True,
        "bf16": False,
        "kl_coef": 1.0,
        "mesh_data": mesh[0],
        "mesh_fsdp": mesh[1],
        "mesh_tensor": mesh[2],
    }
    config = DPOConfig("unused", **{**chosen, **options})
    moves = config.ref_model_sync_steps if config.sync_ref_model else 0
    plan = Plan(train, per_device, pairs_per_step // per_device, steps, 1, 1, 0, sync_steps=moves)
    pairing = pairing_of(shape or shape_of(), lora=lora, dropout=dropout)
    columns = config.pair_columns
    sets = pair_set(train, columns=columns), pair_set(held_out, seed=1, columns=columns)
    engine = Engine(config, pairing, sets[0], {None: sets[1]}, plan)
    engine.__dict__["mesh"] = grid  # a part of the devices, where the run itself takes all
    return engine


def knobs_of(engine: Engine, rate: float = 1e-3, beta: float = 0.1) -> Knobs:
    return Knobs(jnp.float32(rate), jnp.float32(beta), jnp.float32(engine.config.kl_coef))


def run(engine: Engine, steps: int = 4) -> Trajectory:
    """An evaluation, then `steps` optimizer steps."""
    state = engine.fresh_state()
    frozen = engine.frozen(state)
    assert engine.plan is not None
    found = Trajectory([], [], [], {}, {}, [])
    held_out = engine.held_out(None, engine.eval_sets[None])
    held = engine.against(state, frozen)
    if engine.config.kl_trust_region:
        probe = engine.probe(engine.eval_sets[None], held)
        frozen = frozen._replace(probe=probe._replace(limit=jnp.float32(engine.config.target_kl)))
    found.evaluation = evaluate(engine.evaluator, held_out, state.params, held, knobs_of(engine), engine.options)
    for k in range(steps):
        batch = engine.batch_at(engine.plan.after(k))
        arrays = engine.to_devices(batch)
        state, results = engine.step(
            state, frozen, arrays, jnp.int32(batch.micro_batches), knobs_of(engine), jax.random.key(k)
        )
        if engine.sync is not None and engine.plan.syncs_at(k + 1):
            state = engine.sync(state)
        assert bool(results["finite"])
        found.sums.append({name: float(x) for name, x in results["sums"]._asdict().items()})
        found.losses.append(found.sums[-1]["loss"])
        found.responses.append(ResponseKL())
        if results["responses"] is not None:
            found.responses[-1].add(jax.device_get(results["responses"]))
        found.norms.append(float(results["grad_norm"]))
        found.micro_batches.append(batch.micro_batches)
        if results["accepted"] is not None:
            found.accepted.append((float(results["accepted"].scale), float(results["accepted"].kl)))
    found.weights = {path: np.asarray(x) for path, x in flatten(state.params).items()}
    return found
