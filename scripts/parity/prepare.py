"""Makes all inputs of a comparison out of one seed: texts, tokenizers, models, adapters, GGUF files."""

from __future__ import annotations

from pathlib import Path

from scripts.parity import ggufs, models, texts
from scripts.parity.common import Inputs

TOKENIZER = "turns"  # that of every model


def write_inputs(folder: Path, seed: int) -> Inputs:
    """Fills an empty `folder` and returns what is in it. Needs torch: transformers and PEFT write their own files."""
    inputs = Inputs(folder)
    texts.write_texts(folder / "texts", seed)
    texts.write_tokenizers(folder / "tokenizers", seed, models.VOCABULARY)
    tokenizer = Path(inputs.tokenizer(TOKENIZER))
    for name in models.SHAPES:
        models.write_model(Path(inputs.model(name)), name, seed, tokenizer)
    moved = Path(inputs.model("llama_moved"))
    models.write_model(moved, "llama", seed + 1, tokenizer, moved_from=Path(inputs.model("llama")))
    for name, (base, options) in models.ADAPTERS.items():
        models.write_adapter(Path(inputs.adapter(name)), Path(inputs.model(base)), seed, options)
    (folder / "ggufs").mkdir()
    for kind in (*ggufs.PLAIN, *ggufs.BLOCKS):
        wide = "llama_wide" if kind in ggufs.BLOCKS else "llama"
        ggufs.write_gguf(Path(inputs.model(f"{kind}.gguf")), Path(inputs.model(wide)), kind, seed)
    return inputs
