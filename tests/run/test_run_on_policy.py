"""The KL along answers that the policy samples. Oracle: the formula in float64 numpy, from plain logits of policy and reference."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_run_kl_measured as measured
import tiny

from jax_dpo.models import generate as decoding
from jax_dpo.trainer import on_policy

NEW = 6


def assert_like(found: dict[str, Any], kls: list[np.ndarray], prefix: str = "eval_") -> None:
    """Sums over the answers; standard errors of a ratio and of a mean, by their definitions."""
    total, tokens = np.array([k.sum() for k in kls]), np.array([len(k) for k in kls])
    n, ratio = len(kls), total.sum() / tokens.sum()
    residual = total - ratio * tokens  # its mean is 0
    want = {
        "kl_on_policy": ratio,
        "kl_on_policy/se": np.std(residual, ddof=1) / math.sqrt(n) / tokens.mean(),
        "kl_on_policy/sequence": total.mean(),
        "kl_on_policy/sequence_se": np.std(total, ddof=1) / math.sqrt(n),
        "kl_on_policy/length": tokens.mean(),
    }
    for name, value in want.items():
        assert found[prefix + name] == pytest.approx(value, rel=5e-4, abs=1e-7), name


class Spy:
    """What was sampled, call by call: (prompts, answers)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[list[int]], list[list[int]]]] = []

        def generate(config: Any, params: Any, prompts: Any, **options: Any) -> Any:
            answers = decoding.generate(config, params, prompts, **options)
            self.calls.append((prompts, answers))
            return answers

        patch.setattr(on_policy, "generate", generate)


@pytest.fixture(scope="module")
def options(usual: dict[str, Any]) -> dict[str, Any]:
    """Evaluations before, in the middle and at the end of four steps that go far."""
    more = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "learning_rate": 5e-3}
    return {**usual, **more, "eval_on_policy_prompts": 5, "eval_on_policy_tokens": NEW}


def trainer_of(options: dict[str, Any], out: Path, held_out: Any, **more: Any) -> Any:
    from jax_dpo import DPOConfig, DPOTrainer

    given = {**options, **more}
    model, train = str(given.pop("model_name_or_path")), str(given.pop("dataset_name"))
    return DPOTrainer(model, args=DPOConfig(str(out), **given), train_dataset=train, eval_dataset=held_out)


@pytest.fixture(scope="module")
def whole(options: dict[str, Any], data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Spy, list[int]]:
    """A finished run, what it sampled, and how many programs it compiled for that."""
    before = decoding._decode._cache_size()  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        trainer = trainer_of(options, tmp_path_factory.mktemp("on policy") / "out", str(data / "eval.jsonl"))
        trainer.train()
    compiled = decoding._decode._cache_size() - before  # type: ignore[attr-defined]
    return trainer, spy, [compiled, trainer.engine.evaluator._cache_size()]


def test_it_is_the_kl_of_plain_logits_along_what_was_sampled(
    whole: tuple[Any, Spy, list[int]], model: Path, data: Path
) -> None:
    from jax_dpo import load_model

    trainer, spy, _ = whole
    out = Path(trainer.args.output_dir)
    first, _, last = tiny.records(out, "eval")
    prompts, answers = spy.calls[-1]
    held_out = [row["prompt_ids"] for row in trainer.eval_sets[None].pairs.rows()]
    assert len(prompts) == 5 and all(p in held_out for p in prompts)
    assert all(1 <= len(a) <= NEW for a in answers)
    assert_like(last, measured.token_kls(load_model(out / "final"), load_model(model), prompts, answers))
    assert last["eval_kl_on_policy"] > 1e-3
    # Policy and reference are one at the start, wherever the policy goes.
    assert first["eval_kl_on_policy"] == first["eval_kl_on_policy/sequence_se"] == 0
    assert first["eval_kl_on_policy/length"] > 0
    decode = trainer.processing_class.decode
    assert [a["prompt"] for a in last["sampled"]] == [decode(p, skip_special_tokens=True).strip() for p in prompts]
    assert [a["answer"] for a in last["sampled"]] == [decode(a, skip_special_tokens=True).strip() for a in answers]
    assert [a["tokens"] for a in last["sampled"]] == [len(a) for a in answers]
    each = last["eval_kl_on_policy/sequence"] * len(prompts)
    assert sum(a["kl"] for a in last["sampled"]) == pytest.approx(each, rel=1e-5)
    assert all("sampled" not in entry for entry in trainer.state.log_history)


