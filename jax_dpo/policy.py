"""A model in hand: opened, run on ordinary sequences, given an adapter, written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.arrays import Tree, unflatten
from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig
from jax_dpo.models.lora import LoraConfig
from jax_dpo.weights.export import write_model
from jax_dpo.weights.grow import TABLES, grow
from jax_dpo.weights.hub import name_of
from jax_dpo.weights.leaves import InMemory, Leaf
from jax_dpo.weights.objects import is_model_object, object_adapter, open_object
from jax_dpo.weights.peft import Adapter, adapter_base, new_adapter, read_adapter, rows_of_adapter, write_adapter
from jax_dpo.weights.peft import merge as merge_adapter
from jax_dpo.weights.source import ModelFiles, open_model, resolve_model
from jax_dpo.weights.tokenizer_files import read_tokenizer_files

COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Policy:
    """A causal language model, with or without a LoRA adapter on it.

    `leaves` are all parameters by tree path, the adapter's among them, read only when asked for. `dtype` is what it computes in.
    """

    files: ModelFiles
    leaves: dict[str, Leaf]
    config: ModelConfig
    dtype: str = "float32"
    lora_config: LoraConfig | None = None
    adapter: str | None = None
    """where its adapter came from, if it came with one"""
    adapter_is_new: bool = False
    """whether its adapter was made just now and has never been trained"""

    @cached_property
    def params(self) -> Tree:
        """The parameter tree on the default device, in the compute dtype."""
        import jax.numpy as jnp

        from jax_dpo.models.decoder import cast_for_compute

        return cast_for_compute(
            unflatten({p: jnp.asarray(x.read()) for p, x in self.leaves.items()}), jnp.dtype(self.dtype)
        )

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> Any:
        """Logits [B, T, V] float32 of token ids [B, T]; `attention_mask` [B, T] is 1 on real tokens, padding left or right."""
        import jax.numpy as jnp

        from jax_dpo.models.decoder import precision

        ids = jnp.asarray(np.asarray(input_ids), jnp.int32)
        mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(np.asarray(attention_mask), jnp.int32)
        with precision(self.dtype):
            return _jitted_logits()(self.config, self.params, ids, mask)

    @property
    def name(self) -> str:
        """What the model is called: the end of its path."""
        return self.files.path.name or str(self.files.path)

    @property
    def title(self) -> str:
        """Where it came from, in words."""
        return f"{self.files.path} with the adapter {self.adapter}" if self.adapter else str(self.files.path)

    def with_adapter(self, adapter: Adapter) -> Policy:
        """The same model with an adapter on it.

        Raises:
          UserError: it has one already.
        """
        self._check_no_adapter()
        leaves = {**self.leaves, **{path: InMemory(x) for path, x in adapter.arrays.items()}}
        return replace(self, leaves=leaves, config=replace(self.config, lora=adapter.spec), lora_config=adapter.config)

    def with_new_adapter(self, config: LoraConfig, seed: int) -> Policy:
        """The same model with a fresh adapter, which changes nothing yet.

        Raises:
          UserError: it has one already; `config` does not fit the model.
        """
        self._check_no_adapter()
        return replace(self.with_adapter(new_adapter(config, self.config, seed, self.leaves)), adapter_is_new=True)

    def _check_no_adapter(self) -> None:
        if self.config.lora is not None:
            raise UserError(
                "adapter-twice",
                f"{self.files.path} has an adapter already, and peft_config asks for a second one. "
                "Give the model without its adapter, or leave peft_config out to train the one that is there.",
            )

    def with_rows(self, rows: int) -> Policy:
        """The same model with at least `rows` rows for tokens, see `weights.grow`; an adapter on it stays as it is."""
        if rows <= self.config.vocab_size:
            return self
        files = grow(self.files, rows)
        tables = {path: files.leaves[path] for path in TABLES if path in files.leaves}
        config = replace(self.config, vocab_size=files.config.vocab_size)
        return replace(self, files=files, leaves={**self.leaves, **tables}, config=config)

    def base(self) -> Policy:
        """The model without its adapter."""
        lora = self.config.lora
        kept = {p: x for p, x in self.leaves.items() if lora is None or not lora.trains(p)}
        leaves = {**kept, **{p: self.files.leaves[p] for p in (lora.saved if lora else ())}}
        return replace(
            self,
            leaves=leaves,
            config=replace(self.config, lora=None),
            lora_config=None,
            adapter=None,
            adapter_is_new=False,
        )


@cache
def _jitted_logits() -> Any:
    import jax

    from jax_dpo.models import decoder

    return jax.jit(decoder.logits, static_argnums=0)


def load_model(
    model: Any, adapter: str | Path | None = None, dtype: str = "float32", *, revision: str | None = None
) -> Policy:
    """A model from a Hugging Face directory (sharded or not), a GGUF file, a Hub name, or a transformers model object, with the
    adapter that PEFT has put on it.

    A PEFT directory is loaded as transformers does: the base that its adapter_config.json names, with the adapter on.

    Args:
      adapter: a PEFT directory: the policy is the model with that adapter on.
      dtype: what it computes in, "float32" or "bfloat16".

    Raises:
      UserError: anything about the files that cannot be used, by name, before a weight is read.
    """
    if dtype not in COMPUTE_DTYPES:
        raise UserError("dtype-unknown", f"dtype is {dtype!r}; a model computes in {' or '.join(COMPUTE_DTYPES)}.")
    there: Adapter | None = None
    if isinstance(model, Policy):
        policy = replace(model, dtype=dtype)
    else:
        if is_model_object(model):
            files = open_object(model)
            there = object_adapter(model, files.config)
        else:
            path = resolve_model(model, revision)
            base = adapter_base(path) if adapter is None else None
            files = open_model(path if base is None else resolve_model(base))
            adapter = adapter if base is None else path
        policy = Policy(files, dict(files.leaves), files.config, dtype)
        if there is not None:
            policy = replace(policy.with_adapter(there), adapter=f"{type(model).__name__} in memory")
    if adapter is None:
        return policy
    policy = _with_files_of(policy, Path(adapter)).with_rows(rows_of_adapter(Path(adapter)))
    return replace(policy.with_adapter(read_adapter(adapter, policy.config)), adapter=str(adapter))


def _with_files_of(policy: Policy, adapter: Path) -> Policy:
    """The tokenizer and generation_config.json that lie beside an adapter go with it: it was trained with them."""
    files = policy.files
    if any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        files = replace(files, read_tokenizer=partial(read_tokenizer_files, adapter))
    generation = adapter / "generation_config.json"
    if generation.is_file():
        files = replace(files, generation_config=generation.read_bytes(), altered=True)
    return replace(policy, files=files)


def save_model(
    model: Policy,
    out: str | Path,
    dtype: str = "auto",
    *,
    merge: bool = False,
    arrays: Mapping[str, Any] | None = None,
    tokenizer_files: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> Path:
    """Writes a directory that transformers and vLLM load: full weights, or a PEFT adapter for a model with an adapter on it.

    Args:
      dtype: "float32", "bfloat16", "float16", or "auto" for that of the weights that came in.
      merge: writes full weights with the adapter added.
      arrays: trained values by tree path, in place of the model's own.
      tokenizer_files: in place of those that came with the model.
      replace: the directory is exchanged as a whole, so that nothing of an earlier save stays.

    Raises:
      UserError: no space, no permission, a file in the way.
    """
    leaves = {**model.leaves, **(arrays or {})}
    files = model.files.tokenizer_files() if tokenizer_files is None else tokenizer_files
    spec = model.config.lora
    if spec is not None:
        adapter = {p: x.read() if hasattr(x, "read") else x for p, x in leaves.items() if spec.trains(p)}
        if not merge:
            if model.files.altered and model.files.generation_config is not None:
                files = {**files, "generation_config.json": model.files.generation_config}
            assert model.lora_config is not None
            return write_adapter(
                out,
                model=model.config,
                arrays=adapter,
                base=name_of(model.files.path),
                config=model.lora_config,
                tokenizer_files=files,
                replace=replace,
            )
        leaves = merge_adapter(leaves, adapter, spec)
    return write_model(
        out,
        hf_config=model.files.hf_config,
        arrays=leaves,
        dtype=model.files.dtype if dtype == "auto" else dtype,
        tokenizer_files=files,
        generation_config=model.files.generation_config,
        replace=replace,
    )


def convert(source: str | Path, out: str | Path, dtype: str = "auto") -> Path:
    """Writes any model that can be loaded as a Hugging Face directory of full weights; an adapter is merged into its base.

    Raises UserError: what `load_model` and `save_model` raise.
    """
    return save_model(load_model(source), out, dtype, merge=True)
