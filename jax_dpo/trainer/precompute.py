"""`precompute_ref_log_probs`: the reference's log-probabilities of the training pairs, made once before training and kept for later runs.

What they are kept under is everything that decides them: the reference's weights and shape, the token ids as they are trained on, LD-DPO's
weights, and how the device computes. Learning rate, beta, loss and batch sizes are not part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_dpo.config.places import reference_cache
from jax_dpo.data.batch import Batch
from jax_dpo.data.loader import Feed, evaluation_batches
from jax_dpo.data.pairs import REF_COLUMNS
from jax_dpo.data.ref_logps import RefLogps
from jax_dpo.errors import Stopped, UserError, named
from jax_dpo.report.terminal import Display
from jax_dpo.sharding.multihost import array_from_primary, is_primary
from jax_dpo.sharding.place import batch_to_devices
from jax_dpo.train.agree import raise_together
from jax_dpo.train.step import make_reference_pass
from jax_dpo.train.trust_region import spread_over
from jax_dpo.trainer.datasets import PairSet, Some
from jax_dpo.trainer.engine import Engine
from jax_dpo.trainer.models import Pairing, reference_frozen

# Raise it with every change of what the numbers mean.
_FORMAT = 1
# Columns of the data: how many pairs are computed, and how far a number may be off. Another kernel and bfloat16 leave some tenths of a
# percent of a sum; another model is off by much more.
CHECKED_PAIRS, CHECK_ABSOLUTE, CHECK_RELATIVE = 16, 0.1, 0.02
# Pairs that are computed between two writes: at least so many, and so that a data set has at most so many files.
LEAST_PAIRS, MOST_FILES = 256, 256


class Precomputed(NamedTuple):
    """A number for chosen and one for rejected of every pair [N, 2] (the reference's log-probabilities, or rewards), how many pairs an
    earlier run had made, and what the user should know."""

    values: np.ndarray
    found: int
    notes: list[str]


def weights_digest(leaves: Mapping[str, Any]) -> str:
    """A hash of parameters by their content: names, shapes, types, bytes. Layers are read one at a time, several at once."""

    def of(path: str) -> bytes:
        leaf = leaves[path]
        found = hashlib.blake2b(f"{path} {leaf.dtype} {tuple(leaf.shape)}".encode(), digest_size=32)
        parts = [(i,) for i in range(leaf.shape[0])] if path.startswith("model.layers.") else [()]
        for index in parts:
            found.update(np.ascontiguousarray(leaf.read(index)).reshape(-1).view(np.uint8).data)
        return found.digest()

    with ThreadPoolExecutor(8) as pool:
        return hashlib.blake2b(b"".join(pool.map(of, sorted(leaves))), digest_size=20).hexdigest()


def entry_key(pairing: Pairing, engine: Engine, data: PairSet) -> str:
    """What the log-probabilities of this reference for these pairs are kept under."""
    reference = pairing.reference
    parts = {
        "format": _FORMAT,
        "weights": weights_digest(reference.leaves),
        "shape": repr(reference.config),
        "pairs": data.pairs.content_hash(),
        "ld_alpha": engine.config.ld_alpha,
        "dtype": engine.dtype,
        "device": jax.default_backend(),
        "precision": str(jax.config.jax_default_matmul_precision),  # type: ignore[attr-defined]
    }
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


def _missing(known: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of pairs that are not known, of at most `most` each, in order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], ~known, [False]]).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2).tolist():
        for at in range(start, stop, most):
            yield at, min(at + most, stop)


def precompute(engine: Engine, data: PairSet, *, display: Display, asked: Callable[[], bool]) -> Precomputed:
    """The reference's log-probabilities of every pair: from the cache, and the rest computed. All processes of a run call it.

    The reference is on the devices only while it is computed with, alone.

    Args:
      asked: whether the run was asked to stop; looked at after every range that is written.

    Raises:
      Stopped: it was asked to; what is done is kept.
      UserError: the reference gives log-probabilities that are not finite; names the rows.
    """
    c = engine.config
    batch = c.precompute_ref_batch_size or c.per_device_train_batch_size

    def begin() -> tuple[Feed, Callable[[Batch], tuple[Any, Any]]]:
        display.busy("loading the reference")
        frozen = reference_frozen(engine.pairing, engine.mesh, engine.dtype)
        feed = replace(engine.feed_of(data, None if c.precompute_ref_batch_size is None else batch), router=False)
        run = make_reference_pass(engine.facts, engine.mesh)
        return feed, lambda made: run(frozen, made)

    if c.ref_log_probs_columns:
        return Precomputed(_of_columns(engine, data, begin), len(data), [])
    made = two_sides(
        engine,
        data,
        Kept(reference_cache(c.dataset_cache_dir), lambda: entry_key(engine.pairing, engine, data)),
        begin,
        batch=batch,
        what="the reference's log-probabilities",
        display=display,
        asked=asked,
    )
    _check_finite(made.values, data)
    return made


def _of_columns(
    engine: Engine, data: PairSet, begin: Callable[[], tuple[Feed, Callable[[Batch], tuple[Any, Any]]]]
) -> np.ndarray:
    """What the data say of each pair, [N, 2], after those of some pairs, short and long ones, were computed.

    Raises:
      UserError: they are other numbers; names the first row.
    """
    sides = [data.pairs.given(column) for column in REF_COLUMNS]
    told = np.stack([x for x in sides if x is not None], axis=1)
    some = spread_over(data.trl_tokens, CHECKED_PAIRS)
    computed = _range(engine, Some(data, some), *begin())
    off = np.abs(told[some] - computed) > CHECK_ABSOLUTE + CHECK_RELATIVE * np.abs(computed)
    if off.any():
        i = int(np.flatnonzero(off.any(1))[0])
        pair = lambda x: " and ".join(f"{float(v):.6g}" for v in x)  # noqa: E731
        raise UserError(
            "ref-columns-other",
            f"{data.data.row_names([int(some[i])])}: {' and '.join(REF_COLUMNS)} are {pair(told[some[i]])}, and the reference of this run "
            f"gives {pair(computed[i])} ({int(off.any(1).sum())} of {len(some)} pairs that were looked at differ). They are those of "
            "another model, other tokens or another max_length. Set ref_log_probs_columns to false to have them computed.",
        )
    return told


class Kept(NamedTuple):
    """Where two numbers of every pair are kept for later runs: a directory, and how the key of their entry is made."""

    directory: Path
    key: Callable[[], str]


def two_sides(
    engine: Engine,
    data: PairSet,
    kept: Kept,
    begin: Callable[[], tuple[Feed, Callable[[Batch], tuple[Any, Any]]]],
    *,
    batch: int,
    what: str,
    display: Display,
    asked: Callable[[], bool],
) -> Precomputed:
    """A number for chosen and one for rejected of every pair [N, 2]: from the cache, and the rest computed. All processes call it.

    Args:
      begin: puts the model onto the devices; gives the shape of its batches, and the pass over one: pairs [R, S] and numbers [R, S, 2].
      batch: pairs of a batch on one device.
      what: the numbers in words.
      asked: whether the run was asked to stop; looked at after every range that is written.

    Raises:
      Stopped: it was asked to; what is done is kept.
    """
    n, notes = len(data), []
    display.busy(f"looking for {what}")
    store, error = None, None
    values, known = np.zeros((n, 2), np.float32), np.zeros(n, bool)
    if is_primary():  # one process reads and writes, so that all go on with the same numbers wherever their caches are
        try:
            store = RefLogps(kept.directory, kept.key(), n)
            values, known = store.read()
            for file in store.damaged:
                notes.append(named("stored-numbers-damaged", f"Damaged numbers are computed anew: {what} ({file})."))
        except UserError as problem:
            error = problem
    raise_together(error)
    values, known = array_from_primary(values), array_from_primary(known)
    found, unkept = int(known.sum()), None
    if found < n:
        feed, run = begin()
        most = max(LEAST_PAIRS, 8 * batch * feed.row_shards, -(-n // MOST_FILES))
        values = np.array(values)
        for start, stop in list(_missing(known, most)):
            display.busy(f"{what} of pair {start + 1:,} of {n:,}")
            rows = _range(engine, Some(data, np.arange(start, stop)), feed, run)
            values[start:stop] = rows
            if store is not None and unkept is None:
                unkept = store.write(start, rows)
            if asked():
                raise Stopped(
                    f"stopped while {what} were computed, at {stop:,} of {n:,} pairs. Run the same command again to go on."
                )
    if unkept is not None:
        notes.append(
            named(
                "stored-numbers-unkept",
                f"{what[0].upper()}{what[1:]} are not kept for the next run, which will compute them again ({unkept}).",
            )
        )
    return Precomputed(values, found, notes)


def _range(engine: Engine, part: Some, feed: Feed, run: Callable[[Batch], tuple[Any, Any]]) -> np.ndarray:
    """The numbers [n, 2] of some pairs."""
    rows = np.zeros((len(part), 2), np.float32)
    for made in evaluation_batches(part, part.sizes, feed):
        index, numbers = (np.asarray(x) for x in run(batch_to_devices(made, engine.mesh, feed.rows, leading=0)))
        real = index >= 0  # -1 is an empty slot
        rows[index[real]] = numbers[real]
    return rows


def _check_finite(values: np.ndarray, data: PairSet) -> None:
    wrong = np.flatnonzero(~np.isfinite(values).all(1))
    if len(wrong):
        rows = ", ".join(str(int(data.pairs.table.number[data.pairs.kept[i]])) for i in wrong[:16])
        raise UserError(
            "reference-not-finite",
            f"The reference gives log-probabilities that are not finite for {len(wrong)} of {len(values)} pairs, in rows {rows}. Nothing "
            "was trained. Look at the weights of the reference, and try bf16 false.",
        )
