"""Which model is trained, which one it is held against, and how both lie on the devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_dpo.arrays import Tree, flatten, unflatten
from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig
from jax_dpo.models.decoder import cast_for_compute, stays_float32
from jax_dpo.models.lora import LoraConfig
from jax_dpo.policy import Policy, load_model
from jax_dpo.sharding.mesh import row_shards
from jax_dpo.sharding.place import from_reader
from jax_dpo.sharding.rules import check_heads, shardings
from jax_dpo.train.state import Facts, Frozen

# What stands for the reference: the policy's own start, the model under the adapter, the adapter as it was, or another model.
START, BASE, ADAPTER, OTHER = "start", "base", "adapter", "other"


@dataclass(frozen=True)
class Pairing:
    """Policy and reference. `other` is the reference's own model, where it has one."""

    policy: Policy
    kind: str
    other: Policy | None = None

    @property
    def reference(self) -> Policy:
        """The reference as a model: its leaves are all that its numbers depend on."""
        if self.kind == BASE:
            return self.policy.base()
        return self.other if self.other is not None else self.policy

    @property
    def same_start(self) -> bool:
        """Whether the reference is the policy's own start: then loss, margin and KL begin at their values for equal models."""
        if self.kind == BASE:
            lora = self.policy.config.lora
            if lora is not None and (lora.use_dora or lora.saved) and not self.policy.adapter_is_new:
                return False
            return all(not np.any(x.read()) for p, x in self.policy.leaves.items() if p.endswith(".lora_b"))
        return self.kind in (START, ADAPTER)

    @property
    def sentence(self) -> str:
        """The reference in words, for reports."""
        if self.kind == OTHER:
            assert self.other is not None
            return f"{self.other.title}, frozen"
        return {
            START: "the policy as it was at the start, frozen (a second copy)",
            BASE: "the model without its adapter (no second copy)",
            ADAPTER: "the model with its adapter as it was at the start, frozen (the base has no second copy)",
        }[self.kind]


def pair_models(model: Any, ref_model: Any, peft_config: Any, *, revision: str | None, seed: int) -> Pairing:
    """Opens policy and reference.

    An explicit `ref_model` always wins; `peft_config` gives a fresh adapter whose reference is the base; a policy that comes with an
    adapter is held against that adapter; else the policy's own start is the reference.

    Raises:
      UserError: what `load_model` raises; two vocabularies that differ; model and reference are one object; logits of one are capped and
        those of the other are not.
    """
    policy = load_model(model, revision=revision)
    kind = START if policy.config.lora is None else ADAPTER
    if peft_config is not None:
        policy = policy.with_new_adapter(LoraConfig.of(peft_config), seed)
        kind = BASE
    if ref_model is None:
        return Pairing(policy, kind)
    other = load_model(ref_model, revision=revision)
    if other.config.vocab_size != policy.config.vocab_size:
        raise UserError(
            "reference-vocabulary",
            f"The reference {other.files.path} has {other.config.vocab_size} tokens, the policy {policy.files.path} has "
            f"{policy.config.vocab_size}. Both must read the same token ids: give a reference with the policy's tokenizer.",
        )
    if other.config.logit_softcap != policy.config.logit_softcap:
        raise UserError(
            "reference-softcap",
            f"final_logit_softcapping is {other.config.logit_softcap} in the reference {other.files.path} and "
            f"{policy.config.logit_softcap} in the policy {policy.files.path}. Logits of both are made in one go and must be capped alike: "
            "give a reference of the policy's own family.",
        )
    if policy.config.lora is not None and other.config == policy.base().config and _same_files(other, policy):
        return Pairing(policy, BASE)
    return Pairing(policy, OTHER, other)


def _same_files(a: Policy, b: Policy) -> bool:
    return Path(a.files.path).resolve() == Path(b.files.path).resolve() and a.files.path.exists()


def facts_of(
    pairing: Pairing,
    mesh: Mesh,
    *,
    compute_dtype: str,
    remat: bool,
    attention: str,
    token_stats: str = "auto",
    dropout: bool,
    precomputed: bool = False,
) -> Facts:
    """The static facts of policy and reference on a mesh.

    Raises:
      UserError: the mesh would cut a key-value head.
    """
    policy = pairing.policy.config
    reference = policy
    if pairing.kind == BASE:
        reference = replace(policy, lora=None)
    elif pairing.kind == OTHER:
        assert pairing.other is not None
        reference = pairing.other.config
    for config in (policy, reference):
        check_heads(config.num_kv_heads, mesh)
    lora = policy.lora
    if lora is not None and lora.target("lm_head") is not None:
        raise UserError(
            "lora-head",
            "target_modules names lm_head, which carries no adapter in training (TRL refuses this too): logits are made from the whole "
            "matrix, piece by piece. Leave lm_head out of target_modules, or write modules_to_save: [lm_head] to train it whole.",
        )
    head = "model.embed_tokens.weight" if policy.tie_word_embeddings else "lm_head.weight"
    tensor = mesh.shape["tensor"]
    return Facts(
        policy=policy,
        reference=reference,
        reference_on_base=pairing.kind in (BASE, ADAPTER),
        shared_head=pairing.kind in (BASE, ADAPTER) and (lora is None or head not in lora.saved),
        compute_dtype=compute_dtype,
        remat=remat,
        attention=attention,
        token_stats=token_stats,
        row_shards=row_shards(mesh),
        vocabulary_shards=tensor if policy.vocab_size % tensor == 0 else 1,
        dropout=dropout and lora is not None and lora.dropout > 0,
        precomputed=precomputed,
    )


