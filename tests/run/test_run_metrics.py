"""What a run logs is what docs/metrics.md says it logs. Oracles: the page, TRL's own numbers in test_run_trl_options, sums by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from jax_dpo.train import kl
from jax_dpo.train.metrics import Sums, named

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
BOOKKEEPING = {"kind", "time", "set", "non_finite", "reason", "seconds", "kl_profile", "sampled"}


def listed(*titles: str) -> set[str]:
    """The names in the first columns of the tables under these titles."""
    found: set[str] = set()
    for title in titles:
        body = re.split(r"^## ", PAGE.split(f"## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
        found |= set(re.findall(r"^\| `([^`]+)` \|", body, re.MULTILINE))
    return found


@pytest.fixture(scope="module")
def trainer(usual: dict[str, Any], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Five steps logged in twos, two evaluation sets of 8 and 24 pairs."""
    from jax_dpo import DPOConfig, DPOTrainer

    options = {**usual, "max_steps": 5, "logging_steps": 2, "save_strategy": "no"}
    model, train = str(options.pop("model_name_or_path")), str(options.pop("dataset_name"))
    args = DPOConfig(str(tmp_path_factory.mktemp("logged") / "out"), eval_strategy="steps", eval_steps=4, **options)
    held_out = {"near": str(data / "eval.jsonl"), "far": str(data / "train.jsonl")}
    made = DPOTrainer(model, args=args, train_dataset=train, eval_dataset=held_out)
    made.train()
    return made


def test_the_page_names_whatever_a_training_record_has(trainer: Any) -> None:
    records = tiny.records(Path(trainer.args.output_dir), "train")
    logged = {name for r in records for name in r} - BOOKKEEPING
    known = listed("Training", "Speed and place")
    assert logged <= known
    # What this run has no use for: experts, a reference that is not there, devices whose peak is known, a trust region.
    region = {f"trust_region/{name}" for name in ("scale", "rate", "kl", "limit")}
    assert known - logged == {"aux_loss", "kl_estimate", "mfu", *region}
    nothing = dict.fromkeys(Sums._fields, 0.0)
    assert known >= set(named(nothing | {"aux_loss": 1.0})) | set(named(nothing | {"kl_tokens": 1.0}))


def test_the_page_names_whatever_an_evaluation_has_under_the_name_of_its_set(trainer: Any) -> None:
    whatever = {name for name in named(dict.fromkeys(Sums._fields, 1.0)) if name != "aux_loss"} | set(kl.NAMES)
    own = listed("Evaluation")
    lengths = ("length/chosen", "length/rejected", "length/chosen_longer")
    base = ("loss", "runtime", "samples_per_second", "steps_per_second", "num_tokens", *lengths)
    of_lines = {"eval_length/margin_slope", "eval_length/margin_correlation"}  # all answers here are of one length
    sampled = {f"eval_kl_on_policy{n}" for n in ("", "/se", "/sequence", "/sequence_se", "/length", "/runtime")}
    of_lines |= sampled  # nor is anything sampled
    assert own == {f"eval_{n}" for n in base} | of_lines
    for record in tiny.records(Path(trainer.args.output_dir), "eval"):
        prefix = f"eval_{record['set']}_"
        of_the_set = {name.removeprefix(prefix) for name in record if name.startswith(prefix)}
        assert of_the_set == whatever | {name.removeprefix("eval_") for name in own - of_lines}
        assert {n for n in record if not n.startswith(prefix)} - BOOKKEEPING == {"step", "epoch", "beta"}


def test_several_sets_keep_all_their_metrics(trainer: Any) -> None:
    """In TRL the second set's would overwrite the first's."""
    found = trainer.evaluate()
    for name in ("near", "far"):
        last = [r for r in tiny.records(Path(trainer.args.output_dir), "eval") if r["set"] == name][-1]
        for metric in ("loss", "rewards/margins", "kl_divergence"):
            assert found[f"eval_{name}_{metric}"] == pytest.approx(last[f"eval_{name}_{metric}"], rel=1e-6)
    assert found["eval_near_logps/chosen"] != found["eval_far_logps/chosen"]


def test_the_end_has_what_was_not_logged(trainer: Any) -> None:
    """The fifth step: TRL's last entry has its metrics too."""
    last = trainer.state.log_history[-1]
    pairs = set(named(dict.fromkeys(Sums._fields, 1.0))) - {"aux_loss", "loss"} | set(kl.NAMES)
    assert set(last) == listed("The end of a run") | pairs | {"num_tokens", "epoch", "step"}
    assert last["train_samples_per_second"] == pytest.approx(8 * last["train_steps_per_second"])  # 8 pairs a step
    assert last["train_steps_per_second"] == pytest.approx(5 / last["train_runtime"])
    assert last["num_tokens"] == 5 * 8 * 2 * (tiny.PROMPT + tiny.ANSWER)


def test_every_table_of_the_page_is_whole() -> None:
    for line in PAGE.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    for title in re.findall(r"^## (.+)$", PAGE, re.MULTILINE):
        assert f"- [{title}](#{title.lower().replace(' ', '-')})" in PAGE
