"""config.json -> ModelConfig. Oracles: transformers' own files in both spellings and its rotary frequencies (golden)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_dpo.errors import UserError
from jax_dpo.models.config import Experts, Rope, layers_of, parameter_shapes
from jax_dpo.models.families import FAMILIES, model_config
from jax_dpo.models.rope_config import read_rope
from jax_dpo.weights.names import tensors_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "models"


def config(family: str = "llama", spelling: str = "config.json", **changes: Any) -> dict[str, Any]:
    hf = json.loads((GOLDEN / family / spelling).read_text()) | changes
    return {k: v for k, v in hf.items() if v != "removed"}


def refused(name: str, hf: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        model_config(hf)
    assert caught.value.name == name, caught.value
    return str(caught.value)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_both_spellings_give_one_config(family: str) -> None:
    assert model_config(config(family)) == model_config(config(family, "config.v4.json"))


def test_what_the_families_differ_in() -> None:
    llama, mistral, qwen2, qwen3 = (model_config(config(f)) for f in ("llama", "mistral", "qwen2", "qwen3"))
    assert llama.layer_ropes == (Rope(500000.0, "llama3", 8.0, 16, 1.0, 4.0),) * 2
    assert (llama.num_heads, llama.num_kv_heads, llama.head_dim, llama.tie_word_embeddings) == (6, 2, 8, False)
    assert mistral.layer_windows == (7, 7, 7) and mistral.head_dim == 16
    assert qwen2.attention_bias and not qwen2.attention_out_bias and qwen2.head_dim == 12 and not qwen2.qk_norm
    assert qwen3.qk_norm and qwen3.tie_word_embeddings and not qwen3.attention_bias
    assert qwen3.layer_windows == (None, None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parameter_shapes_are_those_of_the_file(family: str) -> None:
    """Oracle: the safetensors library reading the model that transformers wrote."""
    from safetensors.numpy import load_file

    stored = {name: array.shape for name, array in load_file(GOLDEN / family / "model.safetensors").items()}
    found = model_config(config(family))
    shapes = parameter_shapes(found)
    expected = {}
    for path, shape in shapes.items():
        if path.startswith("model.layers."):
            assert shape[0] == len(layers_of(found, path))
        expected |= {name: shape[len(place) :] for name, place in tensors_of(found, path)}
    assert expected == stored


def test_attention_bias_of_llama_is_on_all_four_projections() -> None:
    shapes = parameter_shapes(model_config(config(attention_bias=True, mlp_bias=True)))
    biased = sorted(path.split(".")[-2] for path in shapes if path.endswith(".bias"))
    assert biased == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_what_gemma_is() -> None:
    gemma, gemma2 = (model_config(config(f)) for f in ("gemma", "gemma2"))
    for found in (gemma, gemma2):
        assert found.norm_offset == 1.0 and found.embedding_scale == found.hidden_size**0.5
        assert found.tie_word_embeddings and found.hidden_act == "gelu_pytorch_tanh"
    assert (gemma.attention_softcap, gemma.logit_softcap, gemma.norms_after) == (None, None, False)
    assert gemma.attention_scale == 16**-0.5 and gemma.layer_windows == (None, None)
    assert (gemma2.attention_softcap, gemma2.logit_softcap, gemma2.norms_after) == (5.0, 8.0, True)
    assert gemma2.attention_scale == 24**-0.5 and gemma2.layer_windows == (6, None, 6)


def test_what_files_of_gemma_leave_out() -> None:
    """Oracle: the defaults of transformers' Gemma2Config and GemmaConfig; google/gemma-2-2b has no tie_word_embeddings."""
    left_out = (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "sliding_window",
        "head_dim",
    )
    hf = config("gemma2", **dict.fromkeys((*left_out, "layer_types", "tie_word_embeddings"), "removed"))
    found = model_config(hf | {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"})
    assert (found.attention_softcap, found.logit_softcap, found.attention_scale) == (50.0, 30.0, 1 / 16)
    assert (found.layer_windows, found.head_dim, found.tie_word_embeddings) == ((4096, None, 4096), 256, True)
    off = model_config(config("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None))
    assert (off.attention_softcap, off.logit_softcap) == (None, None)
    assert model_config(config("gemma2", sliding_window=None, layer_types=None)).layer_windows == (None,) * 3


def test_gelu_of_gemmas_first_files_is_the_one_with_tanh() -> None:
    for changes in ({"hidden_act": "gelu"}, {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}):
        assert model_config(config("gemma", **changes)).hidden_act == "gelu_pytorch_tanh"
    refused("config-attribute-invalid", config("gemma", hidden_activation="silu"))


def test_mixtures_of_experts() -> None:
    mixtral, qwen = model_config(config("mixtral")), model_config(config("qwen3_moe"))
    assert mixtral.experts == Experts(4, 2, 48, True, "block_sparse_moe", ("w1", "w3", "w2"), 0.001)
    assert qwen.experts == Experts(6, 2, 24, True, "mlp", ("gate_proj", "up_proj", "down_proj"), 0.001, (1,))
    assert model_config(config("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=None)).experts.dense_layers == (0, 2)
    assert model_config(config("qwen3_moe", mlp_only_layers=[0, 1, 2])).experts is None
    # transformers' MixtralConfig: no window, base 1e6, eight experts.
    bare = model_config(
        config("mixtral", rope_parameters="removed", num_local_experts="removed", rms_norm_eps="removed")
    )
    assert (bare.layer_ropes[0], bare.experts.count, bare.rms_norm_eps) == (Rope(1e6), 8, 1e-5)
    assert model_config(config("mixtral", sliding_window=9)).layer_windows == (9, 9)


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ("mixtral", {"router_aux_loss_coef": -1.0}, "router_aux_loss_coef"),
        ("qwen3_moe", {"num_experts": 8}, "num_local_experts"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, "mlp_only_layers"),
    ],
)
def test_what_a_mixture_cannot_be(family: str, changes: dict[str, Any], word: str) -> None:
    assert word in refused("config-attribute-invalid", config(family, **changes))


def test_what_cannot_be_gemma() -> None:
    assert "use_bidirectional_attention" in refused(
        "config-attribute-unknown", config("gemma2", use_bidirectional_attention=True)
    )
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"):
        assert name in refused("config-attribute-invalid", config("gemma2", **{name: 0}))


def test_windows_of_qwen() -> None:
    on = {"use_sliding_window": True, "sliding_window": 5}
    assert model_config(config("qwen2", sliding_window=5)).layer_windows == (None, None)
    by_number = config("qwen2", layer_types="removed", max_window_layers=1, **on)
    assert model_config(by_number).layer_windows == (None, 5)
    by_name = config("qwen3", layer_types=["sliding_attention", "full_attention"], **on)
    assert model_config(by_name).layer_windows == (5, None)
    text = refused("config-attribute-invalid", config("qwen3", layer_types=["sliding_attention", "full_attention"]))
    assert "layer_types" in text and "no sliding window is switched on" in text


def test_window_of_mistral_may_be_off_or_left_out() -> None:
    assert model_config(config("mistral", sliding_window=None)).layer_windows == (None,) * 3
    assert model_config(config("mistral", sliding_window="removed")).layer_windows == (4096,) * 3


def test_defaults_of_transformers_for_what_is_left_out() -> None:
    hf = config("qwen3", head_dim="removed", hidden_size=64)
    assert model_config(hf).head_dim == 128
    hf = config("llama", num_key_value_heads="removed", head_dim="removed", rms_norm_eps="removed")
    assert (model_config(hf).num_kv_heads, model_config(hf).head_dim, model_config(hf).rms_norm_eps) == (6, 8, 1e-6)


def test_unknown_family_lists_those_that_are_known() -> None:
    text = refused("family-unknown", {"model_type": "mamba"})
    assert "'mamba'" in text and "gemma, gemma2, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe" in text
    refused("family-unknown", {})
    assert "LlamaForSequenceClassification" in refused(
        "architecture-unknown", config(architectures=["LlamaForSequenceClassification"])
    )


def test_every_unknown_attribute_is_named() -> None:
    text = refused(
        "config-attribute-unknown", config(attn_logit_softcapping=50.0, mystery={"a": 1}, fine=None, off=False)
    )
    assert "attn_logit_softcapping = 50.0" in text and "mystery" in text and "fine" not in text and "off" not in text
    assert "quantization_config" in refused("config-attribute-unknown", config(quantization_config={"bits": 4}))
    assert "sliding_window = 9" in refused("config-attribute-unknown", config(sliding_window=9))


def test_no_attribute_is_ignored_by_accident() -> None:
    """Each attribute that is neither ignorable nor refused changes the ModelConfig or is checked."""
    from jax_dpo.models.attributes import IGNORABLE

    other = {
        "architectures": ["X"],
        "hidden_act": "gelu_new",
        "hidden_activation": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 123.0},
        "attention_dropout": 0.1,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_window_layers": 0,
        "mlp_only_layers": [0],
        "router_jitter_noise": 0.1,
        "sliding_window": 3,
    }
    for family in FAMILIES:
        hf = config(family)
        if family.startswith("qwen"):  # so that the attributes of the window count
            hf |= {"use_sliding_window": True, "sliding_window": 9}
        if family in ("qwen2", "qwen3"):
            hf |= {"max_window_layers": 1, "layer_types": None}
        before = model_config(hf)
        for name, value in hf.items():
            if name in IGNORABLE:
                continue
            opposite = value is None or isinstance(value, bool)
            changed = other[name] if name in other else not value if opposite else 2 * value
            try:
                assert model_config(hf | {name: changed}) != before, (family, name)
            except UserError as error:
                assert name in str(error), (family, name)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"vocab_size": "removed"}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": "full_attention"}, "layer_types"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        model_config(config(**changes))
    assert caught.value.name in ("config-attribute-invalid", "config-attribute-missing")


CASES = json.loads((GOLDEN / "rope.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{(c['rope_scaling'] or {}).get('factor', 0)}-{c['head_dim']}")
def test_rotary_frequencies_are_those_of_transformers(case: dict[str, Any]) -> None:
    rope = read_rope(case, case["max_position_embeddings"])
    found = rope.inverse_frequencies(case["head_dim"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.float32(case["inverse_frequencies"]), rtol=5e-6)
    assert rope.attention_factor == pytest.approx(case["attention_factor"], rel=1e-7)


def test_yarn_that_does_not_stretch_does_not_scale_either() -> None:
    for factor in (0.5, 1.0):
        assert read_rope({"rope_scaling": {"rope_type": "yarn", "factor": factor}}, 64).attention_factor == 1.0


LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 16}


def test_old_key_of_the_rope_kind() -> None:
    want = model_config(config()).layer_ropes
    old = config("llama", "config.v4.json", rope_scaling={"type": "llama3", **LLAMA3})
    both = config("llama", "config.v4.json", rope_scaling={"type": "llama3", "rope_type": "llama3", **LLAMA3})
    assert model_config(old).layer_ropes == model_config(both).layer_ropes == want
    linear = config("llama", "config.v4.json", rope_scaling={"type": "linear", "factor": 4.0})
    assert model_config(linear).layer_ropes[0] == Rope(500000.0, "linear", 4.0)


@pytest.mark.parametrize(
    ("rope", "name", "words"),
    [
        ({"rope_scaling": {"type": "spiral", "factor": 4.0}}, "rope-unknown", ["type", "'spiral'", "llama3"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope-unknown", ["rope_type", "'dynamic'"]),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 4.0}},
            "rope-disagrees",
            ["type = 'linear'", "rope_type = 'dynamic'"],
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope-unknown", ["factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "rope-unknown", ["factor", "'4'"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "twist": 1}}, "rope-unknown", ["twist = 1"]),
        ({"rope_scaling": "linear"}, "rope-unknown", ["'linear'"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 1e6},
            "rope-disagrees",
            ["10000.0", "1000000.0"],
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope-disagrees",
            ["rope_parameters", "rope_scaling"],
        ),
    ],
)
def test_rope_that_cannot_be_trusted(rope: dict[str, Any], name: str, words: list[str]) -> None:
    text = refused(name, config(**({"rope_parameters": "removed"} | rope)))
    assert all(word in text for word in words), text