def router_coef(given: float | None, policy: ModelConfig) -> float:
    """The weight of the router's loss: as told, else the model's own; 0 for a model without a router.

    Raises:
      UserError: one is asked for and there is no router.
    """
    if policy.experts is not None:
        return policy.experts.aux_loss_coef if given is None else given
    if given:
        raise UserError(
            "router-missing",
            f"router_aux_loss_coef is {given}, but the model ({policy.model_type}) is no mixture of experts: it has no router whose "
            "choices could be balanced. Leave the option out.",
        )
    return 0.0


def place(leaves: dict[str, Any], mesh: Mesh, dtype: str) -> Tree:
    """Parameters onto the mesh, shard by shard from where they lie; norm weights stay float32."""
    places = flatten(shardings(unflatten(leaves), mesh))
    tree = {}
    for path, leaf in leaves.items():
        kind = jnp.dtype("float32" if stays_float32(path) else dtype)
        tree[path] = from_reader(tuple(leaf.shape), kind, leaf.read, places[path])
    return unflatten(tree)


def trained_leaves(policy: Policy) -> dict[str, Any]:
    """What is trained: the adapter where there is one, else everything."""
    lora = policy.config.lora
    return {p: x for p, x in policy.leaves.items() if lora is None or lora.trains(p)}


def check_sync(pairing: Pairing) -> None:
    """Raises UserError where the reference cannot move toward the policy: it must be a whole model of the policy's own shapes."""
    policy = pairing.policy
    if policy.config.lora is not None:
        raise UserError(
            "sync-ref-model-adapter",
            "sync_ref_model moves the reference's weights toward the policy's, but here an adapter is trained and the reference has the "
            "base without a copy (TRL refuses this too). Train all parameters (no peft_config, no adapter on the model), or set "
            "sync_ref_model to false.",
        )
    if pairing.other is None:
        return
    theirs = pairing.other.leaves
    for path in [*policy.leaves, *theirs]:
        mine, other = (tuple(leaves[path].shape) if path in leaves else None for leaves in (policy.leaves, theirs))
        if mine != other:
            raise UserError(
                "sync-ref-model-shapes",
                f"sync_ref_model mixes the weights of policy and reference, which must have the same shapes: {path} is {mine} in "
                f"{policy.title} and {other} in {pairing.other.title}. Give a reference of the policy's architecture, or set "
                "sync_ref_model to false.",
            )


def moving_reference(pairing: Pairing, params: Tree, mesh: Mesh) -> Tree:
    """The start of a reference that moves, in float32; `params` are the trained parameters at the start."""
    if pairing.other is not None:
        return place(pairing.other.leaves, mesh, "float32")
    return jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings(params, mesh))(params)


def base_tree(pairing: Pairing, mesh: Mesh, compute_dtype: str) -> Tree:
    """What a policy with an adapter stands on; empty in full training."""
    policy = pairing.policy
    if policy.config.lora is None:
        return {}
    return place(policy.base().leaves, mesh, compute_dtype)


def reference_tree(pairing: Pairing, mesh: Mesh, compute_dtype: str) -> Tree:
    """What the reference has of its own (`Frozen.reference`), read from where it came from."""
    if pairing.kind == BASE:
        return {}
    whose = pairing.reference
    return place(trained_leaves(whose) if pairing.kind == ADAPTER else whose.leaves, mesh, compute_dtype)


def reference_frozen(pairing: Pairing, mesh: Mesh, compute_dtype: str) -> Frozen:
    """All that a forward pass of the reference alone needs."""
    on_base = pairing.kind in (BASE, ADAPTER)
    base = base_tree(pairing, mesh, compute_dtype) if on_base else {}
    return Frozen(base, reference_tree(pairing, mesh, compute_dtype))


def frozen_of(pairing: Pairing, params: Tree, mesh: Mesh, compute_dtype: str, *, reference: bool = True) -> Frozen:
    """What the step holds beside the trained parameters, in the compute dtype: that is how it is used, and half the memory.

    Args:
      params: the trained parameters at the start; a reference that is their copy is made on the devices.
      reference: False leaves it out: it moves and is part of the train state, or its log-probabilities are there already.
    """
    base = base_tree(pairing, mesh, compute_dtype)
    if not reference or pairing.kind == BASE:
        return Frozen(base, {})
    if pairing.kind == OTHER:
        return Frozen(base, reference_tree(pairing, mesh, compute_dtype))
    copy = jax.jit(
        # A true copy: the parameters themselves are donated to the first step.
        lambda p: jax.tree.map(jnp.copy, cast_for_compute(p, jnp.dtype(compute_dtype))),
        out_shardings=shardings(params, mesh),
    )
    return Frozen(base, copy(params))


def run_start(pairing: Pairing, frozen: Frozen, mesh: Mesh, compute_dtype: str) -> Tree | None:
    """The trained parameters at the start of the run, where the reference's distribution is theirs; else None.

    Where the reference is their copy, that one; a fresh adapter's are read again. Empty where the reference moves with the state.
    """
    if not pairing.same_start:
        return None
    return (
        frozen.reference
        if pairing.kind in (START, ADAPTER)
        else place(trained_leaves(pairing.policy), mesh, compute_dtype)
    )


def parameter_count(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, trained parameters) of a model."""
    import math

    from jax_dpo.models.config import parameter_shapes

    sizes = {path: math.prod(shape) for path, shape in parameter_shapes(config).items()}
    lora, total = config.lora, sum(sizes.values())
    return total, total if lora is None else sum(n for path, n in sizes.items() if lora.trains(path))
