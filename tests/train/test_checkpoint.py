"""Checkpoints on a real disk with real Orbax saves. The oracle is what was saved: every restore is compared bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ports import held_port

from jax_dpo.errors import UserError
from jax_dpo.train import checkpoint as module
from jax_dpo.train.checkpoint import Checkpoints
from jax_dpo.train.digest import damage
from jax_dpo.train.disk import disk_error

SHAPES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 2), (1, 1, 1)]


class State(NamedTuple):
    """Shaped as a train state is: nested dicts, named tuples, an empty one, a scalar, two dtypes, no elements."""

    step: Any
    params: Any
    opt_state: Any


class Empty(NamedTuple):
    pass


def host_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((8, 16)).astype(np.float32)
    return State(
        step=np.int32(seed),
        params={"model": {"w": weight, "b": np.asarray(jnp.asarray(weight[0], jnp.bfloat16))}},
        opt_state=(Empty(), {"mu": weight * 2, "nothing": np.zeros((0, 4), np.float32)}, [np.float32(seed) / 3]),
    )


def on_mesh(tree: Any, shape: tuple[int, int, int] | None) -> Any:
    """Put a tree on a mesh of the first devices; matrices are sharded over `fsdp` and `tensor`."""
    if shape is None:
        return jax.tree.map(jnp.asarray, tree)
    devices = np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))

    def put(leaf: np.ndarray) -> jax.Array:
        spec = jax.P("fsdp", "tensor") if leaf.ndim == 2 and leaf.size else jax.P()
        return jax.device_put(leaf, jax.NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, said: list[str]) -> Iterator[Checkpoints]:
    with Checkpoints(tmp_path / "out", save_total_limit=None, say=said.append) as made:
        yield made


def save(checkpoints: Checkpoints, *steps: int, protect: tuple[int, ...] = ()) -> None:
    for step in steps:
        state = on_mesh(host_state(step), None)
        checkpoints.save(step, state, {"pairs": step * 4}, {"global_step": step}, protect=protect)
    checkpoints.wait()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def data_file(directory: Path) -> Path:
    return max((p for p in (directory / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_lies_in_a_checkpoint(checkpoints: Checkpoints) -> None:
    meta = {"pairs": np.int64(12), "scores": {"10": np.float32(0.5)}, "list": np.arange(3)}
    trainer_state = {"global_step": 10, "best_metric": np.float32(0.25), "log_history": [{"loss": 0.5, "step": 10}]}
    checkpoints.save(10, on_mesh(host_state(), None), meta, trainer_state)
    checkpoints.wait()
    directory = checkpoints.path(10)
    assert directory == checkpoints.output_dir / "checkpoint-10"
    assert {"state", "meta", "trainer_state.json", "digest.json"} <= names(directory)
    assert json.loads((directory / "trainer_state.json").read_text()) == {
        "global_step": 10,
        "best_metric": 0.25,
        "log_history": [{"loss": 0.5, "step": 10}],
    }
    digest = json.loads((directory / "digest.json").read_text())
    files = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()} - {"digest.json"}
    assert set(digest["files"]) == files
    assert digest["arrays"]["params.model.b"] == ["bfloat16", [16]]
    assert checkpoints.read_meta(10) == {"pairs": 12, "scores": {"10": 0.5}, "list": [0, 1, 2]}
    assert checkpoints.read_trainer_state(10)["global_step"] == 10
    assert names(checkpoints.output_dir) == {"checkpoint-10"}


@pytest.mark.parametrize("saved_on", [None, (2, 2, 2)])
def test_restore_on_other_devices(checkpoints: Checkpoints, saved_on: tuple[int, int, int] | None) -> None:
    expected = host_state(3)
    checkpoints.save(3, on_mesh(expected, saved_on), {"seed": 3}, {})
    for shape in [None, *SHAPES]:
        wanted = abstract(on_mesh(host_state(7), shape))
        found, meta = checkpoints.restore(3, wanted)
        assert_same(found, expected)
        assert meta == {"seed": 3}
        for leaf, asked in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding == asked.sharding


def test_restore_takes_a_path_and_arrays_without_sharding(checkpoints: Checkpoints, tmp_path: Path) -> None:
    save(checkpoints, 5)
    moved = tmp_path / "kept for later"
    shutil.copytree(checkpoints.path(5), moved)
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), host_state())
    found, _ = checkpoints.restore(moved, bare)
    assert_same(found, host_state(5))


def test_a_state_may_be_donated_right_after_save(checkpoints: Checkpoints) -> None:
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"w": jnp.arange(1 << 20, dtype=jnp.float32)}
    checkpoints.save(1, state, {}, {})
    changed = jax.block_until_ready(overwrite(state))
    assert float(changed["w"][5]) == -1
    found, _ = checkpoints.restore(1, changed)
    np.testing.assert_array_equal(np.asarray(found["w"]), np.arange(1 << 20, dtype=np.float32))


def test_plain_data_is_asked_for_at_the_call(checkpoints: Checkpoints) -> None:
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        checkpoints.save(1, on_mesh(host_state(), None), {"x": object()}, {})
    with pytest.raises(TypeError, match=r"opt_state\.0 is a str, not an array"):
        checkpoints.save(1, {"opt_state": ["text"]}, {}, {})
    assert checkpoints.steps() == []


# Damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (flip_bit, "is not what was written: its blake2b differs"),
        (truncate, "were written"),
        (os.remove, "is missing"),
    ],
)
def test_damage_is_found_and_named(checkpoints: Checkpoints, harm: Any, words: str) -> None:
    save(checkpoints, 5, 10)
    victim = data_file(checkpoints.path(10))
    harm(victim)
    with pytest.raises(UserError, match=words) as error:
        checkpoints.restore(10, on_mesh(host_state(), None))
    assert error.value.name == "checkpoint-damaged"
    assert str(victim.relative_to(checkpoints.path(10))) in error.value.message
    assert "checkpoint-5" in error.value.message
    step, skipped = checkpoints.latest_good()
    assert step == 5
    assert len(skipped) == 1
    assert words in skipped[0] and "checkpoint-10" in skipped[0]
    assert_same(checkpoints.restore(5, on_mesh(host_state(), None))[0], host_state(5))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip_bit, halve])
def test_a_damaged_digest_is_no_good_checkpoint(checkpoints: Checkpoints, harm: Any) -> None:
    save(checkpoints, 5, 10)
    harm(checkpoints.path(10) / "digest.json")
    assert "digest.json is not readable" in damage(checkpoints.path(10))
    assert checkpoints.latest_good().step == 5


def test_every_bit_of_the_digest_counts(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    digest = checkpoints.path(1) / "digest.json"
    content = json.loads(digest.read_text())
    content["arrays"]["params.model.w"][0] = "float16"
    digest.write_text(json.dumps(content))
    assert "digest.json is not readable" in damage(checkpoints.path(1))


def test_each_process_checks_its_share_and_all_shares_are_everything(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    files = [path for path in checkpoints.path(1).rglob("*") if path.is_file() and path.name != "digest.json"]
    for path in files:
        flip_bit(path)
        found = [damage(checkpoints.path(1), part=part, parts=3) for part in range(3)]
        assert sum(str(path.relative_to(checkpoints.path(1))) in text for text in found) == 1
        flip_bit(path)
    assert not any(damage(checkpoints.path(1), part=part, parts=3) for part in range(3))


def test_a_check_holds_for_one_restore_and_not_for_what_is_saved_after_it(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    for again in (False, True):
        assert checkpoints.latest_good().step == 1
        if again:
            save(checkpoints, 1)
        else:
            checkpoints.restore(1, on_mesh(host_state(), None))
        flip_bit(data_file(checkpoints.path(1)))
        with pytest.raises(UserError, match="blake2b differs"):
            checkpoints.restore(1, on_mesh(host_state(), None))
        save(checkpoints, 1)


def test_nothing_to_go_on_from(checkpoints: Checkpoints) -> None:
    assert checkpoints.steps() == []
    assert checkpoints.latest_good() == (None, [])
    with pytest.raises(UserError, match="no such directory") as error:
        checkpoints.restore(5, {})
    assert error.value.name == "checkpoint-missing"


# What does not fit


def test_arrays_of_another_run_are_refused(checkpoints: Checkpoints) -> None:
    state = {"w": jnp.ones((4, 2)), "b": jnp.ones(3)}
    checkpoints.save(1, state, {}, {})
    struct = jax.ShapeDtypeStruct
    w, b = struct((4, 2), jnp.float32), struct((3,), jnp.float32)
    cases = [
        (
            {"w": struct((4, 2), jnp.bfloat16), "b": b},
            r"w is float32\[4, 2\] in the checkpoint and bfloat16\[4, 2\] in",
        ),
        ({"w": struct((2, 4), jnp.float32), "b": b}, r"w is float32\[4, 2\] in the checkpoint and float32\[2, 4\] in"),
        ({"w": w, "b": b, "lora_a": b}, r"lora_a \(float32\[3\] in this run\) is not in the checkpoint"),
        ({"w": w}, "b is in the checkpoint and not in this run"),
    ]
    for wanted, words in cases:
        with pytest.raises(UserError, match=words) as error:
            checkpoints.restore(1, wanted)
        assert error.value.name == "checkpoint-does-not-fit"


# What else lies in the directory


def test_incomplete_ones_are_not_listed_and_set_aside(checkpoints: Checkpoints, said: list[str]) -> None:
    save(checkpoints, 5)
    foreign = checkpoints.path(10)
    for number in ("", "-2"):
        foreign.mkdir()
        (foreign / "model.safetensors").write_text(f"someone's{number}")
        assert 10 not in checkpoints.steps()
        save(checkpoints, 10)
        assert checkpoints.steps() == [5, 10]
        aside = checkpoints.output_dir / f"incomplete-checkpoint-10{number}"
        assert (aside / "model.safetensors").read_text() == f"someone's{number}"
        assert str(aside) in said[-1]
        shutil.rmtree(foreign)
    assert_same(checkpoints.restore(5, on_mesh(host_state(), None))[0], host_state(5))


def test_a_complete_one_of_the_same_step_is_replaced(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)
    flip_bit(data_file(checkpoints.path(5)))
    checkpoints.save(5, on_mesh(host_state(6), None), {"again": True}, {})
    found, meta = checkpoints.restore(5, on_mesh(host_state(), None))
    assert_same(found, host_state(6))
    assert meta == {"again": True}
    assert names(checkpoints.output_dir) == {"checkpoint-5"}


def test_other_names_are_left_alone(checkpoints: Checkpoints) -> None:
    checkpoints.output_dir.mkdir()
    for name in ("best", "final", "checkpoint-last", "checkpoint-5-mine", ".checkpoint-notes", ".checkpoint-5.saving2"):
        (checkpoints.output_dir / name).mkdir()
    (checkpoints.output_dir / "checkpoint-7").write_text("a file")
    before = names(checkpoints.output_dir)
    save(checkpoints, 5)
    checkpoints.delete_after(0)
    assert checkpoints.steps() == []
    assert names(checkpoints.output_dir) == before


def test_a_directory_that_only_looks_like_a_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "digest.json").write_text('{"format": "of something else"}')
    with Checkpoints(tmp_path, save_total_limit=1) as checkpoints:
        save(checkpoints, 1, 5)
        checkpoints.delete_after(0)
        assert names(tmp_path) == {"checkpoint-3"}
        assert checkpoints.latest_good().step is None


def test_litter_of_a_killed_save_is_no_obstacle(checkpoints: Checkpoints) -> None:
    out = checkpoints.output_dir
    for name in ("10.saving", "10.saving.orbax-checkpoint-tmp", "15.saving.orbax-checkpoint-tmp", "5.deleted"):
        (out / f".checkpoint-{name}" / "state").mkdir(parents=True)
    save(checkpoints, 10)
    assert names(out) == {"checkpoint-10"}


def test_a_save_killed_before_its_last_rename_is_finished(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, save_total_limit=None) as first:
        save(first, 5, 10)
    os.rename(tmp_path / "checkpoint-10", tmp_path / ".checkpoint-10.saving")
    with Checkpoints(tmp_path, save_total_limit=None) as second:
        assert second.latest_good().step == 10
        assert_same(second.restore(10, on_mesh(host_state(), None))[0], host_state(10))


KILLED = """
import os, pathlib, signal, sys, threading, time
import jax.numpy as jnp
from jax_dpo.train.checkpoint import Checkpoints
out = pathlib.Path(sys.argv[1])
checkpoints = Checkpoints(out, save_total_limit=None)
checkpoints.save(1, {"w": jnp.arange(1 << 10, dtype=jnp.float32)}, {"pairs": 4}, {"global_step": 1})
checkpoints.wait()
def kill():
    while not any(path.is_file() and path.stat().st_size > 1 << 16 for path in out.glob(".checkpoint-2*/**/d/*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
checkpoints.save(2, {"w": jnp.sin(jnp.arange(1 << 25, dtype=jnp.float32))}, {}, {})
time.sleep(60)
"""


def test_kill_in_the_middle_of_a_save(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert any(name.startswith(".checkpoint-2.saving") for name in names(tmp_path)), "killed too late to show anything"
    with Checkpoints(tmp_path, save_total_limit=None) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.latest_good() == (1, [])
        state = {"w": jax.ShapeDtypeStruct((1 << 10,), jnp.float32)}
        found, meta = checkpoints.restore(1, state)
        np.testing.assert_array_equal(np.asarray(found["w"]), np.arange(1 << 10, dtype=np.float32))
        assert meta == {"pairs": 4}
        checkpoints.save(2, found, {}, {})
        checkpoints.wait()
        assert names(tmp_path) == {"checkpoint-1", "checkpoint-2"}


# Rotation and rollback


@pytest.mark.parametrize(
    ("limit", "protect", "kept"),
    [
        (None, (), [1, 2, 3, 4, 5]),
        (0, (), [1, 2, 3, 4, 5]),
        (1, (), [5]),
        (2, (), [4, 5]),
        (2, (2,), [2, 4, 5]),
        (1, (1, 3), [1, 3, 5]),
        (2, (5,), [4, 5]),
        (9, (), [1, 2, 3, 4, 5]),
    ],
)
def test_rotation(tmp_path: Path, limit: int | None, protect: tuple[int, ...], kept: list[int]) -> None:
    with Checkpoints(tmp_path, save_total_limit=limit) as checkpoints:
        save(checkpoints, 1, 2, 3, 4, 5, protect=protect)
        assert checkpoints.steps() == kept
    assert names(tmp_path) == {f"checkpoint-{step}" for step in kept}


def test_nothing_is_rotated_away_for_a_save_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoints(tmp_path, save_total_limit=1) as checkpoints:
        save(checkpoints, 1)
        monkeypatch.setattr(module, "write_digest", fails_with(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UserError):
            save(checkpoints, 2)
        assert checkpoints.steps() == [1]
        monkeypatch.undo()
        save(checkpoints, 3)
        assert checkpoints.steps() == [3]


def test_rollback_deletes_later_steps_and_saves_anew(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5, 10, 15, 20)
    assert checkpoints.delete_after(10) == [15, 20]
    assert checkpoints.steps() == [5, 10]
    assert names(checkpoints.output_dir) == {"checkpoint-5", "checkpoint-10"}
    save(checkpoints, 15)
    assert checkpoints.latest_good().step == 15
    assert checkpoints.delete_after(0) == [5, 10, 15]
    assert checkpoints.latest_good().step is None


# A disk that refuses


def fails_with(error: Exception) -> Any:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


def test_space_is_checked_before_a_save(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_000, 1_000))
    with pytest.raises(UserError, match=r"the checkpoint needs 4\.0 kB, 1\.0 kB are free") as error:
        checkpoints.save(1, {"w": jnp.ones(1000)}, {}, {})
    assert error.value.name == "no-space-left"
    assert str(checkpoints.path(1)) in error.value.message
    assert names(checkpoints.output_dir) == set()


@pytest.mark.parametrize(
    ("code", "name"),
    [(errno.ENOSPC, "no-space-left"), (errno.EDQUOT, "no-space-left"), (errno.EACCES, "no-permission")],
)
def test_a_failed_background_save_is_raised_once(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, code: int, name: str
) -> None:
    monkeypatch.setattr(module, "write_digest", fails_with(OSError(code, os.strerror(code))))
    checkpoints.save(1, on_mesh(host_state(), None), {}, {})
    with pytest.raises(UserError, match=os.strerror(code)) as error:
        checkpoints.wait()
    assert error.value.name == name
    assert str(checkpoints.path(1)) in error.value.message
    assert names(checkpoints.output_dir) == set()
    checkpoints.wait()
    monkeypatch.undo()
    save(checkpoints, 1)
    assert checkpoints.steps() == [1]


def test_a_bug_in_the_background_is_no_users_mistake(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_json", fails_with(KeyError("slip")))
    checkpoints.save(1, on_mesh(host_state(), None), {}, {})
    with pytest.raises(RuntimeError, match=r"checkpoint-1 could not be saved: KeyError: 'slip'") as error:
        checkpoints.save(2, on_mesh(host_state(), None), {}, {})
    assert isinstance(error.value.__cause__, KeyError)


def test_the_error_that_ends_a_run_is_the_one_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "write_digest", fails_with(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, save_total_limit=None, say=said.append) as checkpoints:
        checkpoints.save(1, on_mesh(host_state(), None), {}, {})
        raise ZeroDivisionError
    assert len(said) == 1 and "no space left" in said[0]


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Checkpoints(tmp_path / "file" / "out", save_total_limit=None) as checkpoints:
        assert checkpoints.steps() == []
        with pytest.raises(UserError, match="is a file, not a directory") as error:
            checkpoints.save(1, on_mesh(host_state(), None), {}, {})
    assert error.value.name == "output-dir-unusable"


def test_a_directory_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    if os.geteuid() == 0:  # whom no mode holds back
        monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    checkpoints = Checkpoints(tmp_path / "out", save_total_limit=None)
    with pytest.raises(UserError, match="no permission to write") as error:
        checkpoints.save(1, on_mesh(host_state(), None), {}, {})
    assert error.value.name == "no-permission"


def test_refusals_in_words() -> None:
    """Storage libraries wrap the system's error in one of their own: by words or by cause."""
    path = Path("out/checkpoint-1")
    wrapped = ValueError("RESOURCE_EXHAUSTED: Error writing d/1 [OS error 28: ENOSPC No space left on device]")
    assert disk_error(wrapped, path, "write").name == "no-space-left"
    denied = RuntimeError("commit failed")
    denied.__cause__ = PermissionError(errno.EACCES, "Permission denied", "x")
    assert disk_error(denied, path, "write").name == "no-permission"
    assert "no permission to read" in disk_error(denied, path, "read").message
    assert disk_error(OSError(errno.EROFS, os.strerror(errno.EROFS)), path, "write").name == "no-permission"
    assert disk_error(ValueError("shape mismatch"), path, "write") is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB, where one may be mounted."""
    mount = shutil.which("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [str(mount), "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_during_a_save(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)  # does not compress
    with Checkpoints(small_disk / "out", save_total_limit=None) as checkpoints:
        save(checkpoints, 1)
        with pytest.raises(UserError, match=r"needs 4\.2 MB"):
            checkpoints.save(2, {"w": jnp.asarray(noise)}, {}, {})
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
        checkpoints.save(2, {"w": jnp.asarray(noise)}, {}, {})
        with pytest.raises(UserError) as error:
            checkpoints.wait()
        assert error.value.name == "no-space-left"
        assert names(checkpoints.output_dir) == {"checkpoint-1"}
        save(checkpoints, 2)
        assert checkpoints.steps() == [1, 2]
    assert capfd.readouterr().err == ""


# Two processes


TWO = """
import os, sys
import jax
rank, out, phase = int(sys.argv[1]), sys.argv[2], sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", 2, rank, heartbeat_timeout_seconds=10)
import numpy as np
from jax_dpo.errors import UserError
from jax_dpo.train import checkpoint as module
mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("fsdp",))
sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
def make(scale):
    full = np.arange(64, dtype=np.float32) * scale
    return {"w": jax.make_array_from_callback((64,), sharding, lambda index: full[index])}
abstract = {"w": jax.ShapeDtypeStruct((64,), np.float32, sharding=sharding)}
with module.Checkpoints(out, save_total_limit=2, primary=rank == 0) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, make(step), {"step": step}, {"global_step": step}, protect={1})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3], checkpoints.steps()
    assert checkpoints.delete_after(2) == [3]
    assert checkpoints.latest_good() == (2, [])
    state, meta = checkpoints.restore(2, abstract)
    for shard in state["w"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), (np.arange(64, dtype=np.float32) * 2)[shard.index])
    assert meta == {"step": 2}
    # What only one process finds is raised on both.
    if rank == 0:
        path = max((p for p in checkpoints.path(2).rglob("d/*")), key=lambda p: p.stat().st_size)
        path.write_bytes(path.read_bytes()[:-1])
        real, module.write_digest = module.write_digest, None
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    step, skipped = checkpoints.latest_good()
    assert step == 1 and "were written" in skipped[0], (step, skipped)
    checkpoints.save(4, make(4), {}, {})
    try:
        checkpoints.wait()
        raise SystemExit("the failed save went unseen")
    except RuntimeError as error:
        assert "checkpoint-4 could not be saved: TypeError" in str(error), error
    if rank == 0:
        module.write_digest = real
    checkpoints.save(4, make(4), {}, {})
print("fine", flush=True)
"""


@pytest.mark.slow
def test_two_processes_share_one_checkpoint(tmp_path: Path) -> None:
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    with held_port() as port:
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", TWO, str(rank), str(tmp_path / "out"), str(port), ""],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
            )
            for rank in range(2)
        ]
        try:
            for run in runs:
                output, _ = run.communicate(timeout=100)
                assert run.returncode == 0 and "fine" in output, output
        finally:
            for run in runs:
                run.kill()
    # One process of eight devices reads what two of four wrote.
    with Checkpoints(tmp_path / "out", save_total_limit=None) as checkpoints:
        found, _ = checkpoints.restore(4, {"w": jax.ShapeDtypeStruct((64,), jnp.float32)})
        np.testing.assert_array_equal(np.asarray(found["w"]), np.arange(64, dtype=np.float32) * 4)
