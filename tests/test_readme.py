"""What README.md and the other pages say is there and works. Oracles: the real parser, the Makefile, the file system, a tiny run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "run"))

import tiny

from jax_dpo.cli import main
from jax_dpo.cli.commands import COMMANDS, ConvertArguments, GenerateArguments
from jax_dpo.config import DPOConfig, ScriptArguments, parse
from jax_dpo.config.flags import option_types
from jax_dpo.trainer.outputs import OWN_FILES, OWN_FOLDERS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
)
TOP = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("."))


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def lines(start: str) -> list[str]:
    """Lines of the README's shell blocks that begin so."""
    return [line for block in blocks("bash") for line in block.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("line", lines("jax-dpo "))
def test_every_command_line_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line itself, down to the function that would do the work."""
    called = []

    def work(*_: object, **__: object) -> int:
        called.append(line)
        return 0

    for module, names in {
        "jax_dpo.trainer": ("run_training", "run_evaluation", "run_check", "run_generate"),
        "jax_dpo.weights.export": ("convert",),
        "jax_dpo.report.html": ("write_report",),
        "jax_dpo.report.compare": ("write_comparison",),
        "jax_dpo.doctor": ("examine",),
    }.items():
        fake = types.ModuleType(module)
        for name in names:
            setattr(fake, name, work)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(line)[1:]) == 0
    assert called


def test_the_shell_blocks_hold_nothing_that_is_not_tested() -> None:
    known = ("jax-dpo ", "make ", "tpu/", "pip install ", "source ")
    assert [line for line in lines("") if not line.startswith(known)] == []
    assert len(lines("jax-dpo ")) >= 5


def test_every_make_target_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {shlex.split(line)[1] for line in lines("make ")} | set(re.findall(r"`make (\w+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    assert "make test" in lines("make ")
    assert re.search(r"^step test \d+ make test$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("line", lines("tpu/"))
def test_every_tpu_line_can_be_printed(line: str) -> None:
    script, *rest = shlex.split(line)
    done = subprocess.run([ROOT / script, "--dry_run", *rest], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gcloud" in done.stdout
    if "--" in rest:
        parse(["configs/standard.yaml", *rest[rest.index("--") + 1 :]], needs=("model_name_or_path", "dataset_name"))


def test_every_option_that_is_named_exists() -> None:
    known = {*option_types(ScriptArguments, DPOConfig, GenerateArguments, ConvertArguments), "help", "dry_run"}
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"--([a-z_0-9]+)", prose))
    assert {"max_steps", "coordinator_address"} <= named <= known


def test_the_table_of_commands_is_whole() -> None:
    assert re.findall(r"^\| `jax-dpo (\w+)` \|", README, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    named = re.findall(rf"(?<![\w./~-])((?:{TOP}|\.ci)/[\w./-]*\w)", text)
    missing += [path for path in named if not path.startswith(("outputs/", "demo/")) and not (ROOT / path).exists()]
    assert not missing


def test_the_tree_of_the_repository_is_there() -> None:
    (tree,) = [block for block in blocks("text") if block.startswith("jax_dpo/")]
    parent = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        path = (parent if line.startswith(" ") else ROOT) / name
        assert path.exists(), name
        parent = parent if line.startswith(" ") else path
    shown = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    there = {p.name for p in (ROOT / "jax_dpo").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert there <= shown


def test_the_tree_of_a_run_is_what_a_run_writes() -> None:
    (tree,) = [block for block in blocks("text") if block.startswith("outputs/")]
    names = [word.rstrip("/") for line in tree.splitlines()[1:] for word in re.split(r" {3,}", line.strip())[0].split()]
    assert {name for name in names if not name.startswith("checkpoint-")} == {*OWN_FILES, *OWN_FOLDERS}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as the README's reader has it: ./model and pairs.jsonl; and one device, on which a tiny model is quicker."""
    import jax

    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    tiny.make_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "pairs.jsonl", tiny.text_rows(24))
    monkeypatch.setenv("JAX_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python_block(beginning: str) -> str:
    (found,) = [block for block in blocks("python") if block.startswith(beginning)]
    return found


def test_the_script_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(python_block("from datasets"), "README.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out.split()[-1]) < 0.1
    assert tiny.records(workplace / "outputs" / "script", "verdict")
    assert (workplace / "outputs" / "trained" / "model.safetensors").exists()


def test_the_adapter_is_merged(workplace: Path) -> None:
    from jax_dpo import LoraConfig, load_model, save_model

    base = load_model("./model")
    save_model(base.with_new_adapter(LoraConfig(r=4), seed=0), "outputs/dpo_lora/final")
    exec(compile(python_block("from jax_dpo import load_model"), "README.md", "exec"), {})
    assert load_model("outputs/merged").config == base.config
