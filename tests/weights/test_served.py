"""Exported directories, read as vLLM's loader reads them: served_rules.py, whose rules docs/serving.md lists with their source.
Oracle: weights that the test made itself, under the names that transformers gave the recorded models; W + scale B A in float64."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from served_rules import RULES, Refused, changed, served_adapter, served_model, with_adapter
from test_export import GOLDEN, MODELS, copy

from jax_dpo import DPOConfig, LoraConfig, load_model, save_model
from jax_dpo.models.families import FAMILIES
from jax_dpo.policy import Policy, convert
from jax_dpo.trainer.served import served_warnings
from jax_dpo.weights import open_model, write_model

SPELLINGS = ("config.json", "config.v4.json")
LINEAR = r".*(self_attn\.._proj|mlp\.(gate|up|down)_proj)"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Transformers takes no router and no experts of a mixture as a target, and neither do we.
TARGETS = {family: ATTENTION if family in ("mixtral", "qwen3_moe") else LINEAR for family in FAMILIES}


def trained(source: Path, folder: Path) -> tuple[Policy, dict[str, Any], dict[str, np.ndarray]]:
    """A model, other weights for it by tree path, and the same by name."""
    new = changed(load_file(source / "model.safetensors").items())
    other = shutil.copytree(source, folder)
    save_file(new, other / "model.safetensors", metadata={"format": "pt"})
    return load_model(source), dict(load_model(other).leaves), new


def adapter(policy: Policy, **options: Any) -> Policy:
    """The model with an adapter that is no start: B is not 0."""
    return policy.with_new_adapter(LoraConfig(init_lora_weights=False, **options), seed=3)


def same(got: dict[str, np.ndarray], want: dict[str, np.ndarray], atol: float = 0) -> None:
    for name, value in want.items():
        np.testing.assert_allclose(got[name].astype(np.float64), value, atol=atol, rtol=0, err_msg=name)
    assert set(got) - set(want) <= {"lm_head.weight"}


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """{kind: directory} of a family, and what they were made of; each made once."""
    made: dict[tuple[str, str], dict[str, Any]] = {}

    def make(family: str, spelling: str) -> dict[str, Any]:
        if (family, spelling) not in made:
            folder = tmp_path_factory.mktemp("served")
            source = copy(family, folder / "base", spelling)
            policy, leaves, new = trained(source, folder / "other")
            adapted = adapter(policy, r=4, lora_alpha=12, target_modules=TARGETS[family])
            made[family, spelling] = {
                "source": source,
                "new": new,
                "whole": save_model(policy, folder / "whole", arrays=leaves),
                "adapter": save_model(adapted, folder / "adapter"),
                "merged": save_model(adapted, folder / "merged", merge=True),
            }
        return made[family, spelling]

    return make


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_whole_models(family: str, spelling: str, exports: Callable[[str, str], dict[str, Any]]) -> None:
    made = exports(family, spelling)
    served = served_model(made["whole"])
    same(served.tensors, made["new"])
    tied = open_model(made["source"]).config.tie_word_embeddings
    assert (served.tensors["lm_head.weight"] is served.tensors["model.embed_tokens.weight"]) == tied
    assert served.architecture == FAMILIES[family][1] and served.dtype == "bfloat16"  # what it makes of float32
    assert served.rope.theta == json.loads((MODELS / family / "config.v4.json").read_text())["rope_theta"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_adapters_and_merged_models(family: str, exports: Callable[[str, str], dict[str, Any]]) -> None:
    made = exports(family, "config.json")
    base = served_model(convert(made["source"], made["source"].parent / "as-exported"))
    found = served_adapter(made["adapter"], base)
    assert found and all(low.scale == 3 and low.b.any() for low in found.values())
    merged = with_adapter({k: v for k, v in base.tensors.items() if k in made["new"]}, found)
    same(served_model(made["merged"]).tensors, merged, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_and_shards(dtype: str, tmp_path: Path) -> None:
    files = open_model(MODELS / "qwen3_moe")
    write_model(tmp_path / "out", hf_config=files.hf_config, arrays=files.leaves, dtype=dtype, max_shard_bytes=40_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    served = served_model(tmp_path / "out")
    assert served.dtype == dtype
    same(served.tensors, load_file(MODELS / "qwen3_moe" / "model.safetensors"), atol=2e-2)


def test_a_head_that_is_equal_but_not_tied(tmp_path: Path) -> None:
    """Two matrices that are one by chance stay two; a tied model whose file holds both stays tied."""
    source = copy("qwen3", tmp_path / "in", tie_word_embeddings=False)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    policy, leaves, new = trained(source, tmp_path / "other")
    served = served_model(save_model(policy, tmp_path / "out", arrays=leaves))
    same(served.tensors, new)
    assert not np.array_equal(served.tensors["lm_head.weight"], served.tensors["model.embed_tokens.weight"])
    tied = served_model(save_model(load_model(_tied_again(source)), tmp_path / "tied"))
    assert tied.tensors["lm_head.weight"] is tied.tensors["model.embed_tokens.weight"]


def _tied_again(source: Path) -> Path:
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    return source


def test_a_head_with_an_adapter(tmp_path: Path) -> None:
    """The class of Llama takes one on its head, that of Qwen does not (vllm-project/vllm#33234)."""
    for family in ("llama", "qwen2"):
        base = convert(MODELS / family, tmp_path / family)
        out = save_model(adapter(load_model(base), target_modules=["lm_head", "q_proj"]), tmp_path / f"{family}-a")
        if family == "qwen2":
            with pytest.raises(Refused, match="adapter-modules"):
                served_adapter(out, served_model(base))
            continue
        served = served_model(base)
        merged = with_adapter(served.tensors, served_adapter(out, served))
        assert not np.allclose(merged["lm_head.weight"], served.tensors["lm_head.weight"])
        same(served_model(convert(out, tmp_path / "merged")).tensors, merged, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, None),
        ({"use_rslora": True, "layers_to_transform": [1]}, None),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}}, None),  # the scale of the others
        ({"modules_to_save": ["norm"]}, "adapter-saved"),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "adapter-saved"),
        ({"use_dora": True}, "adapter-dora"),
        ({"rank_pattern": {"q_proj": 2}}, "adapter-scale"),
        ({"alpha_pattern": {"layers.0.self_attn.v_proj": 2}}, "adapter-scale"),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}}, "adapter-scale"),
        ({"r": 600, "lora_alpha": 600}, "adapter-rank"),
    ],
)
def test_what_is_refused_is_said_before_the_run(options: dict[str, Any], rule: str | None, tmp_path: Path) -> None:
    policy = adapter(load_model(MODELS / "qwen3"), **{"target_modules": ["q_proj", "v_proj"], **options})
    warnings = served_warnings(policy.config.lora, policy.lora_config, DPOConfig(str(tmp_path / "run")))
    out, base = save_model(policy, tmp_path / "adapter"), served_model(convert(MODELS / "qwen3", tmp_path / "base"))
    try:
        found = served_adapter(out, base, max_lora_rank=512)
    except Refused as refused:
        assert refused.rule == rule and len(warnings) == 1 and "vLLM does not" in warnings[0]
        assert "the merged directory as it was trained: jax-dpo convert" in warnings[0]
        served_model(convert(out, tmp_path / "merged"))
    else:
        assert rule is None and warnings == [] and found


