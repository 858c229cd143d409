"""Adapters. Oracle: files that PEFT 0.21.2 wrote (golden), and the plain formula."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_dpo.errors import UserError
from jax_dpo.models.config import ModelConfig, parameter_shapes
from jax_dpo.models.families import model_config
from jax_dpo.models.lora import LoraConfig
from jax_dpo.weights import open_model, write_model
from jax_dpo.weights.peft import adapter_shapes, merge, merged, new_adapter, read_adapter, write_adapter

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ADAPTERS = GOLDEN / "adapters"
Q = "model.layers.self_attn.q_proj"


def base() -> ModelConfig:
    return model_config(json.loads((ADAPTERS / "base_config.json").read_text()))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """An adapter directory that a test may break."""
    shutil.copytree(ADAPTERS / "adapter_final", tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(path: Path, name: str, model: ModelConfig | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_adapter(path, model or base())
    assert caught.value.name == name, caught.value
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_peft_wrote_is_read() -> None:
    adapter = read_adapter(ADAPTERS / "adapter_final", base())
    stored = load_file(ADAPTERS / "adapter_final" / "adapter_model.safetensors")
    assert {t.scale for t in adapter.spec.targets} == {2.0} and [
        t.path.rpartition(".")[2] for t in adapter.spec.targets
    ] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    assert sum(a.shape[0] for a in adapter.arrays.values()) == len(stored)
    for i in range(2):
        prefix = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        assert np.array_equal(adapter.arrays[f"{Q}.lora_a"][i], stored[f"{prefix}.lora_A.weight"])
        assert np.array_equal(adapter.arrays[f"{Q}.lora_b"][i], stored[f"{prefix}.lora_B.weight"])


@pytest.mark.parametrize("which", ["adapter_initial", "adapter_final"])
def test_files_come_back_byte_for_byte(which: str, tmp_path: Path) -> None:
    adapter = read_adapter(ADAPTERS / which, base())
    model = replace(base(), lora=adapter.spec)
    write_adapter(tmp_path / "out", model=model, arrays=adapter.arrays, base=None, config=adapter.config)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (ADAPTERS / which / file).read_bytes()


def test_a_new_adapter_changes_nothing_and_is_spread_as_peft_spreads_it() -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    adapter = new_adapter(config, base(), 1, {})
    shapes = adapter_shapes(adapter.spec, base())
    assert {path: a.shape for path, a in adapter.arrays.items()} == shapes
    lora = {p: s for p, s in parameter_shapes(replace(base(), lora=adapter.spec)).items() if ".lora_" in p}
    assert shapes == lora and len(shapes) == 14
    for path, array in adapter.arrays.items():
        assert array.dtype == np.float32
        if path.endswith("lora_b"):
            assert not array.any()
        else:  # uniform in +-1/sqrt(in): standard deviation bound / sqrt(3)
            bound = array.shape[-1] ** -0.5
            assert np.abs(array).max() <= bound and np.abs(array).max() > 0.95 * bound
            assert array.std() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert not np.array_equal(array[0], array[1])
    normal = new_adapter(replace_config(config, init_lora_weights="gaussian"), base(), 1, {})
    assert normal.arrays[f"{Q}.lora_a"].std() == pytest.approx(1 / 4, rel=0.1)


def replace_config(config: LoraConfig, **changes: Any) -> LoraConfig:
    return replace(config, **changes)


def test_seeds_and_targets() -> None:
    few, many = LoraConfig(target_modules=["q_proj"]), LoraConfig(target_modules=["q_proj", "k_proj"])
    a, b, c = (new_adapter(config, base(), seed, {}) for config, seed in ((few, 1), (many, 1), (few, 2)))
    assert np.array_equal(a.arrays[f"{Q}.lora_a"], b.arrays[f"{Q}.lora_a"])
    assert not np.array_equal(a.arrays[f"{Q}.lora_a"], c.arrays[f"{Q}.lora_a"])
    k = b.arrays["model.layers.self_attn.k_proj.lora_a"]
    assert not np.array_equal(b.arrays[f"{Q}.lora_a"], k)


def test_a_new_adapter_is_written_with_all_of_pefts_fields(tmp_path: Path) -> None:
    adapter = new_adapter(LoraConfig(r=2, lora_alpha=32, lora_dropout=0.05), base(), 0, {})
    model = replace(base(), lora=adapter.spec)
    for config in (adapter.config, replace(adapter.config, target_modules=["q_proj", "v_proj"])):
        out = tmp_path / str(config.target_modules is None)
        write_adapter(
            out, model=model, arrays=adapter.arrays, base="the/base", config=config, tokenizer_files={"t.json": b"{}"}
        )
        got = json.loads((out / "adapter_config.json").read_text())
        like = json.loads((ADAPTERS / "adapter_final" / "adapter_config.json").read_text())
        assert set(got) == set(like)
        differ = {key for key in got if got[key] != like[key]}
        assert differ == {"base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"}
        assert got["target_modules"] == ["q_proj", "v_proj"] and got["base_model_name_or_path"] == "the/base"
        assert (out / "t.json").read_bytes() == b"{}"
        again = read_adapter(out, base())
        assert again.spec == adapter.spec
        assert all(np.array_equal(again.arrays[p], a) for p, a in adapter.arrays.items())


def test_jax_arrays_and_a_head(tmp_path: Path) -> None:
    import jax.numpy as jnp

    adapter = new_adapter(LoraConfig(target_modules=["lm_head", "o_proj"]), base(), 0, {})
    arrays = {path: jnp.asarray(a) for path, a in adapter.arrays.items()} | {"model.norm.weight": jnp.zeros(3)}
    write_adapter(
        tmp_path / "out", model=replace(base(), lora=adapter.spec), arrays=arrays, base=None, config=adapter.config
    )
    names = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert "base_model.model.lm_head.lora_A.weight" in names and len(names) == 2 + 4
    assert read_adapter(tmp_path / "out", base()).spec == adapter.spec


def test_merged_is_the_plain_formula(tmp_path: Path) -> None:
    """Oracle: W + scale B A in float64, and the model written with it."""
    files = open_model(GOLDEN / "models" / "llama")
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "down_proj", "lm_head"])
    adapter = new_adapter(config, files.config, 0, {})
    random = np.random.default_rng(0)
    arrays = {p: random.standard_normal(a.shape).astype(np.float32) for p, a in adapter.arrays.items()}
    leaves = merge(files.leaves, arrays, adapter.spec)
    write_model(tmp_path / "out", hf_config=files.hf_config, arrays=leaves, dtype="float32")
    written = open_model(tmp_path / "out").leaves
    for path, leaf in files.leaves.items():
        want = leaf.read().astype(np.float64)
        if adapter.spec.target(path.removesuffix(".weight")):
            stem = path.removesuffix(".weight")
            a, b = (arrays[f"{stem}.{x}"].astype(np.float64) for x in ("lora_a", "lora_b"))
            want = want + 7 / 3**0.5 * (b @ a)
            assert np.array_equal(leaves[path].read((..., slice(1, 3))), leaves[path].read()[..., 1:3])
        np.testing.assert_allclose(written[path].read(), want, atol=2e-5)
        assert np.array_equal(written[path].read(), leaves[path].read())
    assert merged(np.zeros((2, 2), np.float16), np.ones((1, 2)), np.ones((2, 1)), 0.5).dtype == np.float32


def test_no_adapter_there(tmp_path: Path, copy: Path) -> None:
    assert "nowhere" in refused(tmp_path / "nowhere", "adapter-missing")
    assert "without adapter_config.json" in refused(GOLDEN / "models" / "llama", "adapter-missing")
    (copy / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refused(copy, "adapter-missing")
    (copy / "adapter_model.bin").touch()
    refused(copy, "pickle-only")


def test_adapter_files_that_do_not_fit(copy: Path) -> None:
    edit(copy, target_modules=["q_proj", "k_proj"])
    assert "8 tensors are not expected (base_model.model.model.layers.0.self_attn.o_proj" in refused(
        copy, "tensors-differ"
    )
    edit(copy, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    assert "4 of 20 tensors are missing" in refused(copy, "tensors-differ")
    edit(copy, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], r=8)
    text = refused(copy, "shape-differs")
    assert "is [4, 48]" in text and "[8, 48]" in text and "another base" in text
    edit(copy, r=4, use_dora=True)
    assert "8 of 24 tensors are missing" in refused(copy, "tensors-differ")
    edit(copy, use_dora=False, bias="all")
    text = refused(copy, "lora-option-unsupported")
    assert "bias" in text and str(copy / "adapter_config.json") in text
    edit(copy, bias="none", target_modules=["wqkv"])
    assert "'wqkv'" in refused(copy, "lora-target-unknown")


def test_how_a_trained_adapter_was_begun_does_not_matter(copy: Path) -> None:
    edit(copy, init_lora_weights=False, base_model_name_or_path=None)
    assert read_adapter(copy, base()).spec.targets[0].rank == 4
    edit(copy, init_lora_weights="olora")
    assert "olora" in refused(copy, "lora-option-unsupported")


def test_adapters_stored_in_bfloat16_come_as_float32(copy: Path) -> None:
    import ml_dtypes

    file = copy / "adapter_model.safetensors"
    low = {name: a.astype(ml_dtypes.bfloat16) for name, a in load_file(file).items()}
    save_file(low, file)
    found = read_adapter(copy, base()).arrays[f"{Q}.lora_a"]
    stored = low["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert found.dtype == np.float32 and np.array_equal(found[0], stored.astype(np.float32))


def test_an_adapter_is_not_put_beside_a_whole_model(tmp_path: Path) -> None:
    adapter = new_adapter(LoraConfig(), base(), 0, {})
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="whole model") as caught:
        write_adapter(
            tmp_path, model=replace(base(), lora=adapter.spec), arrays=adapter.arrays, base=None, config=LoraConfig()
        )
    assert caught.value.name == "path-taken"
