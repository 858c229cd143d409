"""What scripts hand over as data, as TRL's own tests do: every kind of container, streams, mixtures, environment variables.

Oracle: the same pairs handed over as a plain file, and the library `datasets`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny

from jax_dpo import DPOConfig, DPOTrainer
from jax_dpo.errors import UserError

KINDS: dict[str, Callable[[datasets.Dataset], Any]] = {
    "Dataset": lambda d: d,
    "IterableDataset": lambda d: d.to_iterable_dataset(),
    "list": list,
    "DatasetDict": lambda d: datasets.DatasetDict(one=d, two=d),
    "IterableDatasetDict": lambda d: datasets.IterableDatasetDict(
        one=d.to_iterable_dataset(), two=d.to_iterable_dataset()
    ),
    "dict of Dataset": lambda d: {"one": d, "two": d},
    "dict of IterableDataset": lambda d: {"one": d.to_iterable_dataset(), "two": d.to_iterable_dataset()},
}


@pytest.fixture(scope="module")
def held_out(data: Path) -> datasets.Dataset:
    lines = (data / "eval.jsonl").read_text().splitlines()
    return datasets.Dataset.from_list([json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def evaluated_file(
    model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DPOTrainer, dict[str, float]]:
    """A trainer with another reference (so that the numbers say something), and its metrics of the file."""
    folder = tmp_path_factory.mktemp("evaluated")
    other = tiny.make_model(folder / "other", seed=1)
    trainer = DPOTrainer(str(model), str(other), DPOConfig(str(folder / "out")), eval_dataset=str(data / "eval.jsonl"))
    return trainer, trainer.evaluate()


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if "runtime" not in k and "per_second" not in k}


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_takes_every_container(
    kind: str, held_out: datasets.Dataset, evaluated_file: tuple[DPOTrainer, dict[str, float]]
) -> None:
    trainer, expected = evaluated_file
    found, want = numbers(trainer.evaluate(KINDS[kind](held_out))), numbers(expected)
    assert want["eval_kl_divergence"] > 0.01
    if "ict" in kind:  # several sets, each under its own name
        want = {k.replace("eval_", f"eval_{name}_", 1): v for name in ("one", "two") for k, v in want.items()}
    assert found == want


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_trainer_is_made_with_every_container(
    kind: str | None, held_out: datasets.Dataset, model: Path, data: Path, tmp_path: Path
) -> None:
    given = KINDS[kind](held_out) if kind else None
    config = DPOConfig(str(tmp_path), eval_strategy="steps" if kind else "no")
    trainer = DPOTrainer(str(model), None, config, None, str(data / "train.jsonl"), given)
    names = [] if kind is None else ["one", "two"] if "ict" in kind else [None]
    assert [(name, len(pairs)) for name, pairs in trainer.eval_sets.items()] == [(name, 8) for name in names]


def test_training_without_training_data_is_refused(model: Path, tmp_path: Path) -> None:
    trainer = DPOTrainer(str(model), args=DPOConfig(str(tmp_path / "out")))
    with pytest.raises(UserError, match="train\\(\\) needs train_dataset"):
        trainer.train()


def stream_of(rows: list[dict[str, Any]], seen: list[int]) -> datasets.IterableDataset:
    """A stream that notes which rows were asked for."""

    def read() -> Any:
        for i, row in enumerate(rows):
            seen.append(i)
            yield row

    return datasets.IterableDataset.from_generator(read)


def test_a_stream_is_read_as_far_as_the_run_takes(model: Path, data: Path, tmp_path: Path) -> None:
    """Two steps of four pairs; the third and the fifth row are dropped and do not count."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    rows[2]["chosen"] = rows[4]["chosen"] = None
    seen: list[int] = []
    config = DPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=4)
    trainer = DPOTrainer(str(model), args=config, train_dataset=stream_of(rows, seen))
    kept = [row for row in rows[:10] if row["chosen"] is not None]
    plain = DPOTrainer(str(model), args=config, train_dataset=kept)
    assert trainer.train_dataset == plain.train_dataset and len(kept) == 8
    assert max(seen) <= 10  # one is looked at ahead
    assert trainer.args.train_sampling_strategy == "sequential"
    assert any("the training data are a stream: pairs are taken in its own order" in note for note in trainer.notes)


