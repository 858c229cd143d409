"""`make demo`: fetch, convert, make pairs, train, judge. The steps are ordinary commands; the inputs are the demo's.

Everything lies in `demo/`. What is finished there is kept (downloads, the converted model, the pairs), what was
interrupted is begun again, and training starts over each time. Options after the name go to `jax-dpo train`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jax_dpo import errors
from scripts.demo import fetch, judge, pairs

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/demo.yaml"
MARKER = "conversion.json"
QUESTION = "Write one sentence from a film review. Talk about the music."
INTERRUPTED = 130  # what shells report for Ctrl-C
OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the demo in `root`/demo and returns the exit code: 0 once the model is trained, whatever the gates say."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__, allow_abbrev=False)
    _, options = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    os.chdir(root)  # the paths of the configuration start here
    try:
        with only_one(root / "demo"):
            return demo(root / "demo", options)
    except errors.UserError as problem:
        print(f"make demo: {problem}", file=sys.stderr)
        return errors.USER_INPUT
    except errors.Stopped as stop:
        print(f"make demo: {stop}; run it again to go on", file=sys.stderr)
        return errors.STOPPED
    except KeyboardInterrupt:
        print("make demo: interrupted; run it again to go on", file=sys.stderr)
        return INTERRUPTED
    except OSError as problem:
        if problem.errno not in OF_THE_MACHINE:
            raise
        print(f"make demo: {problem.strerror}: {problem.filename or root / 'demo'}", file=sys.stderr)
        return errors.USER_INPUT


def demo(folder: Path, options: Sequence[str]) -> int:
    """The five steps, in order, in `folder`. `options` go to `jax-dpo train`."""
    fetched = fetch.fetch(folder / "downloads")
    began = time.monotonic()
    if code := convert(fetched.gguf, folder / "model"):
        return code
    counts = pairs.write_pairs(fetched.ratings, folder / "data")
    print(
        f"pairs: {counts['train.jsonl']:,} to train and {counts['test.jsonl']} to evaluate, "
        f"from {counts['sentences']:,} rated sentences of film reviews"
    )
    run = output_dir(folder, options)
    if run.resolve() == (folder / "run").resolve():
        remove(folder / "run")  # the demo's own: it starts over; another folder is the user's
    code = jax_dpo(["train", CONFIG, *options])
    if code not in (errors.OK, errors.GATE_FAILED):
        return code
    if samples := judge.last_samples(run / "run.jsonl"):
        score = judge.load_judge(fetched.judge)
        print(
            f"\nThe samples, judged by word lists that never saw the training (an impression: {len(samples)} answers a side)\n"
            f"{judge.table(samples, score)}"
        )
    print(summary(folder, run, time.monotonic() - began, code))
    return errors.OK


def convert(gguf: Path, target: Path) -> int:
    """`jax-dpo convert` unless `target` holds the finished conversion of this very file. Returns its exit code."""
    wanted = {"source_sha256": fetch.GGUF.sha256, "dtype": "float32", "jax_dpo": version("jax-dpo")}
    if is_converted(target, wanted):
        return errors.OK
    scratch = target.with_name(target.name + ".partial")
    for stale in (scratch, target):
        remove(stale)
    if code := jax_dpo(["convert", str(gguf), str(scratch), "--dtype", "float32"]):
        remove(scratch)
        return code
    sizes = {path.name: path.stat().st_size for path in scratch.iterdir()}
    (scratch / MARKER).write_text(json.dumps(wanted | {"files": sizes}, indent=1), encoding="utf-8")
    os.replace(scratch, target)
    return errors.OK


def is_converted(target: Path, wanted: dict[str, str]) -> bool:
    """Whether `target` holds a conversion that was finished, with these properties, and all of its files in full."""
    try:
        marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
        complete = all((target / name).stat().st_size == size for name, size in marker.pop("files").items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return bool(complete and marker == wanted)


def output_dir(folder: Path, options: Sequence[str]) -> Path:
    """Where the run will lie: the demo's own folder, unless the options name another."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=folder / "run")
    return Path(parser.parse_known_args(list(options))[0].output_dir)


def jax_dpo(arguments: list[str]) -> int:
    """The command line in this process: one start of JAX less, and signals reach it directly."""
    from jax_dpo import cli

    print(f"\n$ jax-dpo {' '.join(arguments)}", flush=True)
    try:
        return cli.main(arguments)
    finally:
        signal.signal(signal.SIGTERM, _stop)  # training has a way of its own to stop


def summary(folder: Path, run: Path, seconds: float, code: int) -> str:
    """What the demo itself has to add to the report of the training: its inputs, what it took, how to go on."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    lines = [
        "",
        f"  {'stock model':<12} {_shown(folder / 'model')}",
        f"  {'pairs':<12} {_shown(folder / 'data')}",
        f"  {'took':<12} {seconds / 60:.1f} minutes after the downloads, {peak:.1f} GiB resident at most",
        f'  {"ask it":<12} jax-dpo generate --model {_shown(run / "final")} --prompt "{QUESTION}" --temperature 0.7',
        f"  {'report':<12} {_shown(run / 'report.html')}: open it in a browser",
    ]
    if code == errors.GATE_FAILED:
        lines.append("The model is trained, so this ends with 0; `jax-dpo train` by itself would end with 3.")
    verdict = json.loads((run / "verdict.json").read_text(encoding="utf-8"))
    return "\n".join([*lines, f"verdict: {verdict['headline']}"])


def _shown(path: Path) -> str:
    return os.path.relpath(path)


def remove(path: Path) -> None:
    """Removes what is at `path`, if anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the demo's folder: a second demo would clear away the first one's files. The lock dies with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.UserError(
                "demo-running", f"another demo runs in {folder}: wait for it, or stop it with Ctrl-C"
            ) from None
        yield


def _stop(number: int, frame: FrameType | None) -> None:
    raise errors.Stopped(f"stopped by {signal.Signals(number).name}")


if __name__ == "__main__":
    raise SystemExit(main())
