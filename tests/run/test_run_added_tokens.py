"""Tokens that a model does not have: rows for them, trained and exported, with an adapter too.

Oracles: numpy on the files that came in (the mean of the rows); KL and margin 0 at the start; transformers' AutoTokenizer on what is
written; an adapter and the merged directory give the same logits.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_run_chat import edit, read
from transformers import AutoTokenizer

from jax_dpo import DPOConfig, DPOTrainer, LoraConfig, load_model
from jax_dpo.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
TURN, STOP = 512, 513
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def options(usual: dict[str, Any], data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    template = tmp_path_factory.mktemp("template") / "turns.jinja"
    template.write_text(TEMPLATE)
    return {
        **usual,
        "dataset_name": data / "chat.jsonl",
        "eval_dataset": data / "chat.jsonl",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "chat_template_path": template,
        "eos_token": "<|stop|>",
        "added_special_tokens": ["<|turn|>", "<|stop|>"],
    }


def train(options: dict[str, Any], out: Path, **more: Any) -> tiny.Ended:
    return tiny.jax_dpo("train", *tiny.flags({**options, **more}), "--output_dir", out)


def check_start(out: Path) -> None:
    first = tiny.records(out, "eval")[0]
    assert abs(first["eval_loss"] - math.log(2)) < 2e-7
    assert first["eval_kl_divergence"] == first["eval_rewards/margins"] == 0


def check_tokenizer(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    assert (tokenizer.eos_token_id, len(tokenizer)) == (STOP, 514)
    talk = [{"role": "user", "content": "hi"}]
    ids = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i >= 512] == [TURN, STOP]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi\n"
    assert STOP in read(directory / "generation_config.json")["eos_token_id"]


def logits(model: Path) -> np.ndarray:
    return np.asarray(load_model(model)(np.array([[TURN, 3, 5, STOP, 201, TURN, 7]])))


@pytest.fixture(scope="module")
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    ended = train(options, out)
    assert ended.code in (0, 3), ended.err
    return out


def test_new_rows_are_trained_and_exported(whole: Path, model: Path) -> None:
    check_start(whole)
    (start,) = tiny.records(whole, "start")
    (said,) = [w for w in start["plan"]["warnings"] if "added tokens" in w]
    assert "<|turn|> (512), <|stop|> (513)" in said and "grows from 512 to 514 rows" in said
    before = tiny.tensors(model)
    for folder in ("final", "best"):
        out = whole / folder
        check_tokenizer(out)
        assert read(out / "config.json")["vocab_size"] == 514
        after = tiny.tensors(out)
        for name in (EMBEDDING, HEAD):
            assert after[name].shape == (514, 32)
            moved = np.abs(after[name][512:] - before[name].mean(0))
            assert moved.max(axis=1).min() > 1e-5 and moved.max() < 0.01
        # Two tokens that began alike have parted.
        assert np.abs(after[EMBEDDING][TURN] - after[EMBEDDING][STOP]).max() > 1e-5


@pytest.mark.slow
def test_a_run_goes_on_and_its_model_is_evaluated_and_answers(
    whole: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "verdict.json").unlink()
    ended = train(options, tmp_path / "run", resume_from_checkpoint=True)
    assert ended.code in (0, 3), ended.err
    for name, tensor in tiny.tensors(whole / "final").items():
        np.testing.assert_array_equal(tiny.tensors(tmp_path / "run" / "final")[name], tensor)
    assert tiny.jax_dpo("generate", "--model", whole / "final", "--prompt", "The", "--max_new_tokens", 4).code == 0
    held = {"model_name_or_path": whole / "final", "eval_dataset": options["eval_dataset"]}
    assert tiny.jax_dpo("evaluate", *tiny.flags(held)).code == 0
    # Named once more they are there already: nothing grows.
    again = DPOTrainer(str(whole / "final"), args=DPOConfig("unused", added_special_tokens=["<|turn|>", "<|stop|>"]))
    assert again.model.config.vocab_size == 514 and again.notes == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_adapter_trains_the_rows_and_carries_them(options: dict[str, Any], tmp_path: Path, family: str) -> None:
    """qwen3 ties its head to its embedding, llama does not."""
    model = tiny.make_model(tmp_path / family, family)
    out = tmp_path / "run"
    ended = train(options, out, model_name_or_path=model, use_peft=True, lora_r=2)
    assert ended.code in (0, 3), ended.err
    check_start(out)
    tied = family == "qwen3"
    (start,) = tiny.records(out, "start")
    assert [w for w in start["plan"]["warnings"] if "trained whole beside it" in w]
    final = out / "final"
    check_tokenizer(final)
    config = read(final / "adapter_config.json")
    assert config["modules_to_save"] == (["embed_tokens"] if tied else ["embed_tokens", "lm_head"])
    assert config["ensure_weight_tying"] == tied
    held = tiny.tensors(final, "adapter_model.safetensors")
    table = tiny.tensors(model)[EMBEDDING]
    for name in (EMBEDDING, HEAD):
        rows = held[f"base_model.model.{name}"]
        assert rows.shape == (514, 32)
    assert (np.abs(held[f"base_model.model.{EMBEDDING}"][512:] - table.mean(0)).max(1) > 1e-5).all()
    assert tiny.jax_dpo("convert", final, tmp_path / "merged").code == 0
    assert tiny.tensors(tmp_path / "merged")[EMBEDDING].shape == (514, 32)
    check_tokenizer(tmp_path / "merged")
    np.testing.assert_allclose(logits(final), logits(tmp_path / "merged"), atol=2e-5)
    assert tiny.jax_dpo("generate", "--model", final, "--prompt", "The", "--max_new_tokens", 4).code == 0
    held_out = {"model_name_or_path": final, "eval_dataset": options["eval_dataset"]}
    assert tiny.jax_dpo("evaluate", *tiny.flags(held_out)).code == 0


def test_rows_to_spare_are_used_and_nothing_grows(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "padded", vocab_size=516)
    trainer = DPOTrainer(str(model), args=DPOConfig("unused", added_tokens=["<think>"]), peft_config=LoraConfig(r=2))
    assert trainer.model.config.vocab_size == 516
    assert "take rows of the model's 516 that were to spare" in trainer.notes[0]
    lora = trainer.model.config.lora
    assert lora is not None and set(lora.saved) == {EMBEDDING, HEAD}
    for name in lora.saved:
        np.testing.assert_array_equal(trainer.model.leaves[name].read(), tiny.tensors(model)[name])


def test_the_added_tokens_of_a_directory_come_with_its_template(model: Path, tmp_path: Path) -> None:
    """As TRL's clone_chat_template does."""
    other = tmp_path / "other"
    shutil.copytree(tiny.TOKENIZER, other)
    content = read(other / "tokenizer.json")
    content["added_tokens"] += [
        {**content["added_tokens"][0], "id": 600 + i, "content": t} for i, t in enumerate(("<|a|>", "<|b|>"))
    ]
    (other / "tokenizer.json").write_text(json.dumps(content))
    (other / "chat_template.jinja").write_text(TEMPLATE)
    edit(other / "tokenizer_config.json", eos_token="<|b|>")
    trainer = DPOTrainer(str(model), args=DPOConfig("unused", chat_template_path=str(other)))
    assert trainer.processing_class.convert_tokens_to_ids(["<|a|>", "<|b|>"]) == [512, 513]
    assert trainer.processing_class.eos_token == "<|b|>"
    assert trainer.model.config.vocab_size == 514


