"""TensorBoard and wandb. Oracles: the event file read back by its own framing and protobuf; a stand-in that takes calls."""

from __future__ import annotations

import math
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import report_runs as runs

from jax_dpo.errors import UserError
from jax_dpo.report.records import RunLog
from jax_dpo.report.writers import JsonlWriter, TensorBoardWriter, Writers, open_writers


def events(folder: Path) -> list[Any]:
    """All events of the one event file: length, its checksum, the message, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events.out.tfevents.*")
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event()
        event.ParseFromString(data[at + 12 : at + 12 + length])
        found.append(event)
        at += 12 + length + 4
    return found


def board(
    folder: Path, records: list[dict]
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[str]], list[Any]]:
    writer = TensorBoardWriter(folder)
    for record in records:
        writer.write(record)
    writer.close()
    scalars: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, list[str]] = {}
    everything = events(folder)
    for event in everything:
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
            elif value.HasField("tensor"):
                texts.setdefault(value.tag.removesuffix("/text_summary"), []).append(
                    value.tensor.string_val[0].decode()
                )
    return scalars, texts, everything


def test_train_and_eval_stand_side_by_side(tmp_path: Path) -> None:
    records = runs.healthy()
    scalars, texts, everything = board(tmp_path, records)
    trained = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    evaluated = [(r["step"], r["eval_rewards/margins"]) for r in records if r["kind"] == "eval"]
    assert [s for s, _ in scalars["loss/train"]] == [s for s, _ in trained]
    assert [v for _, v in scalars["loss/train"]] == pytest.approx([v for _, v in trained])
    assert [v for _, v in scalars["rewards/margins/eval"]] == pytest.approx([v for _, v in evaluated])
    assert {"loss/eval", "rewards/margins/train", "kl_divergence/train", "kl_divergence/eval", "beta/eval"} <= set(
        scalars
    )
    assert not [tag for tag in scalars if "eval_" in tag or tag.startswith(("time/", "step/"))]
    times = [e.wall_time for e in everything if e.summary.value and e.summary.value[0].tag == "loss/train"]
    assert times == [r["time"] for r in records if r["kind"] == "train"]
    assert "learning_rate: 5e-6" in texts["options"][0]
    assert texts["verdict"] == ["trained; all gates passed; exit 0"]
    assert "Talk about the story." in texts["samples"][0]


def test_several_sets_have_tags_of_their_own(tmp_path: Path) -> None:
    scalars, _, _ = board(tmp_path, runs.several_sets())
    assert (
        [s for s, _ in scalars["loss/eval_helpful"]] == [s for s, _ in scalars["loss/eval_harmless"]] == [0, 8, 16, 24]
    )
    assert "loss/eval" not in scalars


def test_kl_actions_are_texts_and_values(tmp_path: Path) -> None:
    scalars, texts, everything = board(tmp_path, runs.failing())
    assert scalars["kl_action/learning_rate"] == [(300, pytest.approx(2.5e-6)), (550, pytest.approx(1.25e-6))]
    assert scalars["kl_action/beta"] == [(350, pytest.approx(0.15))]
    assert [t.split(".")[0] for t in texts["kl_action"]][:2] == [
        "step 300: learning rate halved, 5e-6 to 2",
        "step 350: beta raised, 0",
    ]
    # A rollback tells TensorBoard to forget what came after the step that the run went back to.
    assert [e.step for e in everything if e.HasField("session_log")] == [251]


def test_a_resumption_makes_tensorboard_forget_the_steps_after_it(tmp_path: Path) -> None:
    _, _, everything = board(tmp_path, runs.resumed())
    assert [(e.step, e.session_log.status) for e in everything if e.HasField("session_log")] == [(13, 1)]


def test_what_is_not_finite_is_nan_on_the_board(tmp_path: Path) -> None:
    scalars, _, _ = board(tmp_path, runs.not_finite())
    assert [s for s, v in scalars["loss/train"] if math.isnan(v)] == [8, 9, 15]
    assert len(scalars["loss/train"]) == 20


def test_the_log_comes_first_and_the_others_get_what_it_wrote(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.jsonl")
    seen: list[tuple[dict, int]] = []

    class Watch:
        def write(self, record: dict) -> None:
            seen.append((record, len(log.records())))

        def close(self) -> None:
            seen.append(({}, -1))

    writers = Writers(log, [Watch()])
    written = writers.write({"kind": "train", "step": 1, "loss": math.nan})
    writers.close()
    assert written["loss"] is None and written["time"] > 0
    assert seen == [(written, 1), ({}, -1)]
    again = JsonlWriter(RunLog(tmp_path / "run.jsonl"))
    again.write(runs.train(2))
    assert [r["step"] for r in again.log.records()] == [1, 2]
    again.close()


def test_report_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert open_writers("none", tmp_path) == open_writers([], tmp_path) == open_writers(None, tmp_path) == []
    (writer,) = open_writers(["tensorboard"], tmp_path)
    writer.close()
    assert list((tmp_path / "tensorboard").iterdir())
    with pytest.raises(UserError, match="not installed") as caught:
        open_writers("wandb", tmp_path)
    assert caught.value.name == "wandb-missing"
    with pytest.raises(UserError, match="mlflow") as caught:
        open_writers(["mlflow"], tmp_path)
    assert caught.value.name == "report-to-unknown"


def test_tensorboard_that_cannot_be_written_is_a_clear_message(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file stands here")
    with pytest.raises(UserError, match="report_to") as caught:
        open_writers("tensorboard", tmp_path)
    assert caught.value.name == "tensorboard-not-writable"


def test_wandb_gets_the_names_of_hugging_faces_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict] = []
    config: dict[str, Any] = {}
    run = types.SimpleNamespace(
        log=logged.append,
        define_metric=lambda *a, **k: None,
        finish=lambda: logged.append({"finished": True}),
        config=types.SimpleNamespace(update=lambda values, **k: config.update(values)),
        summary={},
    )
    called: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: called.update(k) or run))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    (writer,) = open_writers("wandb", tmp_path, run_name="a name", project="pairs")
    for record in runs.healthy():
        writer.write(record)
    writer.close()
    assert called == {"dir": str(tmp_path), "name": "a name", "project": "pairs"}
    assert config["learning_rate"] == 5e-6
    assert logged[0]["eval/loss"] == pytest.approx(math.log(2)) and logged[0]["train/global_step"] == 0
    assert logged[1]["train/rewards/margins"] == 0.0 and logged[1]["train/global_step"] == 1
    assert run.summary == {"verdict": "trained; all gates passed; exit 0"}
    assert logged[-1] == {"finished": True}


def test_the_environment_names_wandbs_project_before_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers, whose own default is the project huggingface."""
    called: dict[str, Any] = {}
    run = types.SimpleNamespace(define_metric=lambda *a, **k: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: called.update(k) or run))
    monkeypatch.setenv("WANDB_PROJECT", "of-the-shell")
    open_writers("wandb", tmp_path, project="pairs")
    assert called["project"] == "of-the-shell"
