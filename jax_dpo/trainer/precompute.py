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
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_dpo.config.places import reference_cache
from jax_dpo.data.loader import evaluation_batches
from jax_dpo.data.ref_logps import RefLogps
from jax_dpo.errors import Stopped, UserError
from jax_dpo.report.terminal import Display
from jax_dpo.sharding.multihost import array_from_primary, is_primary
from jax_dpo.sharding.place import batch_to_devices
from jax_dpo.train.agree import raise_together
from jax_dpo.train.step import make_reference_pass
from jax_dpo.trainer.datasets import PairSet, Some
from jax_dpo.trainer.engine import Engine
from jax_dpo.trainer.models import Pairing, reference_frozen

# Raise it with every change of what the numbers mean.
_FORMAT = 1
# Pairs that are computed between two writes: at least so many, and so that a data set has at most so many files.
LEAST_PAIRS, MOST_FILES = 256, 256


class Precomputed(NamedTuple):
    """The log-probabilities [N, 2] of chosen and rejected, how many pairs an earlier run had made, and what the user should know."""

    logps: np.ndarray
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
    n, notes = len(data), []
    display.busy("looking for the reference's log-probabilities")
    store, error = None, None
    values, known = np.zeros((n, 2), np.float32), np.zeros(n, bool)
    if is_primary():  # one process reads and writes, so that all go on with the same numbers wherever their caches are
        try:
            store = RefLogps(
                reference_cache(engine.config.dataset_cache_dir), entry_key(engine.pairing, engine, data), n
            )
            values, known = store.read()
            notes += [
                f"Damaged log-probabilities of the reference ({file}) are computed anew." for file in store.damaged
            ]
        except UserError as problem:
            error = problem
    raise_together(error)
    values, known = array_from_primary(values), array_from_primary(known)
    found = int(known.sum())
    if found < n:
        values, unkept = _compute(engine, data, values, known, store=store, display=display, asked=asked)
        if unkept is not None:
            notes.append(
                f"The reference's log-probabilities are not kept for the next run, which will compute them again ({unkept})."
            )
    _check_finite(values, data)
    return Precomputed(values, found, notes)


def _compute(
    engine: Engine,
    data: PairSet,
    values: np.ndarray,
    known: np.ndarray,
    *,
    store: RefLogps | None,
    display: Display,
    asked: Callable[[], bool],
) -> tuple[np.ndarray, str | None]:
    """Fills in what is not known, range by range. Returns the values, and why they could not be kept, if so."""
    c, n = engine.config, len(data)
    display.busy("loading the reference")
    frozen = reference_frozen(engine.pairing, engine.mesh, engine.dtype)
    batch = c.precompute_ref_batch_size or c.per_device_train_batch_size
    feed = engine.feed_of(data, None if c.precompute_ref_batch_size is None else batch)
    run = make_reference_pass(engine.facts, engine.mesh)
    most = max(LEAST_PAIRS, 8 * batch * feed.row_shards, -(-n // MOST_FILES))
    values, problem = np.array(values), None
    for start, stop in list(_missing(known, most)):
        display.busy(f"the reference's log-probabilities of pair {start + 1:,} of {n:,}")
        part = Some(data, np.arange(start, stop))
        rows = np.zeros((stop - start, 2), np.float32)
        for made in evaluation_batches(part, part.sizes, replace(feed, router=False)):
            index, sums = run(frozen, batch_to_devices(made, engine.mesh, feed.rows, leading=0))
            _put(rows, np.asarray(index), np.asarray(sums))
        values[start:stop] = rows
        if store is not None and problem is None:
            problem = store.write(start, rows)
        if asked():
            raise Stopped(
                f"stopped while the reference's log-probabilities were computed, at {stop:,} of {n:,} pairs. Run the same command again "
                "to go on."
            )
    return values, problem


def _put(rows: np.ndarray, index: np.ndarray, sums: np.ndarray) -> None:
    """Puts sums [R, S, 2] where their pairs [R, S] belong; -1 is an empty slot."""
    real = index >= 0
    rows[index[real]] = sums[real]


def _check_finite(values: np.ndarray, data: PairSet) -> None:
    wrong = np.flatnonzero(~np.isfinite(values).all(1))
    if len(wrong):
        rows = ", ".join(str(int(data.pairs.table.number[data.pairs.kept[i]])) for i in wrong[:16])
        raise UserError(
            "reference-not-finite",
            f"The reference gives log-probabilities that are not finite for {len(wrong)} of {len(values)} pairs, in rows {rows}. Nothing "
            "was trained. Look at the weights of the reference, and try bf16 false.",
        )
