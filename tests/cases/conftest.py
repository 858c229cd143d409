"""The inputs of the cases, and the checkpoints that they need, made out of the small recorded models."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import edit

TESTS = Path(__file__).resolve().parents[1]
# The runner of the command line, tiny.py, and the rules of vLLM's loader, served_rules.py.
sys.path[:0] = [str(TESTS / "run"), str(TESTS / "weights")]

INPUTS = TESTS / "cases" / "inputs"
# Ids of (BOS, EOS, pad) of the tokenizers, where they are not those of the model.
_SPECIAL = {"llama2": (0, 1, 2), "bos_eos_nopad": (0, 1, None)}


@pytest.fixture(scope="module", autouse=True)
def _whole_runs(one_device: None, quick_compile: None) -> None:
    """Every test here runs the trainer."""


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the inputs, which is the working directory: users name files as they see them."""
    folder = tmp_path / "inputs"
    shutil.copytree(INPUTS, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def start_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint: the recorded qwen3 (tied head, 512 ids, RoPE base 1e6) with a tokenizer, and another template where one is named."""

    def make(tokenizer: str = "chatml", template: str | None = None, **config: Any) -> Path:
        out = tmp_path_factory.mktemp("start") / "START"
        shutil.copytree(TESTS / "golden" / "training" / "start" / "qwen3", out)
        shutil.copytree(TESTS / "golden" / "tokenizers" / tokenizer, out, dirs_exist_ok=True)
        if template is not None:
            shutil.copy(INPUTS / template, out / "chat_template.jinja")
        ids = _SPECIAL.get(tokenizer)
        if ids is not None:
            named = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids))
            edit(out / "config.json", **named)
            edit(out / "generation_config.json", **named)
        edit(out / "config.json", max_position_embeddings=1024, **config)
        return out

    return make


@pytest.fixture(scope="session")
def start(start_of: Callable[..., Path]) -> Path:
    return start_of()
