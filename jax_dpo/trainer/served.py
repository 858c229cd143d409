"""What others will make of the result: known before a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from jax_dpo.config import DPOConfig
from jax_dpo.errors import named
from jax_dpo.models.lora import LoraConfig, LoraSpec

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""what vLLM's --max-lora-rank can be (vllm/config/lora.py)"""


def served_warnings(lora: LoraSpec | None, asked: LoraConfig | None, config: DPOConfig) -> list[str]:
    """Sentences on an adapter that vLLM refuses, or would serve as another one; `asked` is the configuration that `lora` came from.

    Its rules, with their source, are in docs/serving.md: no modules_to_save, no DoRA, one rank and one alpha for all layers.
    """
    if lora is None:
        return []
    final = f"{config.output_dir}/final"
    way_out = f"it serves the merged directory as it was trained: jax-dpo convert {final} {config.output_dir}/merged after the run"
    found = ["modules_to_save"] * bool(lora.saved) + ["DoRA"] * lora.use_dora
    if max(target.rank for target in lora.targets) > RANKS[-1]:
        found.append(f"a rank above {RANKS[-1]}")
    if found:
        return [named("adapter-not-served", f"vLLM does not load adapters with {' or '.join(found)}; {way_out}")]
    if asked is not None and _own_scales(lora, asked):
        return [
            named(
                "adapter-served-otherwise",
                "vLLM does not read rank_pattern and alpha_pattern: it would serve every layer of this adapter at the scale of "
                f"lora_alpha and r, another model than the one trained, without a word; {way_out}",
            )
        ]
    return []


def _own_scales(lora: LoraSpec, asked: LoraConfig) -> bool:
    """Whether any layer has another scale than the one that follows from `r` and `lora_alpha`."""
    usual = asked.lora_alpha / (math.sqrt(asked.r) if asked.use_rslora else asked.r)
    used = (scale for t in lora.targets for rank, scale in zip(t.ranks, t.scales) if rank)
    return any(not math.isclose(scale, usual) for scale in used)


def reader_notes(files: Mapping[str, bytes]) -> list[str]:
    """What older readers cannot do with the tokenizer's files, which leave a run as they came. `files` by name."""
    try:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
    except ValueError:
        return []
    if not isinstance(config, dict):
        return []
    why = []
    if isinstance(config.get("extra_special_tokens"), list):
        why.append("extra_special_tokens is a list")
    if config.get("tokenizer_class") in ("TokenizersBackend", "SentencePieceBackend"):
        why.append(f"tokenizer_class is {config['tokenizer_class']}")
    if not why:
        return []
    text = f"transformers 4 does not load this tokenizer, before the run or after it: {' and '.join(why)}, as transformers 5 writes it"
    return [named("tokenizer-not-for-transformers-4", text)]
