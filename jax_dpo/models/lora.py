"""Low-rank adapters: which linear layers carry one, and how strongly it counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from jax_dpo.errors import UserError


@dataclass(frozen=True)
class LoraSpec:
    """The static facts of an adapter (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732).

    `targets` are dotted paths of linear layers in the parameter tree, such as `model.layers.self_attn.q_proj`;
    a target inside `model.layers` is adapted in every layer.
    """

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor of B A x: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass
class LoraConfig:
    """The adapter that a user asks for: PEFT's names and defaults (PEFT 0.21).

    `target_modules` is a list of names (`q_proj`, or more of the path), "all-linear", a regular expression for whole module
    paths, or None for PEFT's choice for the family. What PEFT has beyond `r`, `lora_alpha`, `lora_dropout`,
    `target_modules`, `use_rslora` and `init_lora_weights` (True or "gaussian") is accepted at its default only: see `check`.
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
        found.pop("runtime_config", None)  # how PEFT runs, not what the adapter is
        known = {f.name for f in fields(cls)}
        values = {}
        for name, value in found.items():
            plain = _plain(value)
            if name in known:
                values[name] = plain
            elif plain not in _EMPTY and not name.startswith("_"):
                raise _unsupported(name, plain)
        return cls(**values)

    @classmethod
    def from_spec(cls, spec: LoraSpec) -> LoraConfig:
        """The config that gives this spec back, its targets named by the last part of their paths."""
        alpha = int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha
        return cls(
            r=spec.r,
            lora_alpha=alpha,
            lora_dropout=spec.dropout,
            target_modules=[path.rpartition(".")[2] for path in spec.targets],
            use_rslora=spec.use_rslora,
            task_type="CAUSAL_LM",
        )

    def check(self, trained: bool = False) -> None:
        """Raise UserError for a value that is wrong (lora-option-invalid) or not supported (lora-option-unsupported).

        `trained`: the adapter exists already, so that how it was first filled no longer matters.
        """
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise _invalid("r", self.r, "a whole number above 0")
        if isinstance(self.lora_alpha, bool) or not isinstance(self.lora_alpha, (int, float)) or self.lora_alpha <= 0:
            raise _invalid("lora_alpha", self.lora_alpha, "a number above 0")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise _invalid("lora_dropout", self.lora_dropout, "a number from 0 to below 1")
        if self.task_type not in (None, "CAUSAL_LM"):
            raise _unsupported("task_type", self.task_type)
        starts = (True, "gaussian", False) if trained else (True, "gaussian")
        if self.init_lora_weights not in starts:
            # pissa, olora and others change the base weights as well, so that the adapter alone means nothing.
            raise _unsupported("init_lora_weights", self.init_lora_weights)
        default = LoraConfig()
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in _USED and value not in _EMPTY and value != getattr(default, f.name):
                raise _unsupported(f.name, value)


_EMPTY: tuple[Any, ...] = (None, False, [], {}, (), "")
# Fields whose value is used, or that describe the file and not the adapter.
_USED = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "use_rslora",
        "init_lora_weights",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
    }
)


def _plain(value: Any) -> Any:
    """Enumerations as their value, sets as sorted lists."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", value)


def _invalid(name: str, value: Any, expected: str) -> UserError:
    return UserError("lora-option-invalid", f"LoraConfig: {name} is {value!r}; expected {expected}.")


def _unsupported(name: str, value: Any) -> UserError:
    return UserError(
        "lora-option-unsupported",
        f"LoraConfig: {name} = {value!r} is not supported here; an adapter with it would be trained or read wrongly.",
    )
