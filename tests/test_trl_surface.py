"""DPOTrainer by TRL's signature and methods. Oracle: the signature of trl.DPOTrainer 1.16, and what transformers' Trainer does."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import jax_dpo
from jax_dpo import DPOConfig, DPOTrainer
from jax_dpo.errors import UserError
from jax_dpo.trainer.trl_surface import ATTRIBUTES, TrainerState, TrlSurface

# list(inspect.signature(trl.DPOTrainer.__init__).parameters)[1:], TRL 1.16.0
SIGNATURE = ["model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"]
SIGNATURE += ["compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config"]


def test_positional_arguments_come_in_trls_order() -> None:
    parameters = inspect.signature(DPOTrainer.__init__).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:] == SIGNATURE


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data_collator": object()}, "option data_collator: is no argument of DPOTrainer here: pairs are packed"),
        (
            {"compute_metrics": len},
            "compute_metrics: is no argument of DPOTrainer here: every evaluation has TRL's metrics",
        ),
        ({"optimizers": (object(), None)}, "optimizers: is no argument of DPOTrainer here: PyTorch's optimizers"),
        ({"quantization_config": {"load_in_4bit": True}}, "load an unquantised model"),
        ({"model_init": len}, "pass the model itself"),
        ({"beta": 0.2}, "option beta: is an option of a run: write DPOConfig(beta=...)"),
        ({"max_prompt_length": 4}, "write DPOConfig(max_prompt_length=...)"),
        ({"rpo_alpha": 1.0}, "write loss_type: [sigmoid, sft]"),
        ({"trian_dataset": []}, "option trian_dataset: there is no such option"),
    ],
)
def test_arguments_that_ask_for_something_else_are_answered(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        DPOTrainer("nowhere", **given)
    assert words in refused.value.message


def test_all_of_them_at_once_and_before_the_model_is_looked_for() -> None:
    with pytest.raises(UserError) as refused:
        DPOTrainer("nowhere", compute_metrics=len, optimizers=(object(), object()), beta=0.2)
    assert refused.value.message.startswith("3 options cannot be used")


def test_what_asks_for_nothing_is_taken() -> None:
    """The next thing that is wrong is told: there is no such model."""
    with pytest.raises(UserError) as refused:
        DPOTrainer(
            "./nowhere", data_collator=None, compute_metrics=None, optimizers=(None, None), quantization_config=None
        )
    assert refused.value.name not in ("unknown-option", "invalid-option")


class Bare(TrlSurface):
    """The small methods need options and the log alone."""

    def __init__(self, out: Path) -> None:
        self.args = DPOConfig(str(out))
        self.callbacks = []
        self.state = TrainerState([{"loss": 0.7, "epoch": 0.5, "step": 1}], 1, 0.5)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_that_are_not_here_are_answered(name: str, tmp_path: Path) -> None:
    with pytest.raises(AttributeError) as refused:
        getattr(Bare(tmp_path), name)
    assert str(refused.value) == f"DPOTrainer has no {name}: {ATTRIBUTES[name]}"


def test_an_unknown_attribute_is_one(tmp_path: Path) -> None:
    assert not hasattr(Bare(tmp_path), "anything")


def test_callbacks_come_and_go(tmp_path: Path) -> None:
    class Looks:
        pass

    trainer, one = Bare(tmp_path), Looks()
    trainer.add_callback(one)
    trainer.add_callback(Looks)
    assert trainer.callbacks[0] is one and isinstance(trainer.callbacks[1], Looks)
    assert trainer.pop_callback(Looks) is one
    trainer.remove_callback(Looks)
    assert trainer.callbacks == [] and trainer.pop_callback(Looks) is None


def test_metrics_and_state_are_written_as_transformers_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Bare(tmp_path / "out")
    trainer.log_metrics("eval", {"eval_loss": 0.5, "epoch": 1})
    assert capsys.readouterr().out == "***** eval metrics *****\n  epoch     = 1\n  eval_loss = 0.5000\n"
    trainer.save_metrics("train", {"train_loss": 0.6})
    trainer.save_metrics("eval", {"eval_loss": 0.5})
    trainer.save_metrics("eval", {"eval_loss": 0.4}, combined=False)
    trainer.save_state()
    found = {p.name: json.loads(p.read_text()) for p in (tmp_path / "out").iterdir()}
    assert found.pop("trainer_state.json")["log_history"] == trainer.state.log_history
    assert found == {
        "train_results.json": {"train_loss": 0.6},
        "eval_results.json": {"eval_loss": 0.4},
        "all_results.json": {"train_loss": 0.6, "eval_loss": 0.5},
    }


def test_names_that_trl_has_and_jax_dpo_has_not_are_answered_at_the_import() -> None:
    with pytest.raises(ImportError, match="jax_dpo has no get_peft_config: pass peft_config=LoraConfig"):
        from jax_dpo import get_peft_config  # type: ignore[attr-defined]  # noqa: F401
    assert not hasattr(jax_dpo, "anything")
