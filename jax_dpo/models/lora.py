"""Low-rank adapters: which linear layers carry one, and how strongly it counts."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
