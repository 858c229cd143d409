"""Low-rank adapters: which linear layers carry one, and how strongly it counts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from jax_dpo.errors import UserError

LEAVES = ("lora_a", "lora_b", "lora_magnitude")
"""What an adapter adds to the parameters of a linear layer; the magnitude with DoRA alone."""


@dataclass(frozen=True)
class LoraTarget:
    """A linear layer that carries an adapter, by its dotted path in the parameter tree, such as `model.layers.self_attn.q_proj`.

    `ranks` and `scales` have one entry for each layer that the path stacks (one in all outside the layers); rank 0: that layer has no
    adapter. In the tree all layers have the largest rank: rows of A and columns of B beyond a layer's own are 0, and stay 0, since the
    gradient of each is a product with the other.
    """

    path: str
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def rank(self) -> int:
        return max(self.ranks)

    @property
    def scale(self) -> float | None:
        """The factor of B A x: alpha / r, or alpha / sqrt(r) with rsLoRA; None where layers differ."""
        return self.scales[0] if len(set(self.scales)) == 1 else None


@dataclass(frozen=True)
class LoraSpec:
    """The static facts of an adapter (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353).

    `saved` are the paths of leaves of the model itself that are trained as well and kept with the adapter (PEFT's modules_to_save).
    """

    targets: tuple[LoraTarget, ...]
    dropout: float
    use_dora: bool = False
    saved: tuple[str, ...] = ()

    def target(self, path: str) -> LoraTarget | None:
        """The adapter on the linear layer at `path`, if it has one."""
        return next((t for t in self.targets if t.path == path), None)

    def trains(self, leaf: str) -> bool:
        """Whether the leaf at this path belongs to the adapter: its factors, and the copies that are trained whole."""
        return leaf.rpartition(".")[2] in LEAVES or leaf in self.saved


@dataclass
class LoraConfig:
    """The adapter that a user asks for: PEFT's names and defaults (PEFT 0.21).

    `target_modules` is a list of names (`q_proj`, or more of the path), "all-linear", a regular expression for whole module
    paths, or None for PEFT's choice for the family; `exclude_modules` likewise. `layers_to_transform`, `rank_pattern` and
    `alpha_pattern` make layers differ, `use_dora` trains the length of each row of the weights too, `modules_to_save` are trained whole.
    What else PEFT has is accepted at its default only, and refused with a reason: see `check`.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    use_dora: bool = False
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    layer_replication: list[tuple[int, int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    arrow_config: Any = None
    ensure_weight_tying: bool = False
    kasa_config: Any = None
    lora_ga_config: Any = None
    monteclora_config: Any = None
    use_bdlora: Any = None
    velora_config: Any = None
    task_type: str | None = None
    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    @classmethod
    def of(cls, given: Any) -> LoraConfig:
        """A `LoraConfig` out of one, out of the dict of an adapter_config.json, or out of a `peft.LoraConfig` object.

        A field that this class does not have is dropped if it is empty, and refused by name if it says something.
        Raises UserError lora-option-unsupported.
        """
        if isinstance(given, LoraConfig):
            return given
        found = dict(given) if isinstance(given, Mapping) else dict(vars(given))
        # How PEFT runs, and what it notes of a model that ties its embedding: not what the adapter is.
        for name in ("runtime_config", "modules_to_tie", "target_modules_to_tie"):
            found.pop(name, None)
        known = {f.name for f in fields(cls)}
        values = {}
        for name, value in found.items():
            plain = _plain(value)
            if name in known:
                values[name] = plain
            elif plain not in _EMPTY and not name.startswith("_"):
                raise _unsupported(name, plain)
        return cls(**values)

    def check(self) -> None:
        """Raise UserError for a value that is wrong (lora-option-invalid) or not supported (lora-option-unsupported)."""
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise _invalid("r", self.r, "a whole number above 0")
        if isinstance(self.lora_alpha, bool) or not isinstance(self.lora_alpha, (int, float)) or self.lora_alpha <= 0:
            raise _invalid("lora_alpha", self.lora_alpha, "a number above 0")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise _invalid("lora_dropout", self.lora_dropout, "a number from 0 to below 1")
        if self.task_type not in (None, "CAUSAL_LM"):
            raise _unsupported("task_type", self.task_type)
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise _unsupported("init_lora_weights", self.init_lora_weights)
        self._check_layers()
        default = LoraConfig()
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in _USED and value not in _EMPTY and value != getattr(default, f.name):
                raise _unsupported(f.name, value)

    def _check_layers(self) -> None:
        """What says which layers are meant, and how they differ."""
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise _invalid(
                "layers_to_transform",
                self.layers_to_transform,
                "target_modules as a list of names beside it (a regular expression says itself which layers are meant)",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise _invalid("layers_pattern", self.layers_pattern, "layers_to_transform beside it")
        for name, kinds in (("rank_pattern", int), ("alpha_pattern", (int, float))):
            for pattern, value in (getattr(self, name) or {}).items():
                if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
                    raise _invalid(name, {pattern: value}, "a module's name or pattern with a number above 0")
                if not _compiles(pattern):
                    raise _invalid(name, {pattern: value}, "a name or a regular expression")


_EMPTY: tuple[Any, ...] = (None, False, [], {}, (), "")
# Fields whose value is used, or that describe the file and not the adapter.
_USED = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "ensure_weight_tying",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
    }
)
_CHANGES_BASE = (
    "it changes the base weights as well, so that the adapter alone means nothing and the reference would not be the model that was "
    "given. Use true or gaussian, or begin with PEFT, save the changed base and the adapter, and train that adapter on that base"
)
_WHY = {
    "task_type": "only language models are trained here: leave it out or write CAUSAL_LM",
    "init_lora_weights": _CHANGES_BASE,
    "loftq_config": _CHANGES_BASE,
    "eva_config": "it belongs to init_lora_weights eva, which is not supported: use true or gaussian",
    "corda_config": _CHANGES_BASE,
    "lora_ga_config": _CHANGES_BASE,
    "bias": "the biases of the model would be trained, also in the reference, which reads the same ones: leave it at none",
    "lora_bias": "leave it out, or raise r; a bias per adapter is not computed here",
    "fan_in_fan_out": "all linear layers here are stored as [out, in]: leave it out (PEFT sets it to false for them)",
    "target_parameters": "adapters on stacked parameters, such as the experts of a mixture, are not computed here: name linear layers in "
    "target_modules",
    "trainable_token_indices": "single rows of the embedding are not trained here: write modules_to_save: [embed_tokens], which trains "
    "all of them",
    "layer_replication": "the model is trained with the layers that it has: make the deeper model first",
    "megatron_config": "sharding comes from mesh_fsdp and mesh_tensor: leave it out",
    "alora_invocation_tokens": "the adapter acts on all tokens here: leave it out",
    "peft_type": "only LORA adapters are read and trained",
}


def _compiles(pattern: Any) -> bool:
    try:
        re.compile(pattern)
    except (re.error, TypeError):
        return False
    return True


def _plain(value: Any) -> Any:
    """Enumerations as their value, sets as sorted lists."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", value)


def _invalid(name: str, value: Any, expected: str) -> UserError:
    return UserError("lora-option-invalid", f"LoraConfig: {name} is {value!r}; expected {expected}.")


def _unsupported(name: str, value: Any) -> UserError:
    why = _WHY.get(name, "an adapter with it would be trained or read wrongly: leave it out")
    return UserError("lora-option-unsupported", f"LoraConfig: {name} = {value!r} is not supported here; {why}.")
