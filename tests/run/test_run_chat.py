"""A base model made a chat model: template and end of an answer come in by options and go out with the model.

Oracles: transformers' AutoTokenizer on the written directories; the recorded tokenizer that has the same template from the start.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoTokenizer

from jax_dpo import DPOConfig, DPOTrainer, load_model
from jax_dpo.trainer.datasets import Tokenizer
from jax_dpo.trainer.samples import stop_ids_of

TEMPLATE = tiny.TOKENIZER / "chat_template.jinja"
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
ENDOFTEXT, IM_END = 0, 2


def edit(path: Path, **changes: Any) -> None:
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}, indent=2))


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def render(directory: Path) -> str:
    return str(AutoTokenizer.from_pretrained(str(directory)).apply_chat_template(TALK, tokenize=False))


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a base model is: no template, answers end with <|endoftext|>."""
    out = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(model, out)
    (out / "chat_template.jinja").unlink()
    edit(out / "tokenizer_config.json", eos_token="<|endoftext|>")
    edit(out / "generation_config.json", eos_token_id=ENDOFTEXT)
    edit(out / "config.json", eos_token_id=ENDOFTEXT)
    return out


@pytest.fixture(scope="module")
def chat(usual: dict[str, Any], base: Path, data: Path) -> dict[str, Any]:
    return {
        **usual,
        "model_name_or_path": base,
        "dataset_name": data / "chat.jsonl",
        "max_steps": 1,
        "save_steps": 1,
        "chat_template_path": TEMPLATE,
        "eos_token": "<|im_end|>",
    }


def train(options: dict[str, Any], out: Path, **more: Any) -> tiny.Ended:
    return tiny.jax_dpo("train", *tiny.flags({**options, **more}), "--output_dir", out)


def warned(out: Path) -> list[str]:
    (start,) = tiny.records(out, "start")
    return [w for w in start["plan"]["warnings"] if "the answers end" in w or "marks" in w]


