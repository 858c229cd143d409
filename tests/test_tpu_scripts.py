"""tpu/*.sh: what --dry_run prints, that the same is run without it, and that the lines for the workers do what they say.

No cloud is asked: `gcloud` is a script made here that writes down its arguments.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

TPU = Path(__file__).resolve().parents[1] / "tpu"
SCRIPTS = ("create", "setup", "launch", "follow", "resume", "delete")
SETTINGS = (
    "--name",
    "my run",
    "--zone",
    "zone-a",
    "--project",
    "p1",
    "--repo",
    "https://example.org/r.git",
    "--share",
    "gs://b",
)

GCLOUD = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps(["gcloud", *sys.argv[1:]]) + "\\n")
if "describe" in sys.argv:
    states = open(os.environ["STATES"]).read().split()
    open(os.environ["STATES"], "w").write(" ".join(states[1:]))
    sys.exit("there is no such request") if states[0] == "ABSENT" else print(states[0])
"""


class Cloud:
    """Runs the scripts with a `gcloud` that only writes down what it is asked; `states` answers its `describe`, in turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program = folder / "gcloud"
        program.write_text(GCLOUD.format(python=sys.executable))
        program.chmod(0o755)
        self.config = folder / "my config.yaml"
        self.config.write_text("max_steps: 3\n")

    def start(
        self, script: str, *arguments: str, states: str = "", **settings: str
    ) -> subprocess.CompletedProcess[str]:
        (self.folder / "record").write_text("")
        (self.folder / "states").write_text(states)
        environment = {"PATH": f"{self.folder}:{os.environ['PATH']}", "POLL_SECONDS": "0"} | settings
        environment |= {"RECORD": str(self.folder / "record"), "STATES": str(self.folder / "states")}
        command = ["bash", str(TPU / f"{script}.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def dry(self, script: str, *arguments: str) -> list[list[str]]:
        """The commands that --dry_run prints, as argument lists. Nothing may be run."""
        result = self.start(script, "--dry_run", *SETTINGS, "--config", str(self.config), *arguments)
        assert result.returncode == 0, result.stderr
        assert self.asked() == []
        words = shlex.split(result.stdout)
        starts = [place for place, word in enumerate(words) if word == "gcloud"]
        return [words[start:end] for start, end in zip(starts, [*starts[1:], len(words)], strict=True)]

    def asked(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "record").read_text().splitlines()]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def what(command: Sequence[str]) -> str:
    """`gcloud compute tpus GROUP VERB ...` -> "GROUP VERB"."""
    assert list(command[:3]) == ["gcloud", "compute", "tpus"]
    return " ".join(command[3:5])


def shell_lines(command: Sequence[str]) -> str:
    (line,) = (word for word in command if word.startswith("--command="))
    return line.removeprefix("--command=")


def test_create_requests_the_slice(cloud: Cloud) -> None:
    request, question = cloud.dry("create", "--type", "v6e-8", "--version", "v2-alpha-tpuv6e")
    assert what(request) == "queued-resources create"
    assert request[5:] == [
        *("my run", "--zone=zone-a", "--project=p1", "--node-id=my run"),
        *("--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e", "--spot"),
    ]
    assert what(question) == "queued-resources describe"
    assert "--spot" not in cloud.dry("create", "--spot", "0")[0]


def test_setup_reaches_all_workers(cloud: Cloud) -> None:
    commands = cloud.dry("setup", "--ref", "v1")
    assert {what(command) for command in commands} == {"tpu-vm ssh"}
    assert all("--worker=all" in command for command in commands)
    text = "\n".join(shell_lines(command) for command in commands)
    assert "git clone --quiet --depth 1 --branch v1 https://example.org/r.git jax_dpo" in text
    assert "gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 b outputs" in text
    assert ".[tpu]" in text and "jax-dpo doctor" in text

    text = "\n".join(shell_lines(command) for command in cloud.dry("setup", "--share", "10.0.0.2:/runs"))
    assert "mount -t nfs -o hard 10.0.0.2:/runs outputs" in text and "gcsfuse" not in text


def test_launch_passes_the_configuration_the_port_and_the_options(cloud: Cloud) -> None:
    copy, start = cloud.dry("launch", "--port", "8765", "--", "--max_steps", "7", "--run_name", "it's mine")
    assert what(copy) == "tpu-vm scp" and "--worker=all" in copy
    assert copy[5:7] == [str(cloud.config), "my run:jax_dpo/run.yaml"]
    assert what(start) == "tpu-vm ssh" and "--worker=all" in start
    assert "export JAX_COORDINATOR_PORT=8765\n" in shell_lines(start)
    (train,) = (line for line in shell_lines(start).splitlines() if "jax-dpo train" in line)
    assert shlex.split(train.split(">>")[0])[2:] == [
        *(".venv/bin/jax-dpo", "train", "run.yaml", "--max_steps", "7", "--run_name", "it's mine")
    ]


def test_follow_shows_one_worker(cloud: Cloud) -> None:
    (command,) = cloud.dry("follow", "--worker", "3")
    assert what(command) == "tpu-vm ssh" and "--worker=3" in command
    assert shell_lines(command) == "tail -n 100 -F jax_dpo/logs/train.log"


def test_delete_deletes_the_request_with_its_slice(cloud: Cloud) -> None:
    (command,) = cloud.dry("delete")
    assert what(command) == "queued-resources delete"
    assert command[5:] == ["my run", "--zone=zone-a", "--project=p1", "--force", "--quiet"]


def test_resume_prints_the_whole_way(cloud: Cloud) -> None:
    commands = cloud.dry("resume", "--", "--max_steps", "7")
    steps = [*cloud.dry("delete"), *cloud.dry("create"), *cloud.dry("setup")]
    assert commands[1:-2] == steps
    assert "train run.yaml --resume_from_checkpoint auto --max_steps 7 >>" in shell_lines(commands[-1])


@pytest.mark.parametrize("script", ["create", "setup", "launch", "follow", "delete"])
def test_what_is_printed_is_what_is_run(cloud: Cloud, script: str) -> None:
    printed = cloud.dry(script, "--", "--run_name", "it's $HOME")
    arguments = (*SETTINGS, "--config", str(cloud.config), "--", "--run_name", "it's $HOME")
    result = cloud.start(script, *arguments, states="ACTIVE")
    assert result.returncode == 0, result.stderr
    assert cloud.asked() == printed


def test_settings_may_come_from_the_environment(cloud: Cloud) -> None:
    result = cloud.start("delete", "--dry_run", "--zone", "by-flag", NAME="by-variable", ZONE="by-variable")
    assert " by-variable --zone=by-flag " in result.stdout


def test_create_waits_until_the_slice_is_there(cloud: Cloud) -> None:
    result = cloud.start("create", *SETTINGS, states="WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert result.returncode == 0
    assert [what(command) for command in cloud.asked()][1:] == ["queued-resources describe"] * 3
    result = cloud.start("create", *SETTINGS, states="WAITING_FOR_RESOURCES FAILED")
    assert result.returncode == 2 and "FAILED" in result.stderr


@pytest.mark.parametrize(
    ("states", "verbs"),
    [
        ("ACTIVE", []),
        ("SUSPENDED ACTIVE", ["delete", "create", "describe", "ssh", "ssh", "ssh"]),
        ("FAILED ACTIVE", ["delete", "create", "describe", "ssh", "ssh", "ssh"]),
        ("ABSENT ACTIVE", ["create", "describe", "ssh", "ssh", "ssh"]),
    ],
)
def test_resume_does_what_the_state_needs(cloud: Cloud, states: str, verbs: list[str]) -> None:
    result = cloud.start("resume", *SETTINGS, "--config", str(cloud.config), states=states)
    assert result.returncode == 0, result.stderr
    assert [command[4] for command in cloud.asked()] == ["describe", *verbs, "scp", "ssh"]
    assert all("--zone=zone-a" in command and "my run" in " ".join(command) for command in cloud.asked())


def test_resume_waits_for_a_request_in_between(cloud: Cloud) -> None:
    result = cloud.start("resume", *SETTINGS, "--config", str(cloud.config), states="SUSPENDING")
    assert result.returncode == 2 and "SUSPENDING" in result.stderr
    assert len(cloud.asked()) == 1


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("create", ["--nam", "x"], "unknown flag --nam"),
        ("create", ["--name"], "--name needs a value"),
        ("launch", ["--config", "nowhere.yaml"], "nowhere.yaml"),
        ("launch", ["max_steps"], "come after --"),
        ("setup", ["--share", "gs://b"], "REPO is not set"),
        ("setup", ["--repo", "https://example.org/r.git"], "SHARE is ''"),
        ("setup", ["--repo", "https://example.org/r.git", "--share", "/tmp"], "SHARE is '/tmp'"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_run(
    cloud: Cloud, script: str, arguments: list[str], words: str
) -> None:
    result = cloud.start(script, *arguments)
    assert result.returncode == 2 and words in result.stderr
    assert cloud.asked() == []


def test_the_line_for_the_workers_starts_one_run_that_outlives_it(cloud: Cloud, tmp_path: Path) -> None:
    """The line itself, run here in a home directory like a worker's, with a program in place of jax-dpo."""
    home = tmp_path / "worker"
    program = home / "jax_dpo" / ".venv" / "bin" / "jax-dpo"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "$JAX_COORDINATOR_PORT" "$@"\nwhile [ ! -e ../stop ]; do sleep 0.05; done\n')
    program.chmod(0o755)
    line = shell_lines(cloud.dry("launch", "--port", "8765", "--", "--run_name", "a b")[1])

    def worker() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", line], cwd=home, capture_output=True, text=True, timeout=20, check=False)

    try:
        assert worker().returncode == 0
        log = home / "jax_dpo" / "logs" / "train.log"
        deadline = time.monotonic() + 10
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert log.read_text() == "8765 train run.yaml --run_name a b\n"
        second = worker()
        assert second.returncode == 1 and "a run is going on" in second.stderr
    finally:
        (home / "stop").touch()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_short_and_runnable_and_explains_itself(cloud: Cloud, script: str) -> None:
    path = TPU / f"{script}.sh"
    assert len(path.read_text().splitlines()) <= 80
    assert path.stat().st_mode & stat.S_IXUSR
    result = cloud.start(script, "--help")
    assert result.returncode == 0 and f"Example: tpu/{script}.sh" in result.stdout and "ZONE" in result.stdout


def test_the_common_part_is_short() -> None:
    assert len((TPU / "common.sh").read_text().splitlines()) <= 80
    assert {path.stem for path in TPU.glob("*.sh")} == {*SCRIPTS, "common"}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_clean() -> None:
    scripts = sorted(map(str, TPU.glob("*.sh")))
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
