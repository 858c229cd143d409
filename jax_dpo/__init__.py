"""Direct Preference Optimization in JAX, under TRL's names: `from jax_dpo import DPOConfig, DPOTrainer`.

Names are imported when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_dpo.config import DPOConfig
    from jax_dpo.models.lora import LoraConfig
    from jax_dpo.policy import load_model, save_model
    from jax_dpo.trainer import DPOTrainer

    __version__: str

# Public name -> the module that defines it.
_PUBLIC = {
    "DPOConfig": "jax_dpo.config",
    "DPOTrainer": "jax_dpo.trainer",
    "LoraConfig": "jax_dpo.models.lora",
    "load_model": "jax_dpo.policy",
    "save_model": "jax_dpo.policy",
}

__all__ = ["DPOConfig", "DPOTrainer", "LoraConfig", "__version__", "load_model", "save_model"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("jax-dpo")
    elif name in _PUBLIC:
        from importlib import import_module

        value = getattr(import_module(_PUBLIC[name]), name)
    else:
        raise AttributeError(f"module 'jax_dpo' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
