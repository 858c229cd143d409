"""Every option of TRL 1.16: an option here with the same default, or answered; none is accepted and ignored.

Oracle: tests/golden/trl/options.json, the fields and defaults of TRL's own dataclasses, made where TRL 1.16.0 and transformers 5.24.0
are installed by

    python tests/test_trl_options.py > tests/golden/trl/options.json
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jax_dpo.config import DPOConfig, ScriptArguments, parse
from jax_dpo.config.advice import ADVICE
from jax_dpo.config.fields import Advice, SameAs, default_of
from jax_dpo.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "trl" / "options.json"
TRL: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.stat().st_size else {}

# Defaults that differ, with the reason.
OTHER_DEFAULTS: dict[str, tuple[Any, str]] = {
    "output_dir": ("trainer_output", "TRL's None becomes this in its __post_init__"),
    "dataset_name": ("", "an empty text stands for a name that was not given"),
    "model_name_or_path": ("", "an empty text stands for a name that was not given"),
}
# Defaults of TRL that are refused where a script writes them out, with the reason.
REFUSED_DEFAULTS = {"logging_nan_inf_filter": "it hides numbers that are not finite; here they are never hidden"}
# None is not what TRL's option takes; each is a value that asks for something.
OTHER_VALUES = (True, False, 7, "other", {"some": 1}, ["some"])


def fields_of(*classes: type) -> dict[str, Any]:
    return {item.name: default_of(item) for cls in classes for item in dataclasses.fields(cls)}  # type: ignore[arg-type]


def test_options_of_trls_dpo_config() -> None:
    ours = fields_of(DPOConfig)
    for name, default in TRL["DPOConfig"].items():
        if name in ours:
            assert ours[name] == OTHER_DEFAULTS.get(name, (default,))[0], name
        else:
            assert name in ADVICE, f"{name} of TRL is neither an option nor answered"


@pytest.mark.parametrize("cls", ["ScriptArguments", "ModelConfig", "DatasetMixtureConfig"])
def test_arguments_of_trls_script(cls: str) -> None:
    ours = fields_of(ScriptArguments)
    for name, default in TRL[cls].items():
        if name in ours:
            assert ours[name] == OTHER_DEFAULTS.get(name, (default,))[0], name
        else:
            assert name in ADVICE, f"{name} of TRL is neither an argument nor answered"


def test_a_script_that_writes_out_every_default_runs_as_it_is() -> None:
    given = {name: value for name, value in TRL["DPOConfig"].items() if name not in REFUSED_DEFAULTS}
    assert DPOConfig(**{**given, "output_dir": "trainer_output"}) == DPOConfig()


def test_a_file_that_writes_out_every_default_runs_as_it_is(tmp_path: Path) -> None:
    given = {name: value for part in TRL.values() for name, value in part.items() if name not in REFUSED_DEFAULTS}
    for name in (*TRL["DatasetConfig"], "output_dir", "dataset_name", "model_name_or_path"):
        given.pop(name)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(given), encoding="utf-8")  # JSON is YAML
    assert parse([str(file)]) == (ScriptArguments(), DPOConfig())


ANSWERED = sorted(
    name
    for cls, part in TRL.items()
    if cls != "DatasetConfig"
    for name in part
    if isinstance(ADVICE.get(name), Advice) and not isinstance(ADVICE[name], SameAs)
)


@pytest.mark.parametrize("name", ANSWERED)
def test_what_asks_for_something_is_answered(name: str) -> None:
    words = ADVICE[name]
    assert isinstance(words, Advice)
    asked = 0
    for value in OTHER_VALUES:
        if words.takes(value):
            continue
        asked += 1
        with pytest.raises(UserError) as refused:
            DPOConfig(**{name: value})
        assert name in refused.value.message
        assert str(words) in refused.value.message
    assert asked, name


def test_what_has_no_answer_by_value_is_refused_whatever_it_is() -> None:
    names = {n for cls, part in TRL.items() if cls != "DatasetConfig" for n in part} & ADVICE.keys()
    assert {name for name in names if not isinstance(ADVICE[name], Advice)} == set()
    assert {name for name in REFUSED_DEFAULTS if ADVICE[name].takes(TRL["DPOConfig"][name])} == set()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--push_to_hub"], 'found "true", which is not an option here: nothing is uploaded'),
        (["--dataloader_num_workers", "-4"], 'found "-4", which is not an option here'),
        (["--dataset-num-proc=many"], "tokenization is batched"),
        (["--torch_dtype", "bfloat16"], "bf16: true computes in bfloat16"),
        (["--no_remove_unused_columns", "--load_in_4bit"], "load an unquantised model"),
    ],
)
def test_a_command_line_that_asks_for_something_is_answered(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(argv)
    assert words in refused.value.message
    assert len(refused.value.message.splitlines()) == 1


def test_a_command_line_that_asks_for_nothing_is_taken() -> None:
    argv = [
        "--push_to_hub",
        "false",
        "--no_remove_unused_columns",
        "--dataloader_pin_memory",
        "true",
        "--dtype=float32",
    ]
    argv += ["--gradient_checkpointing_kwargs", '{"use_reentrant": false}', "--no-load-in-4bit", "--beta", "0.2"]
    argv += ["--dataset_num_proc", "8", "--dataloader_num_workers=4"]  # how work is shared changes no result
    assert parse(argv) == (ScriptArguments(), DPOConfig(beta=0.2))
    assert DPOConfig(dataset_num_proc=8, dataloader_num_workers=4) == DPOConfig()


def test_scripts_can_ask_what_is_in_effect() -> None:
    config = DPOConfig(gradient_checkpointing=False)
    assert config.push_to_hub is False and config.remove_unused_columns is True  # type: ignore[attr-defined]
    assert config.hub_model_id is None and config.include_for_metrics == []  # type: ignore[attr-defined]
    assert config.activation_checkpointing is False  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="has no option warmup_ratio: write the share as warmup_steps"):
        _ = config.warmup_ratio  # type: ignore[attr-defined]
    assert not hasattr(config, "anything")


def test_another_name_of_an_option_goes_to_it() -> None:
    assert DPOConfig(activation_checkpointing=False).gradient_checkpointing is False
    assert DPOConfig(activation_checkpointing=None).gradient_checkpointing is True
    assert parse(["--no_activation_checkpointing"])[1].gradient_checkpointing is False
    assert DPOConfig(activation_checkpointing=False, gradient_checkpointing=False).gradient_checkpointing is False
    with pytest.raises(UserError, match="found false, but gradient_checkpointing true; it is the same option"):
        DPOConfig(activation_checkpointing=False, gradient_checkpointing=True)


if __name__ == "__main__":
    import trl
    from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

    found: dict[str, dict[str, Any]] = {}
    for cls in (trl.DPOConfig, trl.ScriptArguments, trl.ModelConfig, DatasetMixtureConfig, DatasetConfig):
        items = [item for item in dataclasses.fields(cls) if item.init]
        values = {i.name: i.default if i.default_factory is dataclasses.MISSING else i.default_factory() for i in items}
        found[cls.__name__] = {
            name: None if value is dataclasses.MISSING else getattr(value, "value", value)
            for name, value in values.items()
        }
    print(json.dumps(found, indent=1))
