"""Dotted paths of the parameter tree and Hugging Face's tensor names.

The tree stacks all layers: `model.layers.self_attn.q_proj.weight` [L, out, in] stands for the tensors
`model.layers.0.self_attn.q_proj.weight`, `model.layers.1...`. Experts are a second axis: for Mixtral
`model.layers.block_sparse_moe.experts.w1.weight` [L, E, out, in] stands for `model.layers.0.block_sparse_moe.experts.0.w1.weight`,
`...experts.1...`. Everything else has the same name in both.
"""

from __future__ import annotations

from jax_dpo.models.config import ModelConfig, layers_of

LAYERS = "model.layers."
PEFT_PREFIX = "base_model.model."


def is_stacked(path: str) -> bool:
    """Whether the leaf at this path has a leading layer axis."""
    return path.startswith(LAYERS)


def tensors_of(config: ModelConfig, path: str) -> list[tuple[str, tuple[int, ...]]]:
    """Hugging Face's names of one leaf in order, each with the place of its tensor in the leaf."""
    if not is_stacked(path):
        return [(path, ())]
    rest = path[len(LAYERS) :]
    places = list(enumerate(layers_of(config, path)))
    before, experts, after = rest.partition("experts.")
    if config.experts is None or not experts:
        return [(f"{LAYERS}{layer}.{rest}", (i,)) for i, layer in places]
    count = range(config.experts.count)
    return [(f"{LAYERS}{layer}.{before}{experts}{e}.{after}", (i, e)) for i, layer in places for e in count]


def tree_path(name: str) -> tuple[str, int | None]:
    """The path of a Hugging Face name, and its layer (None outside the layers)."""
    if name.startswith(LAYERS):
        number, _, rest = name[len(LAYERS) :].partition(".")
        if number.isdigit() and rest:
            return LAYERS + rest, int(number)
    return name, None
