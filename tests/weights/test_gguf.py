"""GGUF files. Oracles: the `gguf` package's reader and dequantiser, the tokenizers that the files were made from, sentencepiece."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_dpo.errors import UserError
from jax_dpo.models.config import Rope
from jax_dpo.policy import convert
from jax_dpo.weights import open_model
from jax_dpo.weights.gguf_file import KNOWN_TYPES, read_gguf
from jax_dpo.weights.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_files

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = ["llama-Q4_1.gguf", "llama_k-Q4_K_Q6_K.gguf"]
LLAMA = GOLDEN / "gguf" / FILES[0]


def refused(path: Path, name: str) -> str:
    with pytest.raises(UserError) as caught:
        open_model(path).tokenizer_files()
    assert caught.value.name == name, caught.value
    return str(caught.value)


@pytest.mark.parametrize("file", FILES)
def test_table_and_metadata_are_the_packages(file: str) -> None:
    from gguf import GGUFReader

    ours, theirs = read_gguf(GOLDEN / "gguf" / file), GGUFReader(GOLDEN / "gguf" / file)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.kind, found.offset) == (tensor.tensor_type.name, tensor.data_offset)
        assert found.shape == tuple(int(n) for n in tensor.shape[::-1])


def hugging_face_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of llama.cpp's reordering of q and k, as its converter states it."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("file", FILES)
def test_weights_are_dequantised_as_the_package_does(file: str) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    files = open_model(GOLDEN / "gguf" / file)
    stored = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(GOLDEN / "gguf" / file).tensors}
    for i in range(files.config.num_layers):
        for theirs, ours, heads in [
            ("attn_q", "self_attn.q_proj", files.config.num_heads),
            ("attn_k", "self_attn.k_proj", files.config.num_kv_heads),
            ("attn_v", "self_attn.v_proj", 0),
            ("attn_output", "self_attn.o_proj", 0),
            ("ffn_gate", "mlp.gate_proj", 0),
            ("ffn_up", "mlp.up_proj", 0),
            ("ffn_down", "mlp.down_proj", 0),
            ("attn_norm", "input_layernorm", 0),
            ("ffn_norm", "post_attention_layernorm", 0),
        ]:
            want = stored[f"blk.{i}.{theirs}.weight"]
            want = hugging_face_order(want, heads) if heads else want
            assert np.array_equal(files.leaves[f"model.layers.{ours}.weight"].read((i,)), want), theirs
    assert np.array_equal(files.leaves["model.embed_tokens.weight"].read(), stored["token_embd.weight"])
    assert np.array_equal(files.leaves["lm_head.weight"].read(), stored["output.weight"])
    assert np.array_equal(files.leaves["model.norm.weight"].read(), stored["output_norm.weight"])
    assert all(leaf.dtype == np.float32 for leaf in files.leaves.values()) and files.dtype == "float32"


@pytest.mark.parametrize(
    "index", [(0, slice(3, 9)), (slice(None), slice(0, 64, 7), slice(2, 5)), (1, 5), (..., 3)], ids=str
)
def test_parts_of_a_leaf(index: Any) -> None:
    leaf = open_model(LLAMA).leaves["model.layers.self_attn.q_proj.weight"]
    assert np.array_equal(leaf.read(index), leaf.read()[index])


def test_config_out_of_the_metadata() -> None:
    files = open_model(LLAMA)
    assert (files.config.model_type, files.config.num_layers, files.config.vocab_size) == ("llama", 2, 512)
    assert files.hf_config["rms_norm_eps"] == 1e-5 and files.config.layer_ropes[0] == Rope(10000.0)
    assert (files.hf_config["eos_token_id"], files.hf_config["pad_token_id"]) == (2, 0)
    assert not files.config.tie_word_embeddings
    assert json.loads(files.generation_config or b"") == {
        "_from_model_config": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def test_converted_directory(tmp_path: Path) -> None:
    convert(LLAMA, tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [
        *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    again, first = open_model(tmp_path / "out"), open_model(LLAMA)
    assert again.config == first.config
    for path, leaf in first.leaves.items():
        assert np.array_equal(again.leaves[path].read(), leaf.read())


def test_tokenizer_of_the_file_is_the_one_that_it_was_made_from(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    convert(LLAMA, tmp_path / "out")
    ours = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(str(GOLDEN / "tokenizers" / "chatml"))
    rows = json.loads((GOLDEN / "tokenization" / "text_explicit_chatml.json").read_text())["rows"]
    texts = [row[key] for row in rows for key in ("prompt", "chosen", "rejected")]
    texts += ["It's 2026.", "<|im_start|>user\nHi<|im_end|>\n", "Na\u00efve \u6771\u4eac \U0001f600\n\n  x"]
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    assert (ours.eos_token_id, ours.pad_token_id, ours.bos_token_id) == (2, 0, None)
    chat = [{"role": "user", "content": "Hi"}]
    render = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(chat, **render) == theirs.apply_chat_template(chat, **render)
    assert ours.decode(ours("<|im_start|>x<|im_end|>")["input_ids"], skip_special_tokens=True) == "x"


def test_sentencepiece_vocabulary() -> None:
    """Oracle: ids by the sentencepiece library for a vocabulary that it was trained to (golden)."""
    from tokenizers import Tokenizer

    golden = json.loads((GOLDEN / "gguf" / "sentencepiece.json").read_text())
    metadata = {f"tokenizer.ggml.{key}": golden[key] for key in ("tokens", "scores", "token_type")}
    metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    tokenizer = Tokenizer.from_str(tokenizer_files(metadata, Path("m.gguf"))["tokenizer.json"].decode())
    assert len(golden["cases"]) > 30
    for case in golden["cases"]:
        assert tokenizer.encode(case["text"]).ids == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]


def small_bpe(pre: str, **more: Any) -> dict[str, Any]:
    """A byte-level vocabulary: three control tokens, the 256 bytes, and `12`, `123`, `he`."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<bos>", "<eos>", "<user>", *sorted(ByteLevel.alphabet()), "12", "123", "he", "[PAD]"]
    kinds = [3, 3, 4, *[1] * (len(tokens) - 4), 5]
    metadata = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": ["1 2", "12 3", "h e"]}
    metadata |= {"bos_token_id": 0, "eos_token_id": 1} | more
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def words(pre: str, text: str, **more: Any) -> list[str]:
    from tokenizers import Tokenizer

    return (
        Tokenizer.from_str(tokenizer_files(small_bpe(pre, **more), Path("m"))["tokenizer.json"].decode())
        .encode(text)
        .tokens
    )


