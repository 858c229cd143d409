"""Opening Hugging Face directories. Oracle: the safetensors library; what is wrong must be named before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_dpo.errors import UserError
from jax_dpo.models.families import FAMILIES
from jax_dpo.weights import open_model, resolve_model
from jax_dpo.weights.names import tensors_of, tree_path

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MODELS = GOLDEN / "models"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A copy that a test may break."""
    out = tmp_path / "model"
    shutil.copytree(MODELS / "llama", out)
    return out


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "removed"}))


def shard(model: Path, names: tuple[str, ...] = ("model-{}-of-3.safetensors",)) -> dict[str, str]:
    """Splits the single file in three; returns the weight map."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    where: dict[str, str] = {}
    for i in range(3):
        part = {name: tensors[name] for name in sorted(tensors)[i::3]}
        file = names[0].format(i + 1)
        save_file(part, model / file)
        where |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def refused(path: Path, name: str) -> str:
    with pytest.raises(UserError) as caught:
        open_model(path)
    assert caught.value.name == name, caught.value
    return str(caught.value)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_leaves_are_the_tensors_stacked(family: str) -> None:
    files = open_model(MODELS / family)
    stored = load_file(MODELS / family / "model.safetensors")
    seen = set()
    for path, leaf in files.leaves.items():
        whole = leaf.read()
        assert leaf.shape == whole.shape and leaf.dtype == whole.dtype == np.float32
        for name, place in tensors_of(files.config, path):
            assert np.array_equal(whole[place], stored[name])
            seen.add(name)
    assert seen == set(stored)
    assert files.dtype == "float32" and files.tokenizer_files() == {}
    assert files.generation_config == (MODELS / family / "generation_config.json").read_bytes()


def test_names_there_and_back() -> None:
    path = "model.layers.self_attn.q_proj.weight"
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    assert [tree_path(name) for name in names] == [(path, 0), (path, 1)]
    assert tree_path("lm_head.weight") == ("lm_head.weight", None)
    assert tree_path("model.layers.x.weight") == ("model.layers.x.weight", None)


def test_shards_are_found_by_the_index_whatever_their_names(llama: Path) -> None:
    shard(llama, ("model.safetensors-{}.odd.safetensors",))
    found, expected = open_model(llama), open_model(MODELS / "llama")
    for path, leaf in expected.leaves.items():
        assert np.array_equal(found.leaves[path].read(), leaf.read())


def test_a_missing_shard_is_named_with_its_share(llama: Path) -> None:
    where = shard(llama)
    (llama / "model-2-of-3.safetensors").unlink()
    text = refused(llama, "shard-missing")
    share = list(where.values()).count("model-2-of-3.safetensors")
    assert f"model-2-of-3.safetensors is missing, it should hold {share} of {len(where)} tensors" in text


def test_shards_under_other_names_than_the_index_lists(llama: Path) -> None:
    shard(llama)
    for i in (1, 2, 3):
        (llama / f"model-{i}-of-3.safetensors").rename(llama / f"part-{i}.safetensors")
    text = refused(llama, "shard-missing")
    assert text.count("is missing") == 3 and "part-1.safetensors, part-2.safetensors, part-3.safetensors" in text


def test_index_that_does_not_fit_its_files(llama: Path) -> None:
    where = shard(llama)
    index = llama / "model.safetensors.index.json"
    swapped = where | {"lm_head.weight": next(f for f in where.values() if f != where["lm_head.weight"])}
    index.write_text(json.dumps({"weight_map": swapped}))
    assert "lm_head.weight" in refused(llama, "tensors-differ")
    index.write_text(json.dumps({"weight_map": []}))
    assert "weight_map" in refused(llama, "json-broken")
    index.write_text(json.dumps({"weight_map": where}))
    save_file(load_file(MODELS / "llama" / "model.safetensors"), llama / "model.safetensors")
    assert "out of date" in refused(llama, "weights-ambiguous")


def test_nothing_there(tmp_path: Path, llama: Path) -> None:
    assert "nowhere" in refused(tmp_path / "nowhere", "model-missing")
    assert "no .gguf file" in refused(llama / "config.json", "model-missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds nothing" in refused(empty, "model-config-missing")
    (empty / "m.gguf").touch()
    assert "m.gguf" in refused(empty, "model-config-missing")
    (llama / "model.safetensors").unlink()
    refused(llama, "weights-missing")
    (llama / "other.safetensors").touch()
    assert "other.safetensors" in refused(llama, "weights-missing")


def test_pickles_are_not_opened(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(60))
    text = refused(llama, "pickle-only")
    assert "pytorch_model.bin" in text and "save_pretrained" in text


def test_broken_json_says_where(llama: Path) -> None:
    (llama / "config.json").write_text('{"model_type": "llama",\n  "vocab_size" 3}')
    assert "config.json, line 2, column 16" in refused(llama, "json-broken")
    (llama / "config.json").write_text("[1]")
    assert "list" in refused(llama, "json-broken")


def test_truncated_weights(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    text = refused(llama, "safetensors-broken")
    assert "model.safetensors" in text and "cut off" in text


def test_wrong_names_and_shapes(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    renamed = {name.replace("layers.1.mlp.up_proj", "layers.1.mlp.w3"): x for name, x in tensors.items()}
    save_file(renamed, llama / "model.safetensors")
    text = refused(llama, "tensors-differ")
    assert "model.layers.1.mlp.up_proj.weight" in text and "model.layers.1.mlp.w3.weight" in text
    save_file(tensors | {"model.norm.weight": np.zeros(7, np.float32)}, llama / "model.safetensors")
    text = refused(llama, "shape-differs")
    assert "model.norm.weight is [7]" in text and "[48]" in text and "model.safetensors" in text
    save_file(tensors, llama / "model.safetensors")
    edit(llama / "config.json", num_hidden_layers=3)
    assert "9 of 30 tensors are missing (model.layers.2." in refused(llama, "tensors-differ")


def test_stored_rotary_frequencies_are_left_out(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}, llama / "model.safetensors"
    )
    assert len(open_model(llama).leaves) == 12


def test_tied_head_stored_twice(tmp_path: Path) -> None:
    model = tmp_path / "qwen3"
    shutil.copytree(MODELS / "qwen3", model)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, model / "model.safetensors")
    assert "lm_head.weight" not in open_model(model).leaves
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, model / "model.safetensors")
    assert "tie_word_embeddings" in refused(model, "tied-head-differs")


def test_adapter_files_beside_a_model_or_alone(llama: Path) -> None:
    shutil.copy(GOLDEN / "adapters" / "adapter_final" / "adapter_config.json", llama)
    assert "adapter_config.json" in refused(llama, "adapter-beside-weights")
    refused(GOLDEN / "adapters" / "adapter_final", "adapter-alone")


def test_quantised_tensor_type(llama: Path) -> None:
    tensors: dict[str, np.ndarray] = dict(load_file(llama / "model.safetensors"))
    tensors["model.norm.weight"] = np.zeros(48, np.int8)
    save_file(tensors, llama / "model.safetensors")
    assert "model.norm.weight is stored as I8" in refused(llama, "tensor-type-unknown")


def test_tokenizer_files_come_byte_for_byte(llama: Path) -> None:
    source = GOLDEN / "tokenizers" / "chatml"
    for file in source.iterdir():
        shutil.copy(file, llama)
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tool.jinja").write_text("x")
    found = open_model(llama).tokenizer_files()
    assert found.pop("additional_chat_templates/tool.jinja") == b"x"
    assert found == {file.name: file.read_bytes() for file in source.iterdir()}


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(MODELS / "llama") == MODELS / "llama"
    for name in ("./nowhere", "a/b/c", "/x/y", "model.gguf", "org/model.gguf"):
        with pytest.raises(UserError) as caught:
            resolve_model(name)
        assert caught.value.name == "model-missing" and name in str(caught.value)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        resolve_model("someone/some-model", revision="v1")
    assert caught.value.name == "hub-unreachable"
    assert "'someone/some-model' at revision 'v1'" in str(caught.value) and "HF_HUB_OFFLINE" in str(caught.value)


class FakeTensor:
    """What a torch tensor offers, as far as it is used."""

    def __init__(self, array: np.ndarray, dtype: str) -> None:
        self.array, self.dtype, self.shape = array, f"torch.{dtype}", array.shape

    def __getitem__(self, index: Any) -> FakeTensor:
        return FakeTensor(self.array[index], self.dtype.removeprefix("torch."))

    def detach(self) -> FakeTensor:
        return self

    def cpu(self) -> FakeTensor:
        return self

    def float(self) -> FakeTensor:
        return FakeTensor(self.array.astype(np.float32), "float32")

    def numpy(self) -> np.ndarray:
        return self.array


def in_memory(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names that transformers 5 has in memory: experts of a layer in two tensors, gate before up."""
    found: dict[str, Any] = {}
    for name, x in stored.items():
        layer, experts, rest = name.rpartition(".experts.")
        layer = layer.replace("block_sparse_moe", "mlp")
        if not experts:
            found[name.replace("block_sparse_moe", "mlp")] = x
            continue
        number, projection = int(rest.split(".")[0]), rest.split(".")[1]
        key = "down_proj" if projection in ("w2", "down_proj") else "gate_up_proj"
        parts = found.setdefault(f"{layer}.experts.{key}", {})
        parts[number, projection in ("w3", "up_proj")] = x
    for name, parts in found.items():
        if isinstance(parts, dict):
            half = lambda up, parts=parts: np.stack([parts[k] for k in sorted(parts) if k[1] == up])  # noqa: E731
            found[name] = np.concatenate([half(up) for up in (False, True) if any(k[1] == up for k in parts)], axis=1)
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_are_read_as_those_of_files(family: str, tmp_path: Path) -> None:
    """Of a model object, and of a directory that was saved so. Oracle: the file with one tensor an expert."""
    from jax_dpo.weights.objects import open_object

    model = tmp_path / "fused"
    shutil.copytree(MODELS / family, model)
    fused = in_memory(load_file(model / "model.safetensors"))
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in fused)
    save_file(fused, model / "model.safetensors")
    want = open_model(MODELS / family).leaves
    for files in (open_object(FakeModel("float32", family)), open_model(model)):
        assert set(files.leaves) == set(want)
        for path, leaf in want.items():
            assert np.array_equal(files.leaves[path].read(), leaf.read())
            part = (slice(1, 2), slice(1, None, 2)) if ".experts." in path else (slice(0, 1),)
            assert np.array_equal(files.leaves[path].read(part), leaf.read()[part])
    gone = next(name for name in fused if name.endswith("down_proj") and "experts" in name)
    fused[gone] = fused[gone][:-1]
    save_file(fused, model / "model.safetensors")
    assert gone in refused(model, "tensors-differ")


