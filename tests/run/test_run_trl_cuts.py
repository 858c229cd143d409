"""How a data set is cut into steps, against TRL 1.16: its own order for seed 42, short last micro-batches, few held-out pairs, a run
that goes on with another batch size, an adapter that came in trained. Oracle: numbers that TRL 1.16 logged (CPU, float32, six digits)
for the qwen3 start of tests/golden/training and the pairs beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

TRAINING = tiny.GOLDEN / "training"
RELATIVE = 5e-5


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with its tokenizer beside it."""
    folder = Path(shutil.copytree(TRAINING / "start" / "qwen3", tmp_path_factory.mktemp("models") / "start"))
    for file in tiny.TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def train(start: Path, tmp_path: Path) -> Any:
    """Runs `jax-dpo train` in tmp_path / out with what all these runs have in common."""
    common = {"model_name_or_path": start, "bf16": False, "seed": 42, "train_sampling_strategy": "random"}
    common |= {"logging_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-3, "save_strategy": "no"}
    common |= {"gradient_checkpointing": False}

    def run(data: str | Path, **options: Any) -> Path:
        out = Path(options.pop("output_dir", tmp_path / "out"))
        ended = tiny.jax_dpo(
            "train", *tiny.flags({**common, "dataset_name": TRAINING / data, "output_dir": out, **options})
        )
        assert ended.code in (0, 3), ended.err
        return out

    return run


def logged(out: Path, name: str, kind: str = "train") -> list[float]:
    return [r[name] for r in tiny.records(out, kind)]


def test_a_short_step_is_a_mean_over_its_own_micro_batches(train: Any) -> None:
    """Seven pairs in micro-batches of one, four a step: the second step has three."""
    out = train("pairs7.jsonl", per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=1)
    assert logged(out, "loss") == pytest.approx([0.693147, 0.708956], rel=RELATIVE)
    assert logged(out, "grad_norm") == pytest.approx([2.71541, 2.99316], rel=RELATIVE)
    assert logged(out, "epoch") == [pytest.approx(4 / 7), 1.0]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "norm"), [(3, 2.92679), pytest.param(1, 5.84111, marks=pytest.mark.slow)])
def test_fewer_pairs_than_a_step_takes(train: Any, tmp_path: Path, rows: int, norm: float) -> None:
    file = tmp_path / "few.jsonl"
    lines = (TRAINING / ("pairs3.jsonl" if rows == 3 else "pairs7.jsonl")).read_text().splitlines()
    file.write_text("\n".join(lines[:rows]))
    out = train(file, per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=1)
    assert logged(out, "loss") == [pytest.approx(0.693147, rel=RELATIVE)]
    assert logged(out, "grad_norm") == [pytest.approx(norm, rel=RELATIVE)]


@pytest.mark.slow
def test_a_short_micro_batch_weighs_as_much_as_a_full_one(train: Any) -> None:
    """Seven pairs in micro-batches of two: the last holds one pair, which counts as two. Oracle: the mean of means of the single
    pairs' losses, which runs of their own give."""
    two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 2}
    out = train("pairs7.jsonl", **two)
    steps = tiny.records(out, "train")
    assert [r["epoch"] for r in steps] == [1.0, 2.0]
    start = tiny.records(out, "start")[0]
    assert start["plan"]["pairs_per_step"] == 8 and start["plan"]["steps"] == 2
    # The policy of step 1 is the reference: the mean of log-probabilities tells the weights of the pairs.
    alone = train(
        "pairs7.jsonl",
        per_device_train_batch_size=1,
        num_train_epochs=1,
        learning_rate=0,
        output_dir=out.parent / "alone",
    )
    each = logged(alone, "logps/chosen")
    assert len(each) == 7
    means = [(each[0] + each[1]) / 2, (each[2] + each[3]) / 2, (each[4] + each[5]) / 2, each[6]]
    assert steps[0]["logps/chosen"] == pytest.approx(np.mean(means), rel=1e-6)
    assert steps[0]["logps/chosen"] != pytest.approx(np.mean(each), rel=1e-4)
    assert steps[0]["num_tokens"] * 2 == steps[1]["num_tokens"]


