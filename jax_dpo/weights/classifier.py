"""Reward models: what transformers' AutoModelForSequenceClassification writes with one label, of the families that can be trained.

Beside the decoder's tensors there is `score.weight` [1, D]; the value of a sequence is its product with the last hidden state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jax_dpo.errors import UserError
from jax_dpo.models.families import FAMILIES, model_config
from jax_dpo.weights.huggingface import ADAPTER_FILES, find_tensors, model_files, read_config
from jax_dpo.weights.leaves import Leaf
from jax_dpo.weights.model_files import ModelFiles

HEAD = "score.weight"


class Classifier(NamedTuple):
    """A reward model on disk. `files` are those of its decoder, without an unembedding; `score` is [1, D].

    `pad_id` is the token that does not count as a sequence's last; None where every token counts.
    """

    files: ModelFiles
    score: Leaf
    pad_id: int | None


def open_classifier(path: Path) -> Classifier:
    """Opens a Hugging Face directory with a sequence classifier of one label.

    Raises UserError: reward-model-kind (a language model, several labels, no head), and what `open_model` raises.
    """
    if not path.is_dir():
        raise UserError("model-missing", f"There is no reward model at {path}: no such directory.")
    adapters = [name for name in ADAPTER_FILES if (path / name).exists()]
    if adapters:
        raise UserError(
            "reward-model-kind",
            f"{path} holds an adapter ({adapters[0]}), not a whole reward model. Merge it into its base (merge_and_unload of peft, then "
            "save_pretrained, and the tokenizer's files beside it) and give that directory.",
        )
    hf = read_config(path)
    named, architecture = hf.get("architectures"), _architecture(hf)
    if named and architecture and named != [architecture]:
        raise UserError(
            "reward-model-kind",
            f"{path / 'config.json'}: architectures is {named!r}; a reward model of model_type {hf['model_type']!r} is [{architecture!r}], "
            "as AutoModelForSequenceClassification of transformers writes it with num_labels 1.",
        )
    # The head of a language model is not there; a decoder without one is what "tied" describes.
    config = model_config({**_without_head(hf), "tie_word_embeddings": True}, str(path / "config.json"))
    tensors, where = find_tensors(path)
    tensors.pop("lm_head.weight", None)
    score = tensors.pop(HEAD, None)
    if score is None or score.shape != (1, config.hidden_size):
        found = "there is none" if score is None else f"it is {list(score.shape)}"
        raise UserError(
            "reward-model-kind",
            f"{path}: a reward model gives one number an answer, by {HEAD} of shape [1, {config.hidden_size}]; {found}. Give a directory "
            "that AutoModelForSequenceClassification of transformers has written with num_labels 1.",
        )
    pad = hf.get("pad_token_id")
    return Classifier(model_files(path, hf, config, tensors, where), score, None if pad is None else int(pad))


def _architecture(hf: dict[str, Any]) -> str | None:
    """The class of transformers that such a model of the family has; None for a family that is not known, which is refused later."""
    family = hf.get("model_type")
    known = FAMILIES.get(family) if isinstance(family, str) else None
    return known[1].replace("ForCausalLM", "ForSequenceClassification") if known else None


def _without_head(hf: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hf.items() if name not in ("architectures", "tie_word_embeddings")}