def test_ways_of_cutting_words() -> None:
    assert words("gpt-2", "1234") == ["123", "4"]
    assert words("smollm", "1234") == words("qwen2", "1234") == ["1", "2", "3", "4"]
    assert words("llama-bpe", "1234123") == ["<bos>", "123", "4", "12", "3"]
    assert words("qwen2", "e\u0301") == words("qwen2", "\u00e9") != words("gpt-2", "e\u0301")
    assert words("gpt-2", "<user>he", add_bos_token=True, add_eos_token=True) == ["<bos>", "<user>", "he", "<eos>"]
    files = tokenizer_files(small_bpe("gpt-2"), Path("m"))
    assert "[PAD]" not in json.loads(files["tokenizer.json"])["model"]["vocab"]


def test_patterns_are_those_of_transformers() -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    def pattern(pre: str) -> str:
        return PRE_TOKENIZERS[pre]["pretokenizers"][0]["pattern"]["Regex"]

    assert pattern("qwen2") == PRETOKENIZE_REGEX
    assert pattern("llama-bpe") == TikTokenConverter().pattern


def test_unknown_tokenizers_are_named() -> None:
    for metadata, word in [
        (small_bpe("tekken"), "'tekken'"),
        (small_bpe("gpt-2", model="bert"), "'bert'"),
    ]:
        with pytest.raises(UserError, match=word) as caught:
            tokenizer_files(metadata, Path("m.gguf"))
        assert caught.value.name == "tokenizer-unknown"
    with pytest.raises(UserError, match="merges") as caught:
        tokenizer_files(small_bpe("gpt-2", merges=None), Path("m.gguf"))
    assert caught.value.name == "gguf-metadata"


def test_every_type_that_is_listed_can_be_dequantised() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for kind in map(GGMLQuantizationType.__getitem__, KNOWN_TYPES):
        block, size = GGML_QUANT_SIZES[kind]
        assert dequantize(np.zeros((2, size), np.uint8), kind).shape == (2, block)


def test_a_name_that_says_another_type_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "llama-q4_0.gguf"
    file.write_bytes(LLAMA.read_bytes())
    a, b = open_model(file).leaves["lm_head.weight"].read(), open_model(LLAMA).leaves["lm_head.weight"].read()
    assert np.array_equal(a, b)