def test_a_stream_needs_max_steps(model: Path, tmp_path: Path) -> None:
    stream = stream_of(tiny.text_rows(8), [])
    with pytest.raises(UserError, match="max_steps must say how long the run is") as refused:
        DPOTrainer(str(model), args=DPOConfig(str(tmp_path)), train_dataset=stream)
    assert refused.value.name == "stream-without-max-steps"


def test_a_mixture_in_a_file_is_trained(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 + 24 pairs by the shares 1 : 0.5 give 24 + 12, of which a quarter is held out; the file names a variable too."""
    monkeypatch.setenv("MIXTURE_TEST", "of the shell")
    config = {
        "env": {"MIXTURE_TEST": "of the file", "MIXTURE_NUMBER": 7},
        "datasets": [
            {"path": str(data / "train.jsonl"), "fraction": 1.0},
            {
                "path": "json",
                "data_files": str(data / "scored.jsonl"),
                "columns": ["prompt", "chosen", "rejected"],
                "fraction": 0.5,
            },
        ],
        "test_split_size": 0.25,
        "model_name_or_path": str(model),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "eval_strategy": "steps",
        "save_strategy": "no",
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config))
    ended = tiny.jax_dpo("train", "--config", file, "--output_dir", tmp_path / "out")
    assert ended.code in (0, 3), ended.err
    (start,) = tiny.records(tmp_path / "out", "start")
    assert start["data"]["train"]["kept"] == 27 and start["data"]["eval"]["eval"]["kept"] == 9
    assert (os.environ.pop("MIXTURE_TEST"), os.environ.pop("MIXTURE_NUMBER")) == ("of the file", "7")


def test_what_is_held_out_is_not_trained_on_where_nothing_is_evaluated(usual: dict[str, Any], tmp_path: Path) -> None:
    options = tiny.flags({**usual, "max_steps": 1, "save_strategy": "no", "test_split_size": 4})
    assert tiny.jax_dpo("train", *options, "--output_dir", tmp_path / "out").code == 0
    (start,) = tiny.records(tmp_path / "out", "start")
    assert start["data"]["train"]["kept"] == 20 and start["data"]["eval"] == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset_streaming": True}, "max_steps must say how long the run is"),
        (
            {"dataset_streaming": True, "max_steps": 2, "test_split_size": 4},
            "test_split_size cannot be taken from a stream",
        ),
        (
            {"datasets": '[{"path": "x.jsonl"}]', "streaming": True, "max_steps": 2},
            "a mixture (datasets) is read whole",
        ),
    ],
)
def test_streams_that_cannot_be_are_refused(
    options: dict[str, Any], words: str, model: Path, data: Path, tmp_path: Path
) -> None:
    given = {"model_name_or_path": model, "dataset_name": data / "train.jsonl", "output_dir": tmp_path / "out"}
    ended = tiny.jax_dpo("train", *tiny.flags({**given, **options}))
    assert ended.code == 2
    assert words in ended.err


TEMPLATE = (
    "{% if tone is defined %}<|im_start|>system\n{{ tone }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_each_row_has_template_arguments_of_its_own(model: Path, tmp_path: Path) -> None:
    """Oracle: apply_chat_template with the row's arguments, which TRL calls."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.chat_template = TEMPLATE
    rows = [
        {**row, "chat_template_kwargs": kwargs}
        for row, kwargs in zip(tiny.chat_rows(3), [{"tone": "plain"}, {"tone": "light and easy"}, None])
    ]
    trainer = DPOTrainer(str(model), args=DPOConfig(str(tmp_path)), train_dataset=rows, processing_class=tokenizer)
    assert len({len(found["prompt_ids"]) for found in trainer.train_dataset}) == 3
    for row, found in zip(rows, trainer.train_dataset):
        kwargs = row["chat_template_kwargs"] or {}
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **kwargs)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], **kwargs)["input_ids"]
        assert found["prompt_ids"] == prompt
        assert found["prompt_ids"] + found["chosen_ids"] == whole


def test_a_stream_can_be_precomputed(model: Path, data: Path, tmp_path: Path) -> None:
    """TRL refuses it: its streams are mapped while they train. Here the pairs that a run takes are known."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()][:8]
    options = {"max_steps": 1, "precompute_ref_log_probs": True, "per_device_train_batch_size": 8}
    made = [
        DPOTrainer(str(model), args=DPOConfig(str(tmp_path / "out"), **options), train_dataset=given).train_dataset
        for given in (rows, stream_of(rows, []))
    ]
    assert made[0] == made[1] and made[0][0]["ref_chosen_logps"] < 0
