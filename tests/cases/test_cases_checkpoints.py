"""Checkpoints as others export them. Oracles: log-probabilities that transformers and PEFT give, and the same weights in plain form."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
from cases import GOLDEN, adapter, edit, llama, log_probability, shards

from jax_dpo import load_model
from jax_dpo.errors import UserError

PLAIN = -30.1739  # of the recorded llama


def test_missing_shard(tmp_path: Path) -> None:
    """sgl-project/sglang#32279, Blaizzy/mlx-vlm#1827: the index names a shard that is not there."""
    model = llama(tmp_path / "a")
    names = [f"model-0000{i}-of-00006.safetensors" for i in range(1, 7)]
    parts = shards(model, names)
    (model / names[2]).unlink()
    total = sum(map(len, parts.values()))
    with pytest.raises(
        UserError, match=f"{names[2]} is missing, it should hold {len(parts[names[2]])} of {total} tensors"
    ):
        load_model(model)
    # All are there, under names that the index does not know.
    for i, name in enumerate(names):
        if (model / name).exists():
            (model / name).rename(model / f"part-{i}.safetensors")
    with pytest.raises(UserError) as found:
        load_model(model)
    assert all(name in str(found.value) for name in names)
    assert all(f"part-{i}.safetensors" in str(found.value) for i in (0, 1, 3, 4, 5))


def test_odd_shard_names(tmp_path: Path) -> None:
    """unslothai/unsloth-zoo#900: shards that only the index can find."""
    model = llama(tmp_path / "a")
    shards(model, [f"model.safetensors-0000{i}-of-00002.safetensors" for i in (1, 2)])
    assert log_probability(model) == pytest.approx(PLAIN, abs=5e-4)


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("type", PLAIN),
        ("both", PLAIN),
        ("linear", -34.5687),
        ("unknown", "rope_scaling.type is 'spiral'"),
        ("disagree", "rope_type = 'dynamic' and type = 'linear'"),
    ],
)
def test_rope_old_key(kind: str, want: float | str, tmp_path: Path) -> None:
    """vllm-project/vllm#9481: rope_scaling as it was spelt in 2023."""
    import json

    model = llama(tmp_path / "a", "config.v4.json")
    now = json.loads((model / "config.json").read_text())["rope_scaling"]
    old = {("type" if key == "rope_type" else key): value for key, value in now.items()}
    scaling = {
        "type": old,
        "both": {**old, **now},
        "linear": {"type": "linear", "factor": 4.0},
        "unknown": {"type": "spiral", "factor": 4.0},
        "disagree": {"type": "linear", "rope_type": "dynamic", "factor": 4.0},
    }[kind]
    edit(model / "config.json", rope_scaling=scaling)
    if isinstance(want, float):
        assert log_probability(model) == pytest.approx(want, abs=5e-4)
        return
    with pytest.raises(UserError, match=want):
        load_model(model)


def test_tied_base_own_head(start: Path, tmp_path: Path) -> None:
    """huggingface/peft#2777, #2018: a tied base, and an adapter with a head of its own: refused by name, not tied in silence."""
    with pytest.raises(UserError, match="modules_to_save names lm_head, but the model ties its head to its embedding"):
        load_model(start, adapter=adapter(tmp_path / "adapter", str(start), modules_to_save=["lm_head"]))


def test_leftover_adapter(start: Path, tmp_path: Path) -> None:
    """huggingface/peft#1381: full weights and the adapter of an older run in one directory; base_model_name_or_path null."""
    both = shutil.copytree(start, tmp_path / "both")
    adapter(both, None)
    with pytest.raises(UserError, match="holds a whole model and, beside it, an adapter"):
        load_model(both)
    apart = adapter(tmp_path / "apart", None)
    assert log_probability(start) == pytest.approx(-36.9985, abs=5e-4)
    assert log_probability(start, apart) == pytest.approx(-36.8464, abs=5e-4)


def test_gguf_wrong_name(tmp_path: Path) -> None:
    """huggingface/transformers#31847, EricLBuehler/mistral.rs#2100: called q4_0, holds Q4_1; a type that nobody knows."""
    data = bytearray((GOLDEN / "gguf" / "llama-Q4_1.gguf").read_bytes())
    named, right = tmp_path / "llama-q4_0.gguf", GOLDEN / "gguf" / "llama-Q4_1.gguf"
    named.write_bytes(data)
    assert log_probability(named) == log_probability(right)
    key = b"blk.0.attn_q.weight"
    at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
    at += 4 + 8 * struct.unpack_from("<I", data, at)[0]
    struct.pack_into("<I", data, at, 999)
    named.write_bytes(data)
    with pytest.raises(
        UserError, match=r"blk.0.attn_q.weight has type 999; the types that can be read are F32, F16.*Q4_1"
    ):
        load_model(named)


def test_pickle_only(start: Path, tmp_path: Path) -> None:
    """jthickstun/anticipation#14, AI-Hypercomputer/jetstream-pytorch#135: nothing is unpickled."""
    import sys

    model = shutil.copytree(start, tmp_path / "a")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(UserError, match=r"is not read. Convert it once.*save_pretrained"):
        load_model(model)
    assert "torch" not in sys.modules
