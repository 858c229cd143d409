"""Runs as users start them. Oracles: TRL 1.16's numbers, written beside each; exact KL by the table of cases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from cases import adapter

from jax_dpo import DPOConfig, DPOTrainer, load_model

pytestmark = pytest.mark.usefixtures("inputs")


@pytest.fixture(autouse=True)
def _start_here(start: Path, inputs: Path) -> None:
    """The model under the name that the files have for it."""
    shutil.copytree(start, inputs / "START")


def train(file: str, out: str = "out", **options: Any) -> tiny.Ended:
    return tiny.jax_dpo("train", file, *tiny.flags(options), "--output_dir", out)


def logged(name: str, kind: str = "train", out: str = "out") -> list[float]:
    return [r[name] for r in tiny.records(Path(out), kind)]


def near(values: list[float], rel: float = 5e-5) -> Any:
    return pytest.approx(values, rel=rel)


@pytest.mark.slow
def test_resume_other_batch() -> None:
    """huggingface/transformers#43718: 1 x 4, then 4 x 1: ten steps in all, rows and rates of an unbroken run."""
    first = train("resume-other-batch-first.yaml")
    assert first.code in (0, 3, 75), first.err
    for later in (6, 7, 8, 9, 10):  # stopped after its checkpoint 5
        shutil.rmtree(f"out/checkpoint-{later}", ignore_errors=True)
    then = train("resume-other-batch-then.yaml", resume_from_checkpoint="out/checkpoint-5")
    assert then.code in (0, 3), then.err
    steps = tiny.records(Path("out"), "train")
    assert [r["step"] for r in steps] == list(range(1, 11))
    assert steps[5]["learning_rate"] == pytest.approx(5e-4, rel=1e-12)
    want = [0.693147, 0.570182, 0.379692, 0.425679, 0.292914, 0.330837, 0.217749, 0.161109, 0.210004, 0.207822]
    assert [r["loss"] for r in steps] == near(want)


@pytest.mark.slow
def test_small_eval() -> None:
    """OpenRLHF/OpenRLHF#549: three held-out pairs in places for eight."""
    assert train("small-eval.yaml").code in (0, 3)
    assert logged("eval_loss", "eval") == near([0.706342, 0.721149])
    assert logged("eval_rewards/margins", "eval") == pytest.approx([-0.026024, -0.055134], abs=5e-5)
    assert logged("eval_rewards/accuracies", "eval") == pytest.approx([1 / 3, 0])


@pytest.mark.slow
def test_remainder() -> None:
    """huggingface/transformers#14309, #2995: seven pairs with an accumulation of four; three; one."""
    assert train("remainder.yaml").code in (0, 3)
    assert logged("loss") == near([0.693147, 0.708956]) and logged("grad_norm") == near([2.71541, 2.99316])
    train("remainder.yaml", "three", dataset_name="pairs3.jsonl")
    assert logged("grad_norm", out="three") == near([2.92679])
    Path("one.jsonl").write_text(Path("pairs7.jsonl").read_text().splitlines()[0] + "\n")
    train("remainder.yaml", "one", dataset_name="one.jsonl")
    assert logged("grad_norm", out="one") == near([5.84111])


@pytest.mark.slow
def test_warmup_outlasts_run() -> None:
    """gaoyixu/CAIL2020-Argument-Mining#1: warm-up of 100 steps in a run of nine."""
    ended = train("warmup-outlasts-run.yaml")
    assert ended.code in (0, 3)
    assert logged("learning_rate")[-1] == pytest.approx(8e-8, rel=1e-12) and len(logged("loss")) == 9
    assert "warm-up (100 steps) outlasts the run (9 steps)" in ended.out and "Set warmup_steps to" in ended.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "metric", "greater"),
    [
        ("best-metric-name.yaml", "loss", False),
        ("best-metric-name.yaml", "eval_rewards/accuracies", True),
        ("best-metric-name-sets.yaml", "near_loss", False),
        ("best-metric-name-sets.yaml", "eval_far_rewards/accuracies", True),
    ],
)
def test_best_metric_name(file: str, metric: str, greater: bool) -> None:
    """huggingface/transformers#26886, hiyouga/LlamaFactory#7906: with eval_ or without, of one set or of two."""
    ended = train(file, metric_for_best_model=metric)
    assert ended.code in (0, 3), ended.err
    name = "eval_" + metric.removeprefix("eval_")
    values = {r["step"]: r[name] for r in tiny.records(Path("out"), "eval") if name in r and r["step"]}
    best = (max if greater else min)(values.values())
    verdict = json.loads((Path("out") / "verdict.json").read_text())
    assert values[verdict["best"]["step"]] == best


@pytest.mark.parametrize(
    ("file", "metric", "said"),
    [
        ("best-metric-name.yaml", "eval_rewards/acuracies", "Did you mean rewards/accuracies?"),
        ("best-metric-name-sets.yaml", "eval_loss", "near, far"),
        ("best-metric-name-sets.yaml", "eval_rewards/accuracies", "near, far"),
        ("best-metric-name-sets.yaml", "eval_naer_loss", "near, far"),
    ],
)
def test_best_metric_name_refused(file: str, metric: str, said: str) -> None:
    ended = train(file, metric_for_best_model=metric)
    assert ended.code == 2 and said in ended.err
    assert not Path("out").exists()


