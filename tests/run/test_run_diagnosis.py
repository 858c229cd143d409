"""Runs that really have a disease, and whether it is named; and a healthy run, of which nothing is said.

Oracle: how the run was made (its learning rate, its data, its clipping), and numbers of its log worked out here anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from jax_dpo.report.diagnosis import NAMES, diagnose

WORDS = tiny.GOOD + tiny.BAD
Found = dict[str, dict[str, str]]
Train = Callable[..., tuple[Path, Found]]


def answers(count: int, seed: int, chosen: tuple[int, int], rejected: tuple[int, int]) -> list[dict[str, str]]:
    """Pairs of random words, the same on both sides: only their numbers, from and below, can be learned, or the pairs by heart."""
    random = np.random.default_rng(seed)
    pick = lambda words, n: [str(w) for w in random.choice(words, n)]  # noqa: E731
    side = lambda bounds: " " + " ".join(pick(WORDS, int(random.integers(*bounds))))  # noqa: E731
    prompts = ["The long {} and {}:".format(*pick(tiny.TOPICS, 2)) for _ in range(count)]
    return [{"prompt": prompt, "chosen": side(chosen), "rejected": side(rejected)} for prompt in prompts]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """noise: nothing in common between training and held-out pairs. lengths: chosen answers are longer, and nothing else."""
    folder, found = tmp_path_factory.mktemp("sick"), {}
    for name, chosen, rejected in (("noise", (3, 4), (3, 4)), ("lengths", (4, 16), (1, 5))):
        train = tiny.write_rows(folder / f"{name}.jsonl", answers(24, 1, chosen, rejected))
        held_out = tiny.write_rows(folder / f"{name}-held-out.jsonl", answers(64, 2, chosen, rejected))
        found[name] = {"dataset_name": train, "eval_dataset": held_out}
    return found


@pytest.fixture(scope="module")
def train(evaluated: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A run with these options: (its directory, the findings of verdict.json by name)."""
    healthy = {
        **evaluated,
        "max_steps": 12,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 100.0,
        "target_kl": 0.5,
        "save_strategy": "no",
    }

    def run(**options: Any) -> tuple[Path, Found]:
        out = tmp_path_factory.mktemp("run") / "out"
        ended = tiny.jax_dpo("train", *tiny.flags({**healthy, **options}), "--output_dir", out)
        assert ended.code in (0, 3), ended.err
        found = json.loads((out / "verdict.json").read_text())["findings"]
        assert all((f["name"] in ended.out) and f["advice"] for f in found)
        return out, {f["name"]: f for f in found}

    return run


@pytest.fixture(scope="module")
def healthy(train: Train) -> tuple[Path, Found]:
    return train()


def test_a_healthy_run_has_none(healthy: tuple[Path, Found]) -> None:
    out, found = healthy
    assert found == {}
    page = (out / "report.html").read_text()
    assert "None of the known diseases was found" in page and ", ".join(NAMES) in page


def test_kl_over_its_bound(train: Train) -> None:
    out, found = train(learning_rate=5e-3)
    points = [(r["step"], r["eval_kl_divergence"]) for r in tiny.records(out, "eval")]
    assert points[-1][1] > 0.5
    over = next(step for step, kl in points if kl > 0.5)
    finding = found["kl-over-bound"]
    assert finding["severity"] == "serious"
    assert f"{points[-1][1] / 0.5:.2f} times its bound 0.5" in finding["text"]
    assert f"between steps {over - 2} and {over}" in finding["text"]
    slope, _ = np.polyfit(*zip(*points[-5:], strict=True), 1)
    assert f"+{10 * slope:.2g} ±" in finding["text"]
    assert "learning_rate (now 0.005; try 0.0025), or raise beta (now 0.1; try 0.15)" in finding["advice"]
    page = (out / "report.html").read_text()
    assert finding["text"] in page and finding["advice"] in page


def test_kl_near_its_bound(train: Train, healthy: tuple[Path, Found]) -> None:
    kl = tiny.records(healthy[0], "eval")[-1]["eval_kl_divergence"]
    _, found = train(target_kl=kl / 0.95)
    assert set(found) == {"kl-near-bound"}
    assert "95 % of its bound" in found["kl-near-bound"]["text"]
    assert train(target_kl=kl / 0.95, kl_actions=["halve_lr"])[1] == {}, "something holds it"


def test_loss_spikes(train: Train, sets: dict[str, Any]) -> None:
    out, found = train(**sets["noise"], learning_rate=1.0, target_kl=10, max_steps=16)
    worst = max(tiny.records(out, "train"), key=lambda r: r["loss"])
    assert worst["loss"] > 2 * np.log(2)
    assert f"at worst to {worst['loss']:.4f} at step {worst['step']}" in found["loss-spikes"]["text"]
    assert "Lower learning_rate (now 1; try 0.5)" in found["loss-spikes"]["advice"]


@pytest.mark.parametrize("rate", [1e-8, 0.0])
def test_flat_margins(train: Train, rate: float) -> None:
    _, found = train(learning_rate=rate)
    assert set(found) == {"flat-margins"}
    assert "has hardly risen" in found["flat-margins"]["text"]
    advice = found["flat-margins"]["advice"]
    assert ("higher learning_rate (now 1e-8; try 2e-8)" in advice) if rate else ("learning rate of 0" in advice)


def test_over_fitting(train: Train, sets: dict[str, Any]) -> None:
    """Random answers: what is learned of the training pairs says nothing of others."""
    out, found = train(**sets["noise"], learning_rate=0.01, target_kl=100, max_steps=18, eval_steps=3)
    losses = [r["loss"] for r in tiny.records(out, "train")]
    held_out = [r["eval_loss"] for r in tiny.records(out, "eval")]
    assert losses[-1] < 0.5 * losses[0] and held_out[-1] > held_out[0]
    assert "are learned by heart" in found["over-fitting"]["text"]
    assert f"{held_out[-1]:.4f}" in found["over-fitting"]["text"]


