"""`train_sampling_strategy: curriculum`: the gap of every training pair, where it comes from, and how a resumed run finds it again.

Gaps that must be computed are kept in the run's directory, so that the order of the pairs does not change where a run goes on with
another cache or on another device, whose last digits differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jax_dpo.config import DPOConfig
from jax_dpo.data.order import Curriculum
from jax_dpo.data.pairs import SCORE_COLUMNS
from jax_dpo.data.ref_logps import RefLogps
from jax_dpo.errors import UserError, named
from jax_dpo.report.records import Record
from jax_dpo.sharding.multihost import array_from_primary, from_primary, is_primary
from jax_dpo.trainer.datasets import PairSet
from jax_dpo.trainer.precompute import Precomputed
from jax_dpo.trainer.run import Run
from jax_dpo.trainer.start import Start

FOLDER = "curriculum"  # in the run's directory
LISTED = 100  # buckets that the start record names one by one
# Raise it with every change of what the gaps mean.
_FORMAT = 1


def is_curriculum(config: DPOConfig) -> bool:
    return config.train_sampling_strategy == "curriculum"


def must_compute(config: DPOConfig) -> bool:
    """Whether the gaps do not lie in the data."""
    return is_curriculum(config) and config.curriculum_by != "score"


def refuse_stream(config: DPOConfig) -> None:
    """Raises UserError where a curriculum is asked for and the pairs are a stream."""
    if is_curriculum(config):
        raise UserError(
            "curriculum-stream",
            "train_sampling_strategy curriculum orders the pairs by their gap, for which all of them must be known before the first step, "
            "but the training data are a stream (an IterableDataset, or dataset_streaming). Give the data as a file or a data set with a "
            "length, or write train_sampling_strategy: sequential.",
        )


def make_curriculum(config: DPOConfig, gaps: np.ndarray) -> Curriculum:
    gaps = np.array(gaps, np.float32)
    gaps.flags.writeable = False
    return Curriculum(gaps, config.curriculum_buckets, config.curriculum_later_epochs)


def known_curriculum(config: DPOConfig, data: PairSet) -> Curriculum | None:
    """The curriculum whose gaps lie in the data; None where there is none, or its gaps must be computed.

    Raises:
      UserError: a pair has no two scores; names the columns and the rows.
    """
    if not is_curriculum(config) or must_compute(config):
        return None
    gaps = data.pairs.gap
    without = np.flatnonzero(~np.isfinite(gaps))
    if len(without):
        columns = "; ".join(f"{a} and {b}" for a, b in SCORE_COLUMNS)
        count = f"none of the {len(gaps)}" if len(without) == len(gaps) else f"{len(without)} of the {len(gaps)}"
        which = f"pairs has them: {data.data.row_names(without[:16].tolist())}"
        if len(without) < len(gaps):
            which = f"pairs have none: {data.data.row_names(without[:16].tolist())}"
        raise UserError(
            "curriculum-scores-missing",
            f"curriculum_by is score, which needs two numbers in each row ({columns}); {count} {which}. Put scores into the rows or leave "
            "the rows out, or take the gap from elsewhere (curriculum_by).",
        )
    return make_curriculum(config, gaps)


def arrange(run: Run, compute: Callable[[], Precomputed], start: Start | None) -> None:
    """Gives the engine a curriculum whose gaps are computed, or found where this run left them. All processes of a run call it.

    Args:
      compute: what chosen and rejected are worth; called where that is not known.
      start: where the training begins; None outside of a training, whose directory is not touched.

    Raises:
      UserError: what `compute` raises; gaps that are not finite; what `Engine.check` raises.
    """
    data, engine = run.train_set, run.engine
    assert data is not None
    key, n, out = _key(run, data), len(data), Path(run.args.output_dir)
    gaps = None if engine.curriculum is None else engine.curriculum.gaps
    if start is not None and start.step is not None:
        earlier = (out if start.path is None else start.path.parent) / FOLDER
        kept = _kept(RefLogps(earlier, key, n))
        if kept is None:
            run.notes.append(
                named(
                    "curriculum-gaps-anew",
                    f"{earlier} does not hold the gaps of this curriculum: they were made anew, and pairs of nearly equal gaps may stand "
                    "in another order than before.",
                )
            )
        gaps = gaps if kept is None else kept
    if gaps is None:
        made = compute()
        run.notes += made.notes
        gaps = (made.values[:, 0].astype(np.float64) - made.values[:, 1]).astype(np.float32)
        _check_finite(gaps, data)
    if start is not None and is_primary():
        problem = RefLogps(out / FOLDER, key, n).write(0, np.stack([gaps, np.zeros_like(gaps)], 1))
        if problem is not None:
            run.notes.append(
                named(
                    "curriculum-gaps-unkept", f"The gaps of the curriculum are not kept for a resumption ({problem})."
                )
            )
    engine.follow(make_curriculum(run.args, gaps))


def _kept(store: RefLogps) -> np.ndarray | None:
    """The gaps [N] that a run left in its directory, on every process."""
    values, whole = np.zeros((store.pairs, 2), np.float32), 0
    if is_primary():
        values, known = store.read()
        whole = int(known.all())
    return array_from_primary(values)[:, 0] if from_primary(whole) else None


def _key(run: Run, data: PairSet) -> str:
    """What the gaps of a run are kept under: where they come from, and the pairs."""
    by = run.args.curriculum_by
    whose = run.reward_model.name if run.reward_model is not None else run.pairing.reference.title
    parts = [_FORMAT, by, whose, data.pairs.content_hash()]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


def _check_finite(gaps: np.ndarray, data: PairSet) -> None:
    wrong = np.flatnonzero(~np.isfinite(gaps))
    if len(wrong):
        raise UserError(
            "curriculum-not-finite",
            f"The gaps of {len(wrong)} of {len(gaps)} pairs are not finite: {data.data.row_names(wrong[:16].tolist())}. Nothing was "
            "trained. Look at what gives them (curriculum_by).",
        )


def _source(run: Run) -> str:
    """Where the gaps come from, in words."""
    if run.reward_model is not None:
        return run.reward_model.name
    return {"score": "the scores of the data", "reference": "the reference's own log-ratio"}[run.args.curriculum_by]


def curriculum_record(run: Run) -> Record | None:
    """The curriculum as the start record has it; None where the order is another."""
    found, config = run.engine.curriculum, run.args
    if found is None:
        return None
    ranges = found.ranges()
    listed: list[dict[str, Any]] = [{"pairs": n, "widest": a, "narrowest": b} for n, a, b in ranges[:LISTED]]
    return {
        "by": config.curriculum_by,
        "source": _source(run),
        "later_epochs": found.later,
        "buckets": len(ranges),
        "widest": ranges[0][1],
        "narrowest": ranges[-1][2],
        "ranges": listed,
    }
