"""What doctor sees and complains of, on made-up machines, and one look at the real one."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from jax_dpo import doctor


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.10.2", (0, 10, 2)),
        ("1.2.3rc1", (1, 2, 3)),
        ("2.4.6.dev0", (2, 4, 6)),
        ("0.10.2+cuda", (0, 10, 2)),
        ("x", ()),
    ],
)
def test_versions_compare_as_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert doctor.version_tuple(text) == numbers


def test_lower_bounds_are_those_of_the_distribution() -> None:
    assert doctor.lower_bounds(["jax>=0.10.2", 'jax[tpu]>=0.10.2; extra == "tpu"', "a-b >= 1.0", "plain"]) == {
        "jax": "0.10.2",
        "a-b": "1.0",
    }
    bounds = doctor.lower_bounds(metadata.requires("jax-dpo") or [])
    assert {"jax", "flax", "optax", "orbax-checkpoint", "transformers"} <= bounds.keys()


def test_old_and_missing_packages_are_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"jax": "0.4.30", "flax": None}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: there[name] if name in there else real(name))
    found = doctor.versions()
    assert len(found.problems) == 2
    assert any(problem.startswith("jax 0.4.30 is older than 0.") for problem in found.problems)
    assert any(
        problem.startswith("flax is not installed; install it with `pip install 'flax>=") for problem in found.problems
    )


def test_memory_is_the_containers_where_it_is_less(tmp_path: Path) -> None:
    machine = doctor.memory_bytes(tmp_path / "none")
    assert machine is not None and machine > 2**28
    limit = tmp_path / "memory.max"
    limit.write_text("1048576\n")
    assert doctor.memory_bytes(limit) == 1048576
    limit.write_text("max\n")
    assert doctor.memory_bytes(limit) == machine


def test_little_memory_is_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 2**30)
    assert doctor.processor().problems == [
        "1.0 GiB of memory is little: full training takes about 20 bytes a parameter; use a machine with more [memory-small]"
    ]
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 2**40)
    assert doctor.processor().problems == []


@pytest.mark.parametrize(
    ("files", "libtpu", "platform", "wanted", "words"),
    [
        ([], False, "cpu", None, None),
        (["nvidia0"], False, "cpu", None, "pip install jax-dpo[cuda]"),
        (["nvidia0"], False, "cpu", "cpu", "JAX_PLATFORMS=cpu forbids it"),
        (["nvidia0"], False, "gpu", None, None),
        (["accel0"], False, "cpu", None, "pip install jax-dpo[tpu]"),
        (["accel0"], True, "cpu", None, "another process may hold it"),
        (["accel0"], True, "tpu", None, None),
        ([], True, "cpu", None, "libtpu is installed on a machine without a TPU"),
        ([], True, "cpu", "cpu", None),
    ],
)
def test_devices_that_lie_idle_are_complained_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[str],
    libtpu: bool,
    platform: str,
    wanted: str | None,
    words: str | None,
) -> None:
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if libtpu else None)
    complaints = doctor.unused_accelerators(platform, wanted, tmp_path)
    assert len(complaints) == (words is not None)
    assert words is None or words in complaints[0]


def test_caches_are_sized_and_tried(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "program").write_bytes(b"x" * 3 * 2**20)
    (tmp_path / "file").touch()
    places = {"full": full, "new": tmp_path / "a" / "b", "blocked": tmp_path / "file" / "cache"}
    found = doctor.disk(places, min_free_gib=1e-9)
    lines = {line.split()[0]: line for line in found.lines}
    assert "holds 3.0 MiB" in lines["full"]
    assert "not made yet" in lines["new"]
    assert found.problems == [
        f"blocked {tmp_path / 'file' / 'cache'}: no part of the path is a directory; name another place [place-unusable]"
    ]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "full"]  # looking leaves nothing behind
    assert "nothing can be written there" in (doctor.not_writable(Path("/proc")) or "")


def test_little_space_is_told_once_a_disk(tmp_path: Path) -> None:
    found = doctor.disk({"one": tmp_path / "one", "two": tmp_path / "two"}, min_free_gib=1e9)
    assert any("are wanted; free some space" in problem for problem in found.problems)
    assert len([problem for problem in found.problems if str(tmp_path) in problem]) == 1


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "unused_accelerators", lambda *_: [])
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 2**40)
    assert doctor.examine({"compile cache": tmp_path}, min_free_gib=1e-9) == 0
    shown = capsys.readouterr().out
    for words in ("versions:", "jax ", "8 x cpu (cpu)", "attention", "chunked: ", "compile cache", "nothing is wrong"):
        assert words in shown
    assert doctor.examine({"compile cache": tmp_path}, min_free_gib=1e9) == 1
    assert "1 thing is wrong:" in capsys.readouterr().out
