"""What comes out of a run is what others read. Oracles: the files as they came in, and transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from cases import TESTS, edit, log_probability
from served_rules import served_model
from transformers import AutoTokenizer

pytestmark = [pytest.mark.usefixtures("inputs"), pytest.mark.slow]
CHAT = [{"role": "user", "content": "hi"}]
NEW = {
    "dtype",
    "torch_dtype",
    "transformers_version",
    "tie_word_embeddings",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
}
"""keys of config.json that an export may write"""


def one_step(model: Path, **more: Any) -> Path:
    """The `final` directory of a run of one step that was evaluated once, so that there is a `best` too."""
    options = {
        "model_name_or_path": model,
        "dataset_name": "default-system-turn.jsonl",
        "max_steps": 1,
        "bf16": "false",
    }
    options |= {"eval_dataset": "default-system-turn.jsonl", "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options |= {"per_device_train_batch_size": 2, "learning_rate": 1e-6, **more}
    ended = tiny.jax_dpo("train", *tiny.flags(options), "--output_dir", "out")
    assert ended.code in (0, 3), ended.err
    if not options.get("use_peft"):
        assert served_model(Path("out/final")).tensors.keys() == served_model(Path("out/best")).tensors.keys()
    return Path("out/final")


def same_files(model: Path, out: Path, names: list[str]) -> None:
    for name in names:
        assert (out / name).read_bytes() == (model / name).read_bytes(), name


def config(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


def test_three_eos_opinions(start_of: Callable[..., Path]) -> None:
    """marin-community/marin#4153, QwenLM/Qwen3#927: config 0, generation_config [0, 2], tokenizer 2."""
    model = start_of(eos_token_id=0)
    edit(model / "generation_config.json", eos_token_id=[0, 2], pad_token_id=0)
    for out in (one_step(model), Path("out/best")):
        assert config(out)["eos_token_id"] == 0
        same_files(model, out, ["generation_config.json"])


@pytest.mark.parametrize("inside", [False, True])
def test_template_place(start_of: Callable[..., Path], inside: bool) -> None:
    """hiyouga/LlamaFactory#8399, huggingface/text-generation-inference#3247: in a file of its own, or in tokenizer_config.json."""
    model = start_of()
    if inside:
        template = model / "chat_template.jinja"
        edit(model / "tokenizer_config.json", chat_template=template.read_text(), backend=None, extra_special_tokens={})
        template.unlink()
    names = sorted(p.name for p in model.iterdir() if p.name not in ("config.json", "model.safetensors"))
    rendered = AutoTokenizer.from_pretrained(str(model)).apply_chat_template(CHAT, tokenize=False)
    for out in (one_step(model), Path("out/best")):
        same_files(model, out, names)
        assert (out / "chat_template.jinja").exists() == (not inside)
        assert AutoTokenizer.from_pretrained(str(out)).apply_chat_template(CHAT, tokenize=False) == rendered


def test_tokenizer_list(start_of: Callable[..., Path]) -> None:
    """modelscope/ms-swift#8352, ml-explore/mlx-lm#661: tokenizer files leave as they came, in the form of transformers 4 too."""
    model = start_of()
    edit(
        model / "tokenizer_config.json",
        backend=None,
        extra_special_tokens={},
        additional_special_tokens=["<|im_start|>"],
    )
    out = one_step(model)
    assert "transformers 4 does not load this tokenizer" not in (out.parent / "report.html").read_text()
    same_files(model, out, ["tokenizer_config.json", "tokenizer.json"])
    assert AutoTokenizer.from_pretrained(str(out))("<|im_start|>user\nhi<|im_end|>\n")["input_ids"] == [
        1,
        310,
        268,
        201,
        74,
        75,
        2,
        201,
    ]


def test_tokenizer_list_of_transformers_5(start: Path) -> None:
    """The form that 4.56 does not load, before and after: said in the report."""
    out = one_step(start)
    same_files(start, out, ["tokenizer_config.json", "tokenizer.json"])
    said = "transformers 4 does not load this tokenizer, before the run or after it: extra_special_tokens is a list"
    assert said in (out.parent / "report.html").read_text()


def test_sampling_without_do_sample(start_of: Callable[..., Path]) -> None:
    """huggingface/transformers#29988, QwenLM/Qwen3-ASR#210: the end of a run does not fail on it."""
    model = start_of()
    edit(model / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9)
    same_files(model, one_step(model), ["generation_config.json"])


@pytest.mark.parametrize("old", [False, True])
def test_rope_theta_place(start_of: Callable[..., Path], old: bool) -> None:
    """vllm-project/vllm#44158, #42624: the base of RoPE where readers of both transformers look."""
    model = start_of()
    if old:
        came = config(model)
        theta, dtype = came["rope_parameters"]["rope_theta"], came["dtype"]
        edit(model / "config.json", rope_parameters=None, dtype=None, rope_theta=theta, torch_dtype=dtype)
    assert log_probability(model) == pytest.approx(-36.9985, abs=5e-4)
    written = config(one_step(model, learning_rate=0))
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6
    assert written["dtype"] == written["torch_dtype"] == "float32"
    assert log_probability(Path("out/final")) == pytest.approx(-36.9985, abs=5e-4)


def test_unservable_result(tmp_path: Path) -> None:
    """AI-Hypercomputer/maxtext#2867: an activation under both of its names stays under both."""
    model = tmp_path / "gemma2"
    shutil.copytree(TESTS / "golden" / "training" / "start" / "gemma2", model)
    shutil.copytree(TESTS / "golden" / "tokenizers" / "chatml", model, dirs_exist_ok=True)
    edit(model / "config.json", hidden_act="gelu_pytorch_tanh", max_position_embeddings=1024)
    came, written = config(model), config(one_step(model))
    assert {k: v for k, v in written.items() if k not in NEW} == {k: v for k, v in came.items() if k not in NEW}


@pytest.mark.parametrize("more", [{"lora_modules_to_save": "norm"}, {"use_dora": "true"}, {}])
def test_served_adapters(start: Path, more: dict[str, str]) -> None:
    """vllm-project/vllm#9280: an adapter that servers refuse; that is said before the run, with the way out, which works."""
    out = one_step(start, use_peft="true", **more)
    assert (out / "adapter_config.json").exists()
    (warnings,) = [r["plan"]["warnings"] for r in tiny.records(Path("out"), "start")]
    said = [w for w in warnings if "vLLM does not load adapters with" in w]
    assert len(said) == bool(more)
    assert not more or "vLLM does not load" in (Path("out") / "report.html").read_text()
    if more:
        command = said[0].partition("jax-dpo ")[2].partition(" after the run")[0].split()
        assert tiny.jax_dpo(*command).code == 0
        assert (Path("out/merged") / "model.safetensors").exists() and not (
            Path("out/merged") / "adapter_config.json"
        ).exists()
