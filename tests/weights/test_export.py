"""Writing Hugging Face directories. Oracles: what was read, bit for bit; transformers' AutoConfig and AutoTokenizer."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_dpo.errors import UserError
from jax_dpo.models.families import FAMILIES, model_config
from jax_dpo.policy import convert
from jax_dpo.weights import open_model, write_model
from jax_dpo.weights.export import exported_config
from jax_dpo.weights.place import placing
from jax_dpo.weights.tokenizer_files import files_of_tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MODELS = GOLDEN / "models"
VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}


def copy(family: str, out: Path, spelling: str = "config.json", **changes: Any) -> Path:
    out.mkdir(parents=True)
    shutil.copy(MODELS / family / "model.safetensors", out)
    hf = json.loads((MODELS / family / spelling).read_text()) | changes
    (out / "config.json").write_text(json.dumps(hf))
    return out


def by_transformers(path: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    return {k: v for k, v in AutoConfig.from_pretrained(str(path)).to_dict().items() if k not in VOLATILE}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_round_trip(family: str, dtype: str, tmp_path: Path) -> None:
    convert(MODELS / family, tmp_path / "out", dtype)
    want, got = load_file(MODELS / family / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    assert set(got) == set(want)
    for name, x in want.items():
        assert got[name].dtype == kind and got[name].tobytes() == x.astype(kind).tobytes()
    again = open_model(tmp_path / "out")
    assert again.dtype == dtype and again.config == open_model(MODELS / family).config
    # A second time nothing changes any more, in the type that the weights have now.
    convert(tmp_path / "out", tmp_path / "twice")
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_float32_file_is_the_one_that_transformers_wrote(tmp_path: Path) -> None:
    convert(MODELS / "llama", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        MODELS / "llama" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("spelling", ["config.json", "config.v4.json"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_config_reads_the_same_in_transformers(family: str, spelling: str, tmp_path: Path) -> None:
    source = copy(family, tmp_path / "in", spelling)
    convert(source, tmp_path / "out", "bfloat16")
    assert by_transformers(tmp_path / "out") == by_transformers(source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    came = json.loads((source / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    changed = {key for key in written | came if written.get(key) != came.get(key)}
    assert changed <= {"dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters"}


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
)
def test_old_spelling_of_rope_scaling_survives(scaling: dict[str, Any], tmp_path: Path) -> None:
    source = copy("llama", tmp_path / "in", "config.v4.json", rope_scaling=scaling)
    convert(source, tmp_path / "out")
    assert by_transformers(tmp_path / "out") == by_transformers(source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_scaling"] == scaling and written["rope_theta"] == 500000.0


def test_both_kinds_of_reader_find_the_base_of_rope() -> None:
    """transformers 4 reads rope_theta and rope_scaling only, transformers 5 rope_parameters."""
    for spelling in ("config.json", "config.v4.json"):
        hf = json.loads((MODELS / "llama" / spelling).read_text())
        new = exported_config(hf, "float32")
        old_reader = {k: v for k, v in new.items() if k != "rope_parameters"}
        new_reader = {k: v for k, v in new.items() if k not in ("rope_theta", "rope_scaling")}
        assert model_config(old_reader) == model_config(new_reader) == model_config(hf)
    plain = exported_config({k: v for k, v in hf.items() if not k.startswith("rope")}, "float32")
    assert plain["rope_theta"] == 10000.0 and plain["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 10000.0,
    }
    assert plain["rope_scaling"] is None


def test_shards_and_their_index(tmp_path: Path) -> None:
    files = open_model(MODELS / "llama")
    write_model(
        tmp_path / "out", hf_config=files.hf_config, arrays=files.leaves, dtype="float32", max_shard_bytes=70_000
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    want = load_file(MODELS / "llama" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in want.values())
    got: dict[str, np.ndarray] = {}
    for shard in shards:
        part = load_file(tmp_path / "out" / shard)
        assert all(index["weight_map"][name] == shard for name in part)
        assert sum(x.nbytes for x in part.values()) <= 70_000
        got |= part
    assert set(got) == set(want) and all(np.array_equal(got[name], x) for name, x in want.items())
    # Written again in one file, no shard of the first time is left to be read.
    convert(tmp_path / "out", tmp_path / "out", "bfloat16")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert open_model(tmp_path / "out").dtype == "bfloat16"


def test_jax_arrays_and_sharded_arrays(tmp_path: Path) -> None:
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    files = open_model(MODELS / "qwen3")
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    arrays: dict[str, Any] = {}
    for i, (path, leaf) in enumerate(files.leaves.items()):
        spec = PartitionSpec(*([None] * (len(leaf.shape) - 1)), "fsdp")
        arrays[path] = (
            jax.device_put(leaf.read(), NamedSharding(mesh, spec)) if i % 2 else jax.numpy.asarray(leaf.read())
        )
    write_model(tmp_path / "out", hf_config=files.hf_config, arrays=arrays, dtype="float32")
    want, got = load_file(MODELS / "qwen3" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(got[name], x) for name, x in want.items())


def test_other_files_leave_as_they_came(tmp_path: Path) -> None:
    source = copy("llama", tmp_path / "in")
    for file in (GOLDEN / "tokenizers" / "chatml").iterdir():
        shutil.copy(file, source)
    # Sampling values without do_sample, which transformers' own writer refuses.
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 2],  "temperature": 0.6, "do_sample": false}')
    convert(source, tmp_path / "out")
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_bad_dtype_and_wrong_arrays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float32, float16, bfloat16") as caught:
        convert(MODELS / "llama", tmp_path / "out", "int8")
    assert caught.value.name == "dtype-unknown"
    files = open_model(MODELS / "llama")
    leaves = dict(files.leaves)
    del leaves["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        write_model(tmp_path / "out", hf_config=files.hf_config, arrays=leaves, dtype="float32")
    assert list(tmp_path.iterdir()) == []


class Failing:
    def __init__(self, leaf: Any, error: BaseException) -> None:
        self.leaf, self.shape, self.dtype, self.error = leaf, leaf.shape, leaf.dtype, error

    def read(self, index: Any = ()) -> np.ndarray:
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "name"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "no-space-left"),
        (PermissionError(errno.EACCES, "Permission denied"), UserError, "no-permission"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_nothing_half_written_is_left(error: BaseException, raised: type, name: str | None, tmp_path: Path) -> None:
    convert(MODELS / "llama", tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    files = open_model(MODELS / "mistral")
    leaves = dict(files.leaves) | {"model.norm.weight": Failing(files.leaves["model.norm.weight"], error)}
    for out in (tmp_path / "out", tmp_path / "fresh"):
        with pytest.raises(raised) as caught:
            write_model(out, hf_config=files.hf_config, arrays=leaves, dtype="float32")
        assert name is None or caught.value.name == name
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_directory_that_holds_other_things(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.jsonl").write_text("mine")
    convert(MODELS / "llama", out)
    assert (out / "run.jsonl").read_text() == "mine" and open_model(out).dtype == "float32"
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json") as caught:
        convert(MODELS / "llama", out)
    assert caught.value.name == "path-taken"
    with pytest.raises(UserError, match="is a file") as caught:
        convert(MODELS / "llama", out / "run.jsonl")
    assert caught.value.name == "path-taken"


def test_replacing_a_whole_directory(tmp_path: Path) -> None:
    out = tmp_path / "best"
    out.mkdir()
    (out / "old.txt").touch()
    with placing(out, replace=True) as new:
        (new / "new.txt").touch()
        assert (out / "old.txt").exists()
    assert [p.name for p in out.iterdir()] == ["new.txt"] and list(tmp_path.iterdir()) == [out]


def test_files_of_a_tokenizer_object(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "tokenizer"
    shutil.copytree(GOLDEN / "tokenizers" / "chatml", source)
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    tokenizer(["some text", "more"], padding=True, truncation=True, max_length=3)  # a call does not change what it is
    assert files_of_tokenizer(tokenizer) == {file.name: file.read_bytes() for file in source.iterdir()}
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.chat_template = "{{ messages[0].content }}"
    for name, content in files_of_tokenizer(tokenizer).items():
        (tmp_path / name).write_bytes(content)
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again.pad_token == "<|im_end|>" and again.chat_template == tokenizer.chat_template