def test_the_tokenizer_stops_and_template(tmp_path: Path) -> None:
    """config.json says 0, generation_config.json [0, 7], the tokenizer 2: all of them end an answer."""
    source = copy("llama", tmp_path / "in", eos_token_id=0, vocab_size=320)
    for file in (GOLDEN / "tokenizers" / "chatml").iterdir():
        shutil.copy(file, source)
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    template = (source / "chat_template.jinja").read_text()
    for kind in ("a file", "inside"):
        if kind == "inside":
            (source / "chat_template.jinja").unlink()
            config = json.loads((source / "tokenizer_config.json").read_text()) | {"chat_template": template}
            (source / "tokenizer_config.json").write_text(json.dumps(config))
        served = served_model(convert(source, tmp_path / kind))
        assert served.stops == {0, 2, 7} and served.template == template
    (source / "generation_config.json").unlink()
    assert served_model(convert(source, tmp_path / "without")).stops == {0, 2}


def test_from_gguf(tmp_path: Path) -> None:
    """What a GGUF file does not say in Hugging Face's words is there after the export."""
    served = served_model(convert(GOLDEN / "gguf" / "llama-Q4_1.gguf", tmp_path / "out"))
    assert served.architecture == "LlamaForCausalLM" and served.tensors["lm_head.weight"].any() and served.stops


