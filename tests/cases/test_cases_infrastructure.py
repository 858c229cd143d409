"""Machines that fail, networks that are not there, other machines than before. Oracles: TRL 1.16's numbers, and what a process did."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from ports import held_port

pytestmark = [pytest.mark.usefixtures("inputs"), pytest.mark.slow]
COMMAND = "import sys; from jax_dpo.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def _start_here(start: Path, inputs: Path) -> None:
    """The model under the name that the files have for it."""
    shutil.copytree(start, inputs / "START")


def process(*argv: Any, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`jax-dpo argv` in a process of its own with one device; `before` is run in it ahead of the command."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment
    return subprocess.run(  # noqa: PLW1510
        [sys.executable, "-c", f"{before}\n{COMMAND}", *map(str, argv)],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_other_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    """google/orbax#648, #683: saved on eight devices, gone on with on two, on one, on eight in another order; TRL's losses of the
    unbroken run. That a restore is equal to the bit on any mesh is tests/train/test_checkpoint.py's."""
    import jax

    meshes = [(8, {"mesh_fsdp": 8, "per_device_train_batch_size": 1})]
    meshes += [(2, {"mesh_data": 2, "per_device_train_batch_size": 4}), (1, {"per_device_train_batch_size": 8})]
    meshes += [(8, {"mesh_data": 4, "mesh_tensor": 2, "per_device_train_batch_size": 2})]
    every = jax.local_devices()
    for i, (count, options) in enumerate(meshes, 1):
        monkeypatch.setattr(jax, "devices", lambda *_, n=count: every[:n])
        monkeypatch.setattr(jax, "device_count", lambda *_, n=count: n)
        again = (
            {"resume_from_checkpoint": "true"} if i > 1 else {}
        )  # auto says what is different, and how to go on all the same
        flags = tiny.flags({**options, "max_steps": 3 * i, **again})
        ended = tiny.jax_dpo("train", "other-topology.yaml", *flags, "--output_dir", "out")
        assert ended.code in (0, 3), ended.err
    steps = {r["step"]: r["loss"] for r in tiny.records(Path("out"), "train")}
    assert list(steps) == list(range(1, 13))
    assert [r["step"] for r in tiny.records(Path("out"), "resume")] == [3, 6, 9]
    want = [0.393605, 0.139068, 0.091872, 0.088268]
    assert [steps[step] for step in (3, 6, 9, 12)] == pytest.approx(want, rel=5e-5)


LISTEN = """
import sys
def heard(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        if not (event == "socket.connect" and isinstance(args[1], (str, bytes))):  # a socket of this machine's file system
            print("NETWORK", event, args[1:] or args, file=sys.stderr, flush=True)
sys.addaudithook(heard)
"""


def test_no_network(tmp_path: Path) -> None:
    """huggingface/datasets#6088, #6837: a local file, empty caches, proxies that lead nowhere: nobody is asked for anything."""
    nowhere = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    nowhere |= {"HF_HOME": str(tmp_path / "hf"), "JAX_DPO_CACHE": str(tmp_path / "cache")}
    ended = process("train", "remainder.yaml", "--output_dir", "out", before=LISTEN, **nowhere)
    assert ended.returncode in (0, 3), ended.stderr
    assert "NETWORK" not in ended.stderr, ended.stderr
    began = time.monotonic()
    ended = process("train", "remainder.yaml", "--dataset_name", "some-org/pairs", "--output_dir", "hub", **nowhere)
    assert ended.returncode == 2 and time.monotonic() - began < 120
    assert (
        "the Hugging Face Hub (https://huggingface.co) cannot be reached" in ended.stderr and not Path("hub").exists()
    )


def test_compile_cache(tmp_path: Path) -> None:
    """jax-ml/jax#39880, #12582, goodfire-ai/spd#974: below a file, as root reads every directory; then an orphan in one of limited size."""
    Path("file").touch()
    with_cache = {"JAX_DPO_CACHE": str(tmp_path / "own")}
    argv = ("train", "remainder.yaml", "--max_steps", 1, "--compile_cache_dir")
    ended = process(*argv, "file/cache", "--output_dir", "a", **with_cache)
    assert ended.returncode in (0, 3), ended.stderr
    (start,) = tiny.records(Path("a"), "start")
    own = tmp_path / "own" / "compiled"
    said = f"the compile cache file/cache cannot be used (Not a directory): compiled programs are kept in {own} instead"
    assert any(said in w for w in start["plan"]["warnings"]) and ended.stdout.count("cannot be used") == 1
    assert list(own.glob("*-cache"))
    orphan = Path("cache/jit_step-0f0f-cache")
    orphan.parent.mkdir()
    orphan.write_bytes(bytes(64))
    ended = process(*argv, "cache", "--output_dir", "b", **with_cache, JAX_COMPILATION_CACHE_MAX_SIZE=str(10**9))
    assert ended.returncode in (0, 3), ended.stderr
    assert "Error writing persistent compilation cache" not in ended.stderr
    warnings = tiny.records(Path("b"), "start")[0]["plan"]["warnings"]
    assert any(w.startswith("1 entries of the compile cache cache had lost their time of use") for w in warnings)
    assert len(list(orphan.parent.glob("*-cache"))) > 1 and orphan.exists()


@pytest.mark.parametrize(("mine", "found"), [(0, "1 of 2 joined"), (1, "nobody answers there")])
def test_half_a_pod(mine: int, found: str) -> None:
    """jax-ml/jax#35905, #22436: one of two hosts was started, or the port is closed; told by the environment, as schedulers do."""
    before = "import jax_dpo.sharding.multihost as m; m.JOIN_SECONDS = 4"
    with held_port() as port:
        where = f"127.0.0.1:{port}"
        place = {"JAX_COORDINATOR_ADDRESS": where, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(mine)}
        ended = process("train", "remainder.yaml", "--output_dir", "out", before=before, **place)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert f"process {mine} of 2 waited 4 s at {where}: {found}" in line
    assert "Start the command on all hosts" in line and "open the port between them" in line
    assert not Path("out").exists()


def test_fork_warnings() -> None:
    """vllm-project/vllm#15056, sgl-project/SpecForge#422: many rows, workers asked for; nothing is forked, and nothing is said of it."""
    rows = ({"prompt": f"Item {i}:", "chosen": " kept", "rejected": " lost"} for i in range(3000))
    tiny.write_rows(Path("many.jsonl"), list(rows))
    before = "from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('START')(['used before'] * 100)"
    argv = ("train", "remainder.yaml", "--dataset_name", "many.jsonl", "--dataset_num_proc", 4, "--max_steps", 1)
    ended = process(*argv, "--output_dir", "out", before=before)
    assert ended.returncode in (0, 3), ended.stderr
    assert "just got forked" not in ended.stderr and "os.fork()" not in ended.stderr
    assert json.loads(Path("out/verdict.json").read_text())["final"] == {"step": 1}
