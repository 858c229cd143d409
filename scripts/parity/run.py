"""`make parity`: this trainer and TRL on the same made-up models and texts, case by case; writes docs/parity.md.

    .venv-parity/bin/python scripts/parity/run.py --only Losses --no-page

Each side runs in processes of its own. Needs the parity extra (torch, TRL, PEFT) and no network. Exit code 1: something is further
off than it may be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.parity.cases import Case, all_cases
from scripts.parity.page import page
from scripts.parity.results import Result, finished, line, result_of

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "outputs" / "parity"
PAGE = ROOT / "docs" / "parity.md"
SEED = 20260729
MARKER = ".comparison"
EXPORTS = "exports"
# Processes of each side, in the order in which they start. Most of this side's time is compiling.
PARTS = {"theirs": 1, "again": 1, "ours": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """Compares and writes the page, or does one part of the work. Returns the exit code."""
    options = _options(argv)
    if options.part:
        return work(options)
    began = time.monotonic()
    say = lambda result: print(line(result), flush=True)  # noqa: E731
    results = compare_all(options.folder, options.seed, options.only, jobs=options.jobs, say=say)
    bad = [result for result in results if not result.holds]
    print(f"{len(results) - len(bad)} cases hold, {len(bad)} do not; {time.monotonic() - began:.0f} s")
    if not options.no_page and not options.only:
        PAGE.write_text(page(results, options.seed), encoding="utf-8")
        print(f"written: {PAGE.relative_to(ROOT)}")
    return 1 if bad or not results else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], help="cases whose area or name contains this (may be repeated)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"what models and texts are made of ({SEED})")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="inputs and numbers of both sides (outputs/parity)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--no-page", action="store_true", help="leave docs/parity.md as it is")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def chosen(only: Sequence[str]) -> list[Case]:
    return [c for c in all_cases() if not only or any(o.lower() in f"{c.area} {c.name}".lower() for o in only)]


def compare_all(
    folder: Path,
    seed: int,
    only: Sequence[str] = (),
    jobs: int = 2,
    say: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Makes the inputs, runs both sides of every case in processes of their own, and compares.

    `folder` is emptied first, if it is one of a comparison. `say` hears of each case when both sides are done with it.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise SystemExit(f"{folder} holds something that is not a comparison; name another --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    common = ["--folder", str(folder), "--seed", str(seed), *(x for o in only for x in ("--only", o))]
    _process(folder, ["--part", "inputs", "0", *common])
    if any(case.do == "export" for case in chosen(only)):
        _process(folder, ["--part", "ours", EXPORTS, *common])  # first, since the other side opens what they leave
    tasks = [["--part", side, str(i), *common] for side in PARTS for i in range(PARTS[side])]
    waiting = {case.file: case for case in chosen(only)}
    results: dict[str, Result] = {}
    with ThreadPoolExecutor(jobs) as pool:
        parts = [pool.submit(_process, folder, task) for task in tasks]
        over = False
        while not over:
            over = all(part.done() for part in parts)
            for file in [f for f in waiting if finished(folder, f)]:
                results[file] = result_of(waiting.pop(file), folder)
                say(results[file])
            time.sleep(0 if over else 0.5)
        for part in parts:
            part.result()
    return [results[case.file] for case in chosen(only)]


def _process(folder: Path, arguments: list[str]) -> None:
    # Tests make several devices of a CPU by these; both sides have one here, or their batches would not be the same.
    several = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_ENABLE_X64")
    environment = {name: value for name, value in os.environ.items() if name not in several} | {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = folder / f"{arguments[1]}{arguments[2]}.log"
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, str(Path(__file__).resolve()), *arguments]
        ended = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        raise SystemExit(
            f"{log.read_text(encoding='utf-8')[-4000:]}\n{arguments[1]} ended with exit code {ended.returncode}"
        )


def of_part(cases: Sequence[Case], side: str, part: str) -> Sequence[Case]:
    """The cases that a process of a side does."""
    if part == EXPORTS:
        return [case for case in cases if case.do == "export"]
    rest = [case for case in cases if case.do != "export"] if side == "ours" else cases
    return rest[int(part) :: PARTS[side]]


def work(options: argparse.Namespace) -> int:
    """One part of the work, in this process. A case that fails leaves its reason where its numbers would be."""
    import numpy as np

    side, part = options.part
    folder = options.folder
    if side == "inputs":
        from scripts.parity.prepare import write_inputs

        write_inputs(folder / "inputs", options.seed)
        return 0
    from scripts.parity.common import Inputs

    do = import_module(f"scripts.parity.{side}").DO
    os.environ["HF_DATASETS_CACHE"] = str(folder / f"{side}{part}" / "datasets")
    os.environ["JAX_DPO_CACHE"] = str(folder / f"{side}{part}" / "cache")
    for case in of_part(chosen(options.only), side, part):
        scratch = folder / f"{side}{part}" / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        made = scratch / "made.npz"  # moved when it is whole, since someone is waiting for it
        try:
            np.savez(made, **do[case.do](case, Inputs(folder / "inputs"), scratch, options.seed))
            made.rename(folder / f"{case.file}.{side}.npz")
        except Exception:
            made.with_suffix(".txt").write_text(traceback.format_exc(), encoding="utf-8")
            made.with_suffix(".txt").rename(folder / f"{case.file}.{side}.txt")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