def test_an_architecture_that_the_input_does_not_name(tmp_path: Path) -> None:
    source = copy("mistral", tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    assert served_model(convert(source, tmp_path / "out")).architecture == "MistralForCausalLM"


def test_an_adapter_names_the_hub_s_model_and_not_a_cache(tmp_path: Path) -> None:
    """As PEFT does: the snapshot's path is on this machine alone."""
    folder = tmp_path / "hub" / "models--some-org--a-model-1B" / "snapshots" / "0123abcd"
    shutil.copytree(MODELS / "qwen2", folder)
    for source, name in ((folder, "some-org/a-model-1B"), (MODELS / "qwen2", str(MODELS / "qwen2"))):
        out = save_model(adapter(load_model(source), target_modules=["q_proj"]), tmp_path / "out", replace=True)
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == name


BREAKS: dict[str, Callable[[dict[str, np.ndarray], dict[str, Any]], Any]] = {
    "names": lambda t, c: t.update({"model.layers.0.mlp.extra.weight": t["model.norm.weight"]}),
    "complete": lambda t, c: t.pop("model.layers.1.self_attn.k_proj.weight"),
    "shapes": lambda t, c: t.update({"model.norm.weight": t["model.norm.weight"][:-1]}),
    "dtype": lambda t, c: c.update(dtype="bfloat16", torch_dtype="bfloat16"),
    "rope": lambda t, c: c.pop("rope_theta"),
    "architecture": lambda t, c: c.pop("architectures"),
    "stop-ids": lambda t, c: c.update(eos_token_id=None),
    "activation": lambda t, c: c.update(hidden_act="gelu"),
}


@pytest.mark.parametrize("rule", sorted(BREAKS))
def test_the_rules_find_what_is_broken(rule: str, tmp_path: Path) -> None:
    """The reader would see a fault of an export."""
    out = convert(copy("mistral", tmp_path / "in"), tmp_path / "out")
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    served_model(out)
    BREAKS[rule](tensors, config)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match=f"^{rule}:"):
        served_model(out)


def test_an_adapter_beside_whole_weights_is_read_as_weights(tmp_path: Path) -> None:
    out = convert(MODELS / "llama", tmp_path / "out")
    adapted = save_model(adapter(load_model(out), target_modules=["q_proj"]), tmp_path / "adapter")
    shutil.copy(adapted / "adapter_model.safetensors", out)
    with pytest.raises(Refused, match=r"^names:"):
        served_model(out)


def test_every_rule_is_in_the_docs_with_its_source() -> None:
    page = (GOLDEN.parents[1] / "docs" / "serving.md").read_text(encoding="utf-8").partition("\n## How vLLM reads")[2]
    rows = [line.strip("|").split("|") for line in page.splitlines() if re.match(r"\| `[a-z-]+` \|", line)]
    assert [row[0].strip(" `") for row in rows] == list(RULES)
    assert all(re.search(r"`vllm/[\w/]+\.py`|vllm-project/vllm#\d+", row[2]) for row in rows)