def test_fewer_prompts_than_asked_for_are_answered_several_times(options: dict[str, Any], tmp_path: Path) -> None:
    row = {"prompt": "a b", "chosen": " c", "rejected": " d"}
    trainer = trainer_of(options, tmp_path / "out", [row] * 2)
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        trainer.evaluate()
    ((prompts, answers),) = spy.calls
    assert len(prompts) == 5 and len({tuple(p) for p in prompts}) == 1
    assert len({tuple(a) for a in answers}) > 1


def test_every_evaluation_draws_anew_and_compiles_nothing_more(whole: tuple[Any, Spy, list[int]]) -> None:
    _, spy, (decoded, evaluated) = whole
    assert len(spy.calls) == 3
    assert len({str(answers) for _, answers in spy.calls}) == 3
    assert decoded == 1 and evaluated <= 2  # held-out pairs, and answers where those are longer


def test_the_same_step_draws_the_same(whole: tuple[Any, Spy, list[int]], options: dict[str, Any], data: Path) -> None:
    """Asked again after the run; and in a run that goes on from its middle. To the bit."""
    trainer, _, _ = whole
    out = Path(trainer.args.output_dir)
    last = tiny.records(out, "eval")[-1]
    names = [name for name in last if name.startswith("eval_kl_on_policy") and not name.endswith("runtime")]
    assert len(names) == 5
    again = trainer.evaluate()
    assert {name: again[name] for name in names} == {name: last[name] for name in names}
    gone_on = trainer_of(options, out.with_name("again"), str(data / "eval.jsonl"))
    gone_on.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    found = tiny.untimed(tiny.records(out.with_name("again"), "eval"))
    assert found == tiny.untimed(tiny.records(out, "eval"))[-1:]


@pytest.mark.slow
def test_with_an_adapter_and_several_sets_from_the_command_line(
    options: dict[str, Any], data: Path, model: Path, tmp_path: Path
) -> None:
    from jax_dpo import load_model

    sets = {"near": str(data / "eval.jsonl"), "far": str(data / "train.jsonl")}
    given = {**options, "use_peft": True, "lora_r": 4, "learning_rate": 5e-2, "eval_dataset": sets}
    given |= {"max_steps": 2, "eval_on_start": False, "metric_for_best_model": "far_kl_on_policy"}
    given |= {"report_to": "tensorboard", "greater_is_better": False}
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        ended = tiny.jax_dpo("train", *tiny.flags(given), "--output_dir", tmp_path / "out")
    assert ended.code in (0, 3), ended.err
    records = tiny.records(tmp_path / "out", "eval")
    assert [r["set"] for r in records] == ["near", "far"] and len(spy.calls) == 2
    policy = load_model(model, adapter=tmp_path / "out" / "final")
    for record, (prompts, answers) in zip(records, spy.calls):
        kls = measured.token_kls(policy, load_model(model), prompts, answers)
        assert_like(record, kls, f"eval_{record['set']}_")
    value = records[0]["eval_near_kl_on_policy"]
    assert value > 1e-3 and f"{value:.4f}" in ended.out


def test_a_model_and_a_reference_that_are_evaluated_alone(
    whole: tuple[Any, Spy, list[int]], data: Path, model: Path
) -> None:
    from jax_dpo import load_model

    final = Path(whole[0].args.output_dir) / "final"
    given = {"model_name_or_path": final, "ref_model_name_or_path": model, "eval_dataset": data / "eval.jsonl"}
    given |= {"eval_on_policy_prompts": 3, "eval_on_policy_tokens": NEW}
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        ended = tiny.jax_dpo("evaluate", *tiny.flags(given))
    assert ended.code == 0, ended.err
    shown = dict(re.findall(r"(eval_kl_on_policy\S*) +\S +(\S+)", ended.out))
    kls = measured.token_kls(load_model(final), load_model(model), *spy.calls[-1])
    assert_like({name: float(value) for name, value in shown.items()}, kls)


@pytest.mark.slow
def test_against_a_reference_that_moves_or_that_training_does_without(
    options: dict[str, Any], data: Path, model: Path, tmp_path: Path
) -> None:
    """The reference that moved to the policy at the last step is the policy; the precomputed one is the start."""
    from jax_dpo import load_model

    moving = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    trainer_of({**options, **moving}, tmp_path / "moved", str(data / "eval.jsonl")).train()
    assert tiny.records(tmp_path / "moved", "eval")[-1]["eval_kl_on_policy"] == pytest.approx(0, abs=1e-7)
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        out, beforehand = tmp_path / "before", {"precompute_ref_log_probs": True}
        trainer_of({**options, **beforehand}, out, str(data / "eval.jsonl")).train()
    kls = measured.token_kls(load_model(out / "final"), load_model(model), *spy.calls[-1])
    assert_like(tiny.records(out, "eval")[-1], kls)