@pytest.fixture(scope="module")
def whole(chat: dict[str, Any], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all parameters, evaluated once, so that there is a best."""
    out = tmp_path_factory.mktemp("whole") / "run"
    held = {"eval_dataset": data / "chat.jsonl", "eval_strategy": "steps", "eval_steps": 1}
    assert train(chat, out, **held).code in (0, 3)
    return out


@pytest.mark.parametrize("folder", ["final", "best"])
def test_what_comes_out_speaks_the_template_and_stops_where_the_data_stop(whole: Path, base: Path, folder: str) -> None:
    out = whole / folder
    assert (out / "chat_template.jinja").read_bytes() == TEMPLATE.read_bytes()
    assert render(out) == render(tiny.TOKENIZER)
    assert AutoTokenizer.from_pretrained(str(out)).eos_token_id == IM_END
    assert read(out / "tokenizer_config.json") == {**read(base / "tokenizer_config.json"), "eos_token": "<|im_end|>"}
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    generation = {**read(base / "generation_config.json"), "eos_token_id": [ENDOFTEXT, IM_END]}
    assert read(out / "generation_config.json") == generation
    assert read(out / "config.json")["eos_token_id"] == ENDOFTEXT
    policy = load_model(out)
    assert stop_ids_of(policy, Tokenizer(None, policy).loaded) == [ENDOFTEXT, IM_END]
    assert warned(whole) == []


def test_the_data_are_those_of_a_model_that_has_the_template(base: Path, model: Path, data: Path) -> None:
    found = [
        DPOTrainer(
            str(where),
            args=DPOConfig("unused", chat_template_path=template, eos_token=end),
            train_dataset=str(data / "chat.jsonl"),
        ).train_dataset
        for where, template, end in ((base, str(TEMPLATE), "<|im_end|>"), (model, None, None), (base, str(model), None))
    ]
    assert found[0] == found[1] == found[2]


def test_an_adapter_carries_the_tokenizer_that_it_was_trained_with(
    chat: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert train(chat, out, use_peft=True, lora_r=2).code == 0
    final = out / "final"
    assert render(final) == render(tiny.TOKENIZER)
    assert read(final / "generation_config.json")["eos_token_id"] == [ENDOFTEXT, IM_END]
    assert tiny.jax_dpo("generate", "--model", final, "--prompt", "The long child", "--max_new_tokens", 4).code == 0
    held = {"model_name_or_path": final, "eval_dataset": data / "chat.jsonl"}
    assert tiny.jax_dpo("evaluate", *tiny.flags(held)).code == 0
    assert tiny.jax_dpo("convert", final, tmp_path / "merged").code == 0
    assert render(tmp_path / "merged") == render(tiny.TOKENIZER)
    assert read(tmp_path / "merged" / "generation_config.json")["eos_token_id"] == [ENDOFTEXT, IM_END]


def test_an_end_that_is_in_no_stop_list_is_said_before_the_run(
    chat: dict[str, Any], base: Path, model: Path, tmp_path: Path
) -> None:
    """marin-community/marin#4153: models that never stopped."""
    del chat["eos_token"]
    ended = tiny.jax_dpo("check", chat["dataset_name"], "--model", base, "--chat_template_path", TEMPLATE)
    assert "the answers end with <|im_end|> (id 2), which is no stop token" in ended.out
    assert "eos_token: '<|im_end|>' adds it" in ended.out
    assert "no stop token" not in tiny.jax_dpo("check", chat["dataset_name"], "--model", model).out
    # Only the tokenizer knows it: transformers reads generation_config.json, and config.json where there is none.
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    edit(tmp_path / "model" / "config.json", eos_token_id=None)
    ended = tiny.jax_dpo("check", chat["dataset_name"], "--model", tmp_path / "model")
    assert "is the tokenizer's eos_token but not in config.json" in ended.out
    train(chat, tmp_path / "run", model_name_or_path=tmp_path / "model", chat_template_path=None)
    assert len(warned(tmp_path / "run")) == 1
    train(
        chat, tmp_path / "told", model_name_or_path=tmp_path / "model", chat_template_path=None, eos_token="<|im_end|>"
    )
    assert warned(tmp_path / "told") == []
    assert read(tmp_path / "told" / "final" / "generation_config.json") == {"eos_token_id": [IM_END]}


def test_a_template_without_an_end_and_marks_that_are_cut_are_said(
    chat: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}\n{% endfor %}")
    said = tiny.jax_dpo("check", chat["dataset_name"], "--model", base, "--chat_template_path", template).out
    assert "the answers end without a token that tells a server to stop" in said
    assert "<|turn|> (" in said


def test_readers_of_tokenizer_config_alone_find_the_template_on_request(
    chat: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    assert train(chat, tmp_path / "run", template_in_tokenizer_config=True).code == 0
    final = tmp_path / "run" / "final"
    assert read(final / "tokenizer_config.json")["chat_template"] == TEMPLATE.read_text()
    (final / "chat_template.jinja").unlink()
    assert render(final) == render(tiny.TOKENIZER)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chat_template_path": "missing.jinja"}, "missing.jinja is not there"),
        ({"chat_template_path": "pairs.txt"}, "ends in none of .jinja"),
        ({"chat_template_path": "broken.jinja"}, "line 2 of the template"),
        ({"chat_template_path": "."}, "has no chat template"),
        ({"eos_token": "<|stop|>"}, "'<|stop|>' is no token of the tokenizer of"),
        ({"chat_template_path": None, "template_in_tokenizer_config": True}, "Name one with chat_template_path"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_writes_nothing(
    chat: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.txt").write_text("{{ messages }}")
    Path("broken.jinja").write_text("{{ messages }}\n{% if %}")
    ended = train({**chat, **options}, tmp_path / "run")
    assert ended.code == 2
    assert words in ended.err
    assert not (tmp_path / "run").exists()