def test_saturated_accuracy(train: Train) -> None:
    out, found = train(learning_rate=0.03, target_kl=100, max_steps=16)
    last = tiny.records(out, "train")[-4:]
    assert all(r["rewards/accuracies"] == 1 for r in last)
    assert f"{sum(r['loss'] for r in last) / 4:.4f}" in found["saturated-accuracy"]["text"]


def test_chosen_answers_that_fall(train: Train, sets: dict[str, Any]) -> None:
    out, found = train(**sets["noise"], learning_rate=0.05, target_kl=100)
    first, *_, last = (r["eval_logps/chosen"] for r in tiny.records(out, "eval"))
    assert first - last > 1
    assert f"has fallen by {first - last:.3g} nats" in found["chosen-falls"]["text"]
    assert "sft" in found["chosen-falls"]["advice"]


def test_chosen_answers_that_fall_where_nothing_is_held_out(train: Train) -> None:
    out, found = train(learning_rate=0.3, target_kl=100, eval_strategy="no", eval_on_start=False)
    fall = -np.mean([r["rewards/chosen"] for r in tiny.records(out, "train")[-3:]]) / 0.1
    assert fall > 1
    assert f"training chosen answers has fallen by {fall:.3g} nats" in found["chosen-falls"]["text"]


@pytest.mark.slow
def test_length_exploitation(train: Train, sets: dict[str, Any]) -> None:
    """The words are the same on both sides: all that can be learned of other pairs is that chosen answers are longer."""
    out, found = train(**sets["lengths"])
    last = tiny.records(out, "eval")[-1]
    more = last["eval_length/chosen"] - last["eval_length/rejected"]
    share = last["eval_length/margin_slope"] * more / last["eval_rewards/margins"]
    assert share > 0.5
    text = found["length-exploitation"]["text"]
    assert text.startswith(f"{100 * share:.0f} % of the margin goes with length")
    rows = [json.loads(line) for line in sets["lengths"]["eval_dataset"].read_text().splitlines()]
    longer = np.mean([len(r["chosen"].split()) > len(r["rejected"].split()) for r in rows])
    assert f"longer in {100 * longer:.1f} % of the 64" in text


@pytest.mark.slow
def test_lengths_that_cannot_be_told_from_quality(train: Train, tmp_path: Path) -> None:
    """Every chosen answer is longer by the same: no line can tell whether its length was learned."""
    sides = {"chosen": (8, 9), "rejected": (3, 4)}
    files = [tiny.write_rows(tmp_path / f"{seed}.jsonl", answers(16, seed, **sides)) for seed in (1, 2)]
    _, found = train(dataset_name=files[0], eval_dataset=files[1], max_steps=6)
    assert "cannot be told from one for quality" in found["length-exploitation"]["text"]
    assert "longer in 100.0 % of the 16 held-out pairs, by 5.0 tokens" in found["length-exploitation"]["text"]


def test_dropped_data(train: Train, data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    rows += [{**row, "rejected": row["chosen"]} for row in rows[:8]]
    _, found = train(dataset_name=tiny.write_rows(tmp_path / "rows.jsonl", rows), drop_rows=["invalid", "identical"])
    assert set(found) == {"dropped-data"}
    assert "25.0 % of the training rows were left out: 8 identical (25.0 %)" in found["dropped-data"]["text"]
    assert "dropped.jsonl" in found["dropped-data"]["advice"].lower()


@pytest.mark.slow
def test_clipped_in_every_step(train: Train) -> None:
    out, found = train(max_grad_norm=0.01)
    norms = [r["grad_norm"] for r in tiny.records(out, "train")]
    assert min(norms) > 0.01
    assert found["always-clipped"]["severity"] == "note"
    assert f"its norm is {min(norms):.2f} to {max(norms):.2f}" in found["always-clipped"]["text"]


class Hungry:
    """A callback that asks the device for more than there is."""

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        import jax.numpy as jnp

        if state.global_step == 2:
            jnp.zeros((1 << 46,), jnp.uint8).block_until_ready()


def test_out_of_memory(usual: dict[str, Any], tmp_path: Path) -> None:
    """The run dies of it; its report says so, made again from run.jsonl alone."""
    from jax_dpo import DPOConfig, DPOTrainer
    from jax_dpo.errors import UserError

    options = {**usual, "micro_batch_tokens": 64}
    model, rows = str(options.pop("model_name_or_path")), str(options.pop("dataset_name"))
    out = tmp_path / "out"
    trainer = DPOTrainer(model, args=DPOConfig(str(out), **options), train_dataset=rows, callbacks=[Hungry()])
    with pytest.raises(UserError) as error:
        trainer.train()
    assert error.value.name == "out-of-memory"
    (finding,) = [f for f in diagnose(tiny.records(out)) if f.name == "out-of-memory"]
    assert finding.text.startswith("Out of memory while training (70.4 TB more were asked for)")
    assert "micro_batch_tokens 64 -> 32" in finding.advice and "gradient_checkpointing true" in finding.advice
    assert tiny.jax_dpo("report", out).code == 0
    page = (out / "report.html").read_text()
    assert "micro_batch_tokens 64 -&gt; 32" in page and "ended by an error" in page


def test_what_is_found_is_found_again(train: Train) -> None:
    """From the log alone, after the verdict as before it."""
    out, found = train(learning_rate=5e-3)
    assert [f.to_dict() for f in diagnose(tiny.records(out))] == list(found.values())
    assert [r["findings"] for r in tiny.records(out, "verdict")] == [list(found.values())]
