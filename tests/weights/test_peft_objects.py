"""PEFT models in memory. Oracle: the same base and adapter read from their files; the names are those of peft 0.21's state_dict
(tests/parity/test_peft_live.py reads a real one)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_dpo import LoraConfig, load_model
from jax_dpo.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
KINDS = GOLDEN / "adapters" / "kinds"
START = GOLDEN / "training" / "start" / "llama"
PREFIX = "base_model.model."


class Tensor:
    """What is used of a torch tensor."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, "torch.float32"

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.array[index])

    def detach(self) -> Tensor:
        return self

    float = cpu = detach

    def numpy(self) -> np.ndarray:
        return self.array


class PeftLike:
    """What is used of a peft.PeftModel, with an adapter of PEFT's own files on it, and perhaps another of other numbers."""

    name_or_path = str(START)

    def __init__(self, kind: str, *, active: Any = "default", more: tuple[str, ...] = ()) -> None:
        from transformers import AutoConfig

        self.config = AutoConfig.from_pretrained(str(START))
        raw = json.loads((KINDS / kind / "final" / "adapter_config.json").read_text())
        self.peft_config = {name: LoraConfig.of(raw) for name in ("default", *more)}
        self.active_adapters = active
        base, adapter = load_file(START / "model.safetensors"), {}
        for name, x in load_file(KINDS / kind / "final" / "adapter_model.safetensors").items():
            for owner, y in [("default", x), *((other, x + 1) for other in more)]:
                stem, _, leaf = name.rpartition(".")
                if ".lora_" not in name:
                    adapter[f"{stem}.modules_to_save.{owner}.{leaf}"] = y
                elif leaf == "lora_magnitude_vector":
                    adapter[f"{name}.{owner}.weight"] = y
                else:
                    adapter[f"{stem}.{owner}.{leaf}"] = y
        saved = {n.partition(".modules_to_save.")[0] for n in adapter if ".modules_to_save." in n}
        adapted = {n.partition(".lora_")[0] for n in adapter if ".lora_" in n}
        for name, x in base.items():
            stem, _, leaf = (PREFIX + name).rpartition(".")
            inside = "original_module." if stem in saved else "base_layer." if stem in adapted else ""
            adapter[f"{stem}.{inside}{leaf}"] = x
        self.tensors = {name: Tensor(x) for name, x in adapter.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def modules(self) -> list[Any]:
        return []


@pytest.mark.parametrize("kind", ["dora", "saved"])
def test_base_and_active_adapter_are_those_of_the_files(kind: str) -> None:
    """A second adapter on the same model does not leak into it."""
    want = load_model(START, adapter=KINDS / kind / "final")
    got = load_model(PeftLike(kind, active=["default"], more=("other",)))
    assert got.config == want.config and set(got.leaves) == set(want.leaves) and not got.adapter_is_new
    for path, leaf in want.leaves.items():
        assert np.array_equal(got.leaves[path].read(), leaf.read()), path
    for path, leaf in want.base().leaves.items():
        assert np.array_equal(got.base().leaves[path].read(), leaf.read()), path


def test_the_adapter_is_a_copy() -> None:
    model = PeftLike("dora")
    policy = load_model(model)
    path = "model.layers.self_attn.q_proj.lora_b"
    before = policy.leaves[path].read()
    for tensor in model.tensors.values():
        tensor.array += 1
    assert np.array_equal(policy.leaves[path].read(), before)


def test_what_acts_on_the_model_must_be_one_adapter() -> None:
    for model in (PeftLike("dora", active=["default", "b"], more=("b",)), PeftLike("dora", active="gone")):
        with pytest.raises(UserError, match="exactly one must be") as caught:
            load_model(model)
        assert caught.value.name == "model-object-unsupported"

    class Merged(PeftLike):
        def modules(self) -> list[Any]:
            return [type("Layer", (), {"merged_adapters": ["default"]})()]

    with pytest.raises(UserError, match="unmerge_adapter"):
        load_model(Merged("dora"))
    model = PeftLike("dora")
    model.peft_config["default"].bias = "all"
    with pytest.raises(UserError, match=r"the adapter on .*bias = 'all'"):
        load_model(model)
