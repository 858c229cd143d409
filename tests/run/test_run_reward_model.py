"""A curriculum by a reward model. Oracles: transformers' own classifiers (tests/parity/reward_numbers.py, float32), the gaps sorted."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jax_dpo.errors import UserError
from jax_dpo.trainer import reward_model as module

GOLDEN = tiny.GOLDEN / "reward"
NUMBERS = json.loads((GOLDEN / "rewards.json").read_text())
BY_REWARD = {
    "train_sampling_strategy": "curriculum",
    "curriculum_by": "reward_model",
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 2,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}


def rows(kind: str) -> list[dict[str, Any]]:
    """The pairs of the recorded numbers."""
    file = Path(__file__).parents[1] / "parity" / "reward_numbers.py"
    spec = importlib.util.spec_from_file_location("reward_numbers", file)
    assert spec is not None and spec.loader is not None
    recorded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recorded)
    return list(recorded.rows(kind))


@pytest.fixture(scope="module")
def rewarding(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family's classifier with its tokenizer beside it, and llama's once more with a tokenizer without a template."""
    found, folder = {}, tmp_path_factory.mktemp("reward")
    for family in NUMBERS:
        found[family] = Path(shutil.copytree(GOLDEN / family, folder / family))
        for file in tiny.TOKENIZER.iterdir():
            shutil.copyfile(file, found[family] / file.name)
    found["bare"] = Path(shutil.copytree(found["llama"], folder / "bare"))
    (found["bare"] / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((found["bare"] / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (found["bare"] / "tokenizer_config.json").write_text(json.dumps(settings))
    return found


def trainer_of(model: Path, data: Any, out: Path, **more: Any) -> Any:
    from jax_dpo import DPOConfig, DPOTrainer

    function = more.pop("reward_model", None)
    return DPOTrainer(
        str(model),
        args=DPOConfig(str(out), **{**BY_REWARD, **more}),
        train_dataset=data,
        reward_model=function,
    )


def given(trainer: Any) -> np.ndarray:
    """What the reward model of a trainer gives its pairs."""
    made = module.rewards(
        trainer.reward_model,
        trainer.engine,
        trainer.train_set,
        trainer._texts,
        display=trainer.display,
        asked=lambda: False,
    )
    return made.values


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "chat"), ("qwen2", "chat"), ("gemma2", "chat"), ("llama", "implicit")]
)
def test_rewards_are_those_of_transformers(
    rewarding: dict[str, Path], model: Path, family: str, kind: str, tmp_path: Path
) -> None:
    trainer = trainer_of(model, rows(kind), tmp_path / "out", curriculum_reward_model=str(rewarding[family]))
    np.testing.assert_allclose(given(trainer), NUMBERS[family][kind], rtol=0, atol=1e-4)


def test_plain_text_is_read_as_a_chat_where_the_model_has_a_template(
    rewarding: dict[str, Path], model: Path, tmp_path: Path
) -> None:
    for name, kind in (("llama", "chat"), ("bare", "text")):
        trainer = trainer_of(model, rows("text"), tmp_path / "out", curriculum_reward_model=str(rewarding[name]))
        np.testing.assert_allclose(given(trainer), NUMBERS["llama"][kind], rtol=0, atol=1e-4)