def test_a_reference_that_is_given_grows_too(model: Path, options: dict[str, Any], data: Path, tmp_path: Path) -> None:
    args = DPOConfig(
        str(tmp_path), added_special_tokens=["<|turn|>"], chat_template_path=str(options["chat_template_path"])
    )
    same = DPOTrainer(str(model), str(model), args=args, eval_dataset=str(data / "chat.jsonl"))
    assert same.pairing.other is not None and same.pairing.other.config.vocab_size == 513
    found = same.evaluate()
    assert found["eval_kl_divergence"] == 0
    other = tiny.make_model(tmp_path / "smaller", vocab_size=300)
    with pytest.raises(UserError) as refused:
        DPOTrainer(str(model), str(other), args=args)
    assert refused.value.name == "reference-vocabulary"


def test_what_cannot_be_done_is_said(
    model: Path, whole: Path, options: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    # A tokenizer with a token that the model has no row for: indexing would take another token's.
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.add_tokens(["home"])
    with pytest.raises(UserError) as refused:
        DPOTrainer(str(model), train_dataset=str(data / "chat.jsonl"), processing_class=tokenizer)
    assert refused.value.name == "token-without-row"
    assert "home the id 512, but the model has 512 rows" in refused.value.message
    args = DPOConfig("unused", added_tokens=["home"])
    there = DPOTrainer(str(model), args=args, train_dataset=str(data / "chat.jsonl"), processing_class=tokenizer)
    assert there.model.config.vocab_size == 513
    with pytest.raises(UserError) as refused:
        DPOTrainer(str(model), args=DPOConfig("unused", added_tokens=[" "]))
    assert refused.value.name == "added-token-blank"
    adapted = tmp_path / "adapter"
    trainer = DPOTrainer(str(model), args=DPOConfig("unused"), peft_config=LoraConfig(r=2))
    trainer.save_model(adapted)
    with pytest.raises(UserError) as refused:
        DPOTrainer(str(adapted), args=args)
    assert refused.value.name == "added-tokens-adapter"