@pytest.mark.slow
def test_a_run_goes_on_with_another_batch_size(train: Any, start: Path) -> None:
    """Four pairs a step, first in four micro-batches and then in one: TRL's numbers of a run that nothing happened to."""
    from jax_dpo import DPOConfig, DPOTrainer

    options = {"num_train_epochs": 1, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 5}
    out = train("pairs40.jsonl", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    expected = [0.693147, 0.570182, 0.379692, 0.425679, 0.292914, 0.330837, 0.217749, 0.161109, 0.210004, 0.207822]
    assert logged(out, "loss") == pytest.approx(expected, rel=RELATIVE)
    whole = {r["step"]: r for r in tiny.records(out, "train")}
    assert whole[6]["learning_rate"] == pytest.approx(5e-4, rel=1e-12)

    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **options}
    again = train("pairs40.jsonl", output_dir=out.parent / "b", resume_from_checkpoint=out / "checkpoint-5", **cut)
    found = tiny.records(again, "train")
    assert [r["step"] for r in found] == [6, 7, 8, 9, 10]
    for r in found:
        for name in ("loss", "grad_norm", "kl_divergence", "num_tokens", "epoch", "learning_rate"):
            assert r[name] == pytest.approx(whole[r["step"]][name], rel=1e-5), name

    args = DPOConfig(str(out.parent / "none"), per_device_train_batch_size=1, gradient_accumulation_steps=4, seed=42)
    trainer = DPOTrainer(model=str(start), args=args, train_dataset=str(TRAINING / "pairs40.jsonl"))
    rows = [np.concatenate(trainer.engine.groups(trainer.plan.after(k))).tolist() for k in (4, 5)]
    assert rows == [[27, 29, 35, 17], [19, 25, 6, 21]]


@pytest.mark.slow
def test_three_held_out_pairs_are_three(train: Any) -> None:
    """Eight places in an evaluation batch, three pairs: means over exactly three."""
    out = train(
        "pairs40.jsonl",
        eval_dataset=TRAINING / "pairs3.jsonl",
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        per_device_train_batch_size=8,
    )
    assert logged(out, "eval_loss", "eval") == pytest.approx([0.706342, 0.721149], rel=RELATIVE)
    assert logged(out, "eval_rewards/margins", "eval") == pytest.approx([-0.026024, -0.055134], abs=5e-5)
    assert logged(out, "eval_rewards/accuracies", "eval") == pytest.approx([1 / 3, 0.0])


@pytest.mark.slow
def test_ranking_by_the_margin_within_the_bound(train: Any) -> None:
    """Margins fall and the KL leaves its bound: the first checkpoint is the best, and stays beside the last."""
    out = train(
        "pairs40.jsonl",
        eval_dataset=TRAINING / "pairs7.jsonl",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        load_best_model_at_end=True,
    )
    margins = [0.025703, 0.022589, 0.017567, 0.006461, -0.008370, -0.023669]
    assert logged(out, "eval_rewards/margins", "eval") == pytest.approx(margins, abs=5e-5)
    kl = [0.02423, 0.06421, 0.11088, 0.16455, 0.21760, 0.27071]
    assert logged(out, "eval_kl_divergence", "eval") == pytest.approx(kl, rel=3e-4)
    assert tiny.checkpoints(out) == ["checkpoint-1", "checkpoint-6"]
    assert json.loads((out / "verdict.json").read_text())["best"]["step"] == 1


def test_an_adapter_that_came_in_trained_trains_on(start: Path, tmp_path: Path) -> None:
    """Its file says inference_mode, as PEFT always writes; the reference is the adapter as it came."""
    from jax_dpo import DPOConfig, DPOTrainer, load_model

    random, weights = np.random.default_rng(11), {}
    for i in range(2):
        path = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        weights[path + ".lora_A.weight"] = random.normal(0, 0.1, (2, 40)).astype(np.float32)
        weights[path + ".lora_B.weight"] = random.normal(0, 0.5, (64, 2)).astype(np.float32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "inference_mode": True}))
    args = DPOConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=7,
        max_steps=3,
        logging_steps=1,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        save_strategy="no",
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(load_model(start, adapter=adapter), args=args, train_dataset=str(TRAINING / "pairs7.jsonl"))
    trainer.train()
    history = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["loss"] for e in history] == pytest.approx([0.693147, 0.647382, 0.611032], rel=RELATIVE)
    assert [e["grad_norm"] for e in history] == pytest.approx([0.518526, 0.410614, 0.378977], rel=RELATIVE)