def test_unknown_type_names_the_tensor_and_the_types_that_are_known(tmp_path: Path) -> None:
    data = bytearray(LLAMA.read_bytes())
    key = b"blk.0.attn_q.weight"
    at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
    at += 4 + 8 * struct.unpack_from("<I", data, at)[0]
    struct.pack_into("<I", data, at, 999)
    (tmp_path / "m.gguf").write_bytes(data)
    text = refused(tmp_path / "m.gguf", "tensor-type-unknown")
    assert "blk.0.attn_q.weight has type 999" in text and "Q4_1" in text


def test_files_that_are_cut_off_or_something_else(tmp_path: Path) -> None:
    file, whole = tmp_path / "m.gguf", LLAMA.read_bytes()
    for content, word in [
        (whole[:-1], "output.weight should end at byte"),
        (whole[:3000], "ends inside tokenizer.ggml.tokens"),
        (whole[:20], "ends inside"),
        (b"", "the first four bytes"),
        (b"PK\x03\x04" + bytes(50), "not with GGUF"),
        (b"version https://git-lfs", "Git LFS pointer"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(20), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(20), "big-endian"),
    ]:
        file.write_bytes(content)
        assert word in refused(file, "gguf-broken"), word


def write(path: Path, arch: str = "llama", **keys: Any) -> Path:
    """A small model made with the package's writer; a key of None is left out."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch)
    values = {
        "embedding_length": 8,
        "block_count": 1,
        "feed_forward_length": 16,
        "attention.head_count": 2,
        "context_length": 64,
        "attention.layer_norm_rms_epsilon": 1e-6,
    } | {key.replace("__", "."): value for key, value in keys.items()}
    freqs = values.pop("rope_freqs", None)
    biases = values.pop("biases", False)
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (10, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    shapes |= {f"blk.0.attn_{x}": (8, 8) for x in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    for name in ("q", "k", "v") if biases else ():
        writer.add_tensor(f"blk.0.attn_{name}.bias", random.standard_normal(8).astype(np.float32))
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(freqs, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_qwen2_is_not_permuted_and_has_biases(tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = write(tmp_path / "m.gguf", "qwen2", biases=True)
    files = open_model(path)
    stored = {t.name: t.data for t in GGUFReader(path).tensors}
    assert files.config.attention_bias and files.config.tie_word_embeddings
    assert np.array_equal(
        files.leaves["model.layers.self_attn.q_proj.weight"].read((0,)), stored["blk.0.attn_q.weight"]
    )
    assert np.array_equal(files.leaves["model.layers.self_attn.k_proj.bias"].read((0,)), stored["blk.0.attn_k.bias"])


def test_stretched_rope(tmp_path: Path) -> None:
    stretched = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    assert open_model(write(tmp_path / "a.gguf", **stretched)).config.layer_ropes[0] == Rope(10000.0, "linear", 4.0)
    # Llama 3's frequencies are stored as divisors; head size 64 as in Llama 3.2.
    theta, wide = 500000.0, {"attention__head_count": 1, "embedding_length": 8}
    want = Rope(theta, "llama3", 32.0, 8192, 1.0, 4.0)
    divisors = Rope(theta).inverse_frequencies(8) / want.inverse_frequencies(8)
    assert divisors.max() == pytest.approx(32) and divisors.min() == 1
    found = open_model(write(tmp_path / "b.gguf", rope_freqs=divisors, rope__freq_base=theta, **wide))
    assert found.config.layer_ropes[0] == want
    bent = write(tmp_path / "c.gguf", rope_freqs=divisors**0.5, rope__freq_base=theta, **wide)
    assert "rope_freqs.weight" in refused(bent, "gguf-metadata")


def test_what_the_metadata_may_not_say(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    assert "'mamba'" in refused(write(file, "mamba"), "family-unknown")
    assert "llama.expert_count = 8" in refused(write(file, expert_count=8), "gguf-metadata")
    assert "llama.block_count" in refused(write(file, block_count=None), "gguf-metadata")
    assert "rope.dimension_count is 2" in refused(write(file, rope__dimension_count=2), "gguf-metadata")
    assert "'longrope'" in refused(
        write(file, rope__scaling__type="longrope", rope__scaling__factor=2.0), "rope-unknown"
    )
    assert "9 of 20 tensors are missing" in refused(write(file, block_count=2), "tensors-differ")
    assert "by the configuration it should be [32, 8]" in refused(write(file, feed_forward_length=32), "shape-differs")
    # An expert count of zero says nothing.
    assert open_model(write(file, expert_count=0)).config.num_layers == 1