@pytest.mark.slow
def test_keep_one() -> None:
    """huggingface/transformers#11748, axolotl-ai-cloud/axolotl#2424: the best checkpoint is the first, and one is kept."""
    ended = train("keep-one.yaml")
    assert ended.code == 3, ended.err
    margins = [0.025703, 0.022589, 0.017567, 0.006461, -0.008370, -0.023669]
    assert logged("eval_rewards/margins", "eval") == pytest.approx(margins, abs=5e-5)
    assert logged("eval_kl_divergence", "eval") == near(
        [0.02423, 0.06421, 0.11088, 0.16455, 0.21760, 0.27071], rel=5e-4
    )
    assert tiny.checkpoints(Path("out")) == ["checkpoint-1", "checkpoint-6"]
    assert json.loads((Path("out") / "verdict.json").read_text())["best"]["step"] == 1
    ended = train("keep-one.yaml", "alone", save_strategy="best")
    assert ended.code == 3, ended.err
    assert tiny.checkpoints(Path("alone")) == ["checkpoint-1"]
    assert json.loads((Path("alone") / "verdict.json").read_text())["best"]["step"] == 1
    ended = train("keep-one.yaml", "wild", learning_rate=3e-2)
    assert ended.code == 3, ended.err
    assert min(logged("eval_kl_divergence", "eval", "wild")) > 1.8
    assert json.loads((Path("wild") / "verdict.json").read_text())["best"] is None
    assert "best" not in [path.name for path in Path("wild").iterdir()]
    assert "none: no checkpoint was within the bound on KL" in ended.out


@pytest.mark.slow
def test_frozen_adapter(start: Path) -> None:
    """huggingface/trl#4023, #1311: a trained adapter whose file says inference_mode trains on."""
    model = load_model("START", adapter=adapter(Path("adapter"), "START"))
    args: Mapping[str, Any] = {"per_device_train_batch_size": 7, "max_steps": 3, "logging_steps": 1}
    args = {**args, "lr_scheduler_type": "constant", "learning_rate": 1e-2, "bf16": False}
    trainer = DPOTrainer(model, args=DPOConfig("out", **args), train_dataset="pairs7.jsonl", processing_class="START")
    trainer.train()
    steps = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["loss"] for r in steps] == near([0.693147, 0.647382, 0.611032])
    assert [r["grad_norm"] for r in steps] == near([0.518526, 0.410614, 0.378977])


@pytest.mark.slow
def test_first_step_zero() -> None:
    """eric-mitchell/direct-preference-optimization#34: bf16, and nothing has moved before the first step."""
    ended = train("first-step-zero.yaml")
    assert ended.code in (0, 3), ended.err
    first, step = tiny.records(Path("out"), "eval")[0], tiny.records(Path("out"), "train")[0]
    for record, prefix in ((first, "eval_"), (step, "")):
        assert record[f"{prefix}loss"] == pytest.approx(0.6931472, abs=2e-7)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl_divergence"):
            assert record[prefix + name] == 0


@pytest.mark.slow
def test_leftover_save() -> None:
    """Physical-Intelligence/openpi#566, google/orbax#605: what a killed save left does not stand in the way of the next."""
    assert train("leftover-save.yaml", max_steps=5).code in (0, 3)
    litter = Path("out/checkpoint-10.orbax-checkpoint-tmp-0/state")
    litter.mkdir(parents=True)
    (litter / "d0").write_bytes(b"half")
    Path("out/checkpoint-15").mkdir()
    ended = train("leftover-save.yaml", resume_from_checkpoint="true")
    assert ended.code in (0, 3), ended.err
    assert logged("step")[-1] == 15 or tiny.checkpoints(Path("out"))[-1] == "checkpoint-15"
    assert {"checkpoint-5", "checkpoint-10", "checkpoint-15"} <= set(tiny.checkpoints(Path("out")))


@pytest.mark.slow
def test_copied_checkpoint() -> None:
    """google/orbax#394: a run goes on from a copy, and nothing that lay there is gone."""
    assert train("leftover-save.yaml", max_steps=5).code in (0, 3)
    shutil.copytree("out", "copy")
    (Path("copy") / "notes.txt").write_text("mine")
    before = {path.relative_to("copy") for path in Path("copy").rglob("*") if path.is_file()}
    ended = train("leftover-save.yaml", "copy", resume_from_checkpoint="true")
    assert ended.code in (0, 3), ended.err
    assert before <= {path.relative_to("copy") for path in Path("copy").rglob("*") if path.is_file()}
    assert {"checkpoint-10", "checkpoint-15"} <= set(tiny.checkpoints(Path("copy")))


def test_trivial_pairs_are_named() -> None:
    """gradients-ai/G.O.D#1344: every rejected answer is one refusal."""
    said = tiny.jax_dpo("check", "trivial-pairs.jsonl", "--model", "START").out
    assert "one text is 100 % (24 of 24) of the rejected answers, first in row 1" in said


@pytest.mark.slow
def test_trivial_pairs() -> None:
    """The training looks like a success; it is called saturated, and held-out pairs without that text decide."""
    held_out = {"eval_dataset": "pairs40.jsonl", "eval_strategy": "epoch", "eval_on_start": "true"}
    ended = train("remainder.yaml", dataset_name="trivial-pairs.jsonl", num_train_epochs=2, **held_out)
    assert ended.code == 3, ended.err
    assert logged("rewards/accuracies")[-3:] == [1, 1, 1] and logged("loss")[-1] < 0.1 * logged("loss")[0]
    verdict = json.loads((Path("out") / "verdict.json").read_text())
    assert "saturated-accuracy" in [f["name"] for f in verdict["findings"]]
    last = tiny.records(Path("out"), "eval")[-1]
    gates = {gate["name"]: gate for gate in verdict["gates"]}
    assert (
        gates["margin"]["value"] == last["eval_rewards/margins"] and gates["kl"]["value"] == last["eval_kl_divergence"]
    )
    page = (Path("out") / "report.html").read_text()
    assert "saturated-accuracy" in page and "None of the known diseases was found" not in page
    assert "one text is 100 % (24 of 24) of the rejected answers" in page