def test_a_run_takes_wide_gaps_first_and_keeps_what_was_computed(
    rewarding: dict[str, Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command line. Of four rows one is dropped, and the classifier is not asked about it."""
    monkeypatch.setenv("JAX_DPO_CACHE", str(tmp_path / "cache"))
    some = rows("chat")
    data = tiny.write_rows(tmp_path / "pairs.jsonl", [some[0], {**some[0], "chosen": None}, *some[1:]])
    options = {**BY_REWARD, "model_name_or_path": model, "dataset_name": data, "num_train_epochs": 1}
    options |= {"curriculum_reward_model": rewarding["llama"], "learning_rate": 0, "logging_steps": 1}
    ended = tiny.jax_dpo("train", *tiny.flags({**options, "output_dir": tmp_path / "out"}))
    assert ended.code in (0, 3), ended.err
    gaps = np.subtract(*np.array(NUMBERS["llama"]["chat"]).T)
    order = np.argsort(gaps)[::-1]

    plain = {**options, "train_sampling_strategy": "sequential", "output_dir": tmp_path / "plain"}
    tiny.jax_dpo("train", *tiny.flags(plain))
    of_row = [r["logps/chosen"] for r in tiny.records(tmp_path / "plain", "train")]
    found = [r["logps/chosen"] for r in tiny.records(tmp_path / "out", "train")]
    assert order.tolist() != [0, 1, 2] and len(set(of_row)) == 3
    assert found == pytest.approx([of_row[i] for i in order], abs=1e-5)
    start = tiny.records(tmp_path / "out", "start")[0]["curriculum"]
    assert start["source"] == f"the reward model {rewarding['llama']}"
    np.testing.assert_allclose([r["widest"] for r in start["ranges"]], gaps[order], atol=1e-4)

    # Another run of the same pairs and reward model runs it on none; other weights are other numbers.
    monkeypatch.setattr(module, "make_reward_pass", lambda *_, **__: pytest.fail("the reward model was run again"))
    trainer = trainer_of(model, str(data), tmp_path / "again", curriculum_reward_model=str(rewarding["llama"]))
    np.testing.assert_allclose(given(trainer), NUMBERS["llama"]["chat"], atol=1e-4)
    changed = Path(shutil.copytree(rewarding["llama"], tmp_path / "changed"))
    weights = load_file(changed / "model.safetensors")
    save_file({**weights, "score.weight": -weights["score.weight"]}, changed / "model.safetensors")
    with pytest.raises(pytest.fail.Exception, match="run again"):
        given(trainer_of(model, str(data), tmp_path / "other", curriculum_reward_model=str(changed)))


@pytest.mark.parametrize("pairs", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_function_gives_gaps_or_rewards(model: Path, pairs: bool, tmp_path: Path) -> None:
    """It sees every pair once, as the training reads it; the run that goes on does not ask it again."""
    texts = tiny.text_rows(70, seed=4)
    worth = {row["chosen"] + row["prompt"]: float(x) for row, x in zip(texts, np.random.default_rng(1).permutation(70))}
    seen: list[dict[str, Any]] = []

    def reward(some: list[dict[str, Any]]) -> Any:
        seen.extend(some)
        gaps = [worth[row["chosen"] + row["prompt"]] for row in some]
        return [(g + 3, 3) for g in gaps] if pairs else np.array(gaps)

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "curriculum_buckets": 7}
    options |= {"per_device_train_batch_size": 8}
    trainer = trainer_of(model, texts, tmp_path / "out", reward_model=reward, **options)
    trainer.train()
    assert seen == texts
    first = np.concatenate([trainer.engine.groups(trainer.plan.after(k))[0] for k in range(9)])
    values = np.array(list(worth.values()))[first]
    assert [sorted(values[10 * b : 10 * b + 10]) for b in range(7)] == [
        list(range(60 - 10 * b, 70 - 10 * b)) for b in range(7)
    ]
    start = tiny.records(tmp_path / "out", "start")[0]["curriculum"]
    assert start["source"].startswith("the function ") and (start["widest"], start["narrowest"]) == (69, 0)

    seen.clear()
    again = trainer_of(model, texts, tmp_path / "b", reward_model=reward, **options)
    again.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-2")
    assert not seen
    found, expected = (tiny.untimed(tiny.records(tmp_path / name, "train")) for name in ("b", "out"))
    assert found == expected[2:]


def test_what_a_function_may_not_give(model: Path, tmp_path: Path) -> None:
    def error(function: Any) -> str:
        with pytest.raises(UserError) as problem:
            trainer_of(model, tiny.text_rows(3), tmp_path / "out", reward_model=function, max_steps=1).train()
        assert not (tmp_path / "out" / "run.jsonl").exists()
        return f"{problem.value.name}: {problem.value}"

    assert "reward-function-result" in error(lambda some: [1.0]) and "gave 1 of type float" in error(lambda some: [1.0])
    assert "expected 3 numbers" in error(lambda some: None)
    assert "expected 3 numbers" in error(lambda some: ["good"] * 3)
    found = error(lambda some: [1.0, float("nan"), 2.0])
    assert "curriculum-not-finite" in found and "1 of 3 pairs" in found and "row 2" in found


def test_which_reward_model_is_said_once_and_read(rewarding: dict[str, Path], model: Path, tmp_path: Path) -> None:
    def error(**options: Any) -> str:
        with pytest.raises(UserError) as problem:
            trainer_of(model, rows("chat"), tmp_path / "out", **options)
        return f"{problem.value.name}: {problem.value}"

    assert "reward-model-missing" in error() and "neither is there" in error()
    both = error(curriculum_reward_model=str(rewarding["llama"]), reward_model=lambda some: some)
    assert "reward-model-missing" in both and "both are there" in both
    assert "reward-model-unread" in error(curriculum_by="reference", reward_model=lambda some: some)
    assert "found str" in error(reward_model=str(rewarding["llama"]))


def test_what_is_no_reward_model_is_refused(rewarding: dict[str, Path], model: Path, tmp_path: Path) -> None:
    def error(path: Path, kind: str = "chat") -> str:
        with pytest.raises(UserError) as problem:
            given(trainer_of(model, rows(kind), tmp_path / "out", curriculum_reward_model=str(path)))
        return f"{problem.value.name}: {problem.value}"

    def changed(name: str, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
        path = Path(shutil.copytree(rewarding["llama"], tmp_path / name))
        held = {**json.loads((path / "config.json").read_text()), **config}
        (path / "config.json").write_text(json.dumps(held))
        if tensors is not None:
            weights = {**load_file(path / "model.safetensors"), **tensors}
            save_file({k: v for k, v in weights.items() if v is not None}, path / "model.safetensors")
        return path

    assert "reward-model-kind" in error(model) and "LlamaForSequenceClassification" in error(model)
    assert "there is none" in error(changed("headless", {"score.weight": None}))
    assert "it is [3, 16]" in error(changed("three", {"score.weight": np.zeros((3, 16), np.float32)}))
    assert "family-unknown" in error(
        changed("bert", model_type="bert", architectures=["BertForSequenceClassification"])
    )
    assert "reward-model-tokenizer" in error(GOLDEN / "llama")
    assert "model-missing" in error(tmp_path / "nowhere")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert "reward-model-kind" in error(tmp_path / "lora") and "Merge it into its base" in error(tmp_path / "lora")
    assert "tensors-differ" in error(changed("more", {"strange.weight": np.zeros(3, np.float32)}))
    strict = changed("strict")
    (strict / "chat_template.jinja").write_text("{{ raise_exception('only poems') }}")
    refused = error(strict)
    assert "reward-model-rows" in refused and "cannot read 3 of the 3 pairs" in refused and "only poems" in refused
