"""Held-out prompts answered by the reference and by the policy, side by side."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp

from jax_dpo.arrays import Tree, overlay
from jax_dpo.data.tokens import TokenizedPairs
from jax_dpo.models.config import ModelConfig
from jax_dpo.models.decoder import cast_for_compute
from jax_dpo.models.generate import generate
from jax_dpo.policy import Policy
from jax_dpo.sharding.mesh import replicated
from jax_dpo.train.state import Frozen, TrainState
from jax_dpo.trainer.run import Run
from jax_dpo.weights.tokenizer_changes import stops_of

NEW_TOKENS = 64
TEMPERATURE, TOP_P = 0.7, 0.95


def stop_ids_of(policy: Policy, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of generation_config.json and config.json."""
    files = policy.files
    sources = ({"eos_token_id": tokenizer.eos_token_id}, files.hf_config, json.loads(files.generation_config or b"{}"))
    return sorted({i for source in sources for i in stops_of(source)})


def distinct_prompts(pairs: TokenizedPairs, wanted: int) -> list[list[int]]:
    """The first `wanted` different prompts that have tokens, or all where there are fewer."""
    distinct: dict[tuple[int, ...], None] = {}
    for i in range(len(pairs)):
        if len(distinct) == wanted:
            break
        prompt = tuple(int(t) for t in pairs.tree(i).chosen_prompt)
        if prompt:
            distinct[prompt] = None
    return [list(p) for p in distinct]


def whole_policy(run: Run, params: Tree, frozen: Frozen) -> Tree:
    """The policy's parameters in the compute dtype, on every device."""
    cast = cast_for_compute(params, jnp.dtype(run.engine.dtype))
    return jax.device_put(overlay(frozen.base, cast), replicated(run.engine.mesh))


def _answers(run: Run, config: ModelConfig, params: Any, prompts: list[list[int]]) -> list[str]:
    tokenizer = run.tokenizer.loaded
    ids = generate(
        config,
        params,
        prompts,
        max_new_tokens=NEW_TOKENS,
        stop_ids=stop_ids_of(run.pairing.policy, tokenizer),
        temperature=TEMPERATURE,
        top_p=TOP_P,
        seed=run.args.seed,
    )
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ids]


def answer_samples(run: Run, state: TrainState, frozen: Frozen, step: int) -> dict[str, Any]:
    """A `samples` record: the first held-out prompts (or those of training, where nothing is held out), the same seed for both."""
    run.display.busy("answering sample prompts")
    sets = list(run.eval_sets.values()) or ([run.train_set] if run.train_set is not None else [])
    prompts = distinct_prompts(sets[0].pairs, run.args.generate_samples)
    facts, dtype = run.engine.facts, jnp.dtype(run.engine.dtype)
    own = cast_for_compute(frozen.reference, dtype)
    reference = overlay(frozen.base, own) if facts.reference_on_base else own
    before = _answers(run, facts.reference, jax.device_put(reference, replicated(run.engine.mesh)), prompts)
    after = _answers(run, facts.policy, whole_policy(run, state.params, frozen), prompts)
    tokenizer = run.tokenizer.loaded
    shown = [tokenizer.decode(p, skip_special_tokens=True).strip() for p in prompts]
    samples = [{"prompt": p, "reference": b, "policy": a} for p, b, a in zip(shown, before, after)]
    title = f"answers sampled at temperature {TEMPERATURE}, top-p {TOP_P}, the same seed for both"
    return {"kind": "samples", "step": step, "title": title, "samples": samples}
