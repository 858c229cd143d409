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

# Names of TRL that scripts import beside these -> what to do instead.
_NOT_HERE = {
    "ScriptArguments": "the command line has them: `jax-dpo train --dataset_name ...`",
    "ModelConfig": "the command line has them: `jax-dpo train --model_name_or_path ...`",
    "DatasetMixtureConfig": "the command line has it: `datasets` in the YAML file",
    "TrlParser": "`jax-dpo train CONFIG.yaml --option value` reads YAML files and options, as `trl dpo` does",
    "get_dataset": "pass the data set, its name or its file to DPOTrainer(train_dataset=...)",
    "get_peft_config": "pass peft_config=LoraConfig(...) to DPOTrainer",
    "get_quantization_config": "weights are trained in float32 or bfloat16; load an unquantised model",
    "get_kbit_device_map": "devices are laid out by mesh_data, mesh_fsdp and mesh_tensor in DPOConfig",
    "create_reference_model": "leave ref_model out: the policy's start is the reference",
    "LogCompletionsCallback": "write generate_samples in DPOConfig",
    "SyncRefModelCallback": "write sync_ref_model in DPOConfig",
}

__all__ = ["DPOConfig", "DPOTrainer", "LoraConfig", "__version__", "load_model", "save_model"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("jax-dpo")
    elif name in _PUBLIC:
        from importlib import import_module

        value = getattr(import_module(_PUBLIC[name]), name)
    elif name in _NOT_HERE:
        raise ImportError(f"jax_dpo has no {name}: {_NOT_HERE[name]}")
    else:
        raise AttributeError(f"module 'jax_dpo' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