class FakeModel:
    name_or_path = "tiny"

    def __init__(self, dtype: str, family: str = "qwen3", **more: Any) -> None:
        from transformers import AutoConfig

        self.config = AutoConfig.from_pretrained(str(MODELS / family))
        stored = load_file(MODELS / family / "model.safetensors")
        stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
        stored = in_memory(stored)
        self.tensors = {name: FakeTensor(x, dtype) for name, x in stored.items()}
        self.__dict__.update(more)

    def state_dict(self) -> dict[str, FakeTensor]:
        return self.tensors


def test_a_model_object_is_read_through_its_state_dict() -> None:
    from jax_dpo.weights.objects import is_model_object, open_object

    files, expected = open_object(FakeModel("float32")), open_model(MODELS / "qwen3")
    assert files.config == expected.config and set(files.leaves) == set(expected.leaves)
    for path, leaf in expected.leaves.items():
        assert np.array_equal(files.leaves[path].read(), leaf.read())
    assert open_object(FakeModel("bfloat16")).dtype == "bfloat16"
    assert is_model_object(FakeModel("float32")) and not is_model_object("path")
    with pytest.raises(UserError, match="stored as int8"):
        open_object(FakeModel("int8"))
    with pytest.raises(UserError, match="adapter"):
        open_object(FakeModel("float32", peft_config={}))
