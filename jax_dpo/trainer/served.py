"""What others will make of the result: known before a run."""

from __future__ import annotations

from jax_dpo.config import DPOConfig
from jax_dpo.models.lora import LoraSpec


def served_warnings(lora: LoraSpec | None, config: DPOConfig) -> list[str]:
    """Sentences on an adapter that a server refuses.

    vLLM's rules are those of `PEFTHelper` (vllm/lora/peft_helper.py): no modules_to_save, no DoRA.
    """
    if lora is None:
        return []
    found = ["modules_to_save"] * bool(lora.saved) + ["DoRA"] * lora.use_dora
    if not found:
        return []
    final = f"{config.output_dir}/final"
    return [
        f"vLLM does not load adapters with {' or '.join(found)}; a merged directory it does: jax-dpo convert {final} "
        f"{config.output_dir}/merged after the run"
    ]
