"""What a reward model gives the answers of the training pairs: a classifier on disk, run here, or a function of the user's.

The classifier reads each answer with its prompt by its own tokenizer and chat template, prompts shared as in training. Its numbers are kept
for later runs under everything that decides them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_dpo.config import DPOConfig
from jax_dpo.config.places import reward_cache, token_cache
from jax_dpo.data.batch import Batch
from jax_dpo.data.check import name_rows
from jax_dpo.data.formats import TRL, Reading, read_as
from jax_dpo.data.load import Loaded, Rows, digest
from jax_dpo.data.loader import Feed
from jax_dpo.data.pairs import Pair, layout_of, read_pair
from jax_dpo.data.prepare import DataOptions, prepare
from jax_dpo.errors import UserError, named
from jax_dpo.ops.attention.api import choose
from jax_dpo.policy import Policy
from jax_dpo.report.terminal import Display
from jax_dpo.sharding.mesh import replicated
from jax_dpo.sharding.multihost import array_from_primary, is_primary
from jax_dpo.sharding.rules import check_heads
from jax_dpo.train.agree import raise_together
from jax_dpo.train.reward import make_reward_pass
from jax_dpo.trainer.datasets import PairSet, Tokenizer, data_options
from jax_dpo.trainer.engine import Engine
from jax_dpo.trainer.models import place
from jax_dpo.trainer.precompute import Kept, Precomputed, two_sides, weights_digest
from jax_dpo.weights.classifier import Classifier, open_classifier
from jax_dpo.weights.source import resolve_model

RewardFunction = Callable[[list[dict[str, Any]]], Sequence[Any]]
"""rows with prompt, chosen and rejected -> for each its gap, or the two rewards (chosen, rejected)"""

ROWS_A_CALL = 64
# Raise it with every change of what the numbers mean.
_FORMAT = 1


@dataclass(frozen=True)
class RewardModel:
    """A classifier on disk, or a function; `name` is what reports and messages call it."""

    name: str
    classifier: Classifier | None = None
    function: RewardFunction | None = None


def reward_model_of(config: DPOConfig, given: Any) -> RewardModel | None:
    """The reward model of a run: of the option, or the trainer's argument `given`; None where none is asked for.

    Raises:
      UserError: none or both are there; it is given and nothing reads it; its files cannot be used (from headers alone).
    """
    wanted = config.train_sampling_strategy == "curriculum" and config.curriculum_by == "reward_model"
    if given is not None and not (wanted and callable(given)):
        kind = (
            ""
            if callable(given)
            else f" and must be a function; found {type(given).__name__} (a directory is the option's)"
        )
        raise UserError(
            "reward-model-unread",
            "DPOTrainer's reward_model is what a curriculum orders the pairs by: it is read with train_sampling_strategy curriculum and "
            f"curriculum_by reward_model{kind}.",
        )
    if not wanted:
        return None
    if (given is None) == (config.curriculum_reward_model is None):
        found = "neither is there" if given is None else "both are there"
        raise UserError(
            "reward-model-missing",
            "curriculum_by reward_model needs a reward model: name its directory in curriculum_reward_model, or give DPOTrainer a function "
            f"as reward_model; {found}.",
        )
    if given is not None:
        return RewardModel(f"the function {getattr(given, '__qualname__', type(given).__name__)}", function=given)
    path = resolve_model(config.curriculum_reward_model or "")
    return RewardModel(f"the reward model {path}", open_classifier(path))


def rewards(
    model: RewardModel,
    engine: Engine,
    data: PairSet,
    rows: Rows,
    *,
    display: Display,
    asked: Callable[[], bool],
) -> Precomputed:
    """What the model gives chosen and rejected of every pair [N, 2] of `data`, whose texts `rows` has. All processes of a run call it.

    Raises:
      Stopped: the run was asked to stop; what a classifier has done is kept.
      UserError: the model's template refuses rows; it has no tokenizer; a function that gives something else than numbers.
    """
    used = rows.select(data.pairs.index, rows.name)
    if model.function is not None:
        return Precomputed(_called(model, model.function, used, engine.config, display), 0, [])
    assert model.classifier is not None
    return _classified(model.classifier, engine, data, used, display=display, asked=asked)


def _called(
    model: RewardModel, function: RewardFunction, rows: Rows, config: DPOConfig, display: Display
) -> np.ndarray:
    """One process calls the function, and tells the others; its gap stands where chosen's reward would."""
    values, error = np.zeros((len(rows), 2), np.float32), None
    if is_primary():
        try:
            for start, some in _pairs(rows, config):
                display.busy(f"{model.name} on pair {start + 1:,} of {len(rows):,}")
                values[start : start + len(some)] = _numbers(function(some), len(some), model.name)
        except Exception as problem:
            error = problem
    raise_together(error)
    return np.asarray(array_from_primary(values))


def _pairs(rows: Rows, config: DPOConfig) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The pairs as the training reads them, some at a time: (place of the first, prompt, chosen and rejected of each)."""
    values = read_as(rows.rows, data_options(config).reading, rows.name)
    layout = layout_of(values, rows.name)
    for start in range(0, len(values), ROWS_A_CALL):
        read = [read_pair(values[i], layout) for i in range(start, min(start + ROWS_A_CALL, len(values)))]
        yield (
            start,
            [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in read if isinstance(p, Pair)],
        )


def _numbers(found: Any, count: int, name: str) -> np.ndarray:
    """[count, 2] out of what a function gave: (gap, 0), or (chosen, rejected)."""
    try:
        numbers = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        numbers = np.zeros(0)
    if numbers.shape == (count,):
        numbers = np.stack([numbers, np.zeros(count)], 1)
    if numbers.shape != (count, 2):
        raise UserError(
            "reward-function-result",
            f"{name} got {count} rows and gave {_kind(found)}; expected {count} numbers (the gap of each row), or {count} times two "
            "(the rewards of chosen and rejected).",
        )
    return numbers


def _kind(found: Any) -> str:
    shape = getattr(found, "shape", None)
    if shape is not None:
        return f"an array of shape {tuple(shape)}"
    return (
        f"{len(found)} of type {type(found[0]).__name__}" if isinstance(found, list | tuple) and found else repr(found)
    )


def _classified(
    model: Classifier,
    engine: Engine,
    data: PairSet,
    rows: Rows,
    *,
    display: Display,
    asked: Callable[[], bool],
) -> Precomputed:
    c, files = engine.config, model.files
    tokenizer = Tokenizer(None, Policy(files, dict(files.leaves), files.config))
    if not tokenizer.files:
        raise UserError(
            "reward-model-tokenizer",
            f"The reward model {files.path} has no tokenizer (no tokenizer.json or tokenizer_config.json), by which it reads the answers. "
            "Put its tokenizer's files there.",
        )
    pairs, notes = _read(model, tokenizer, c, data, rows, display)
    check_heads(files.config.num_kv_heads, engine.mesh)

    def begin() -> tuple[Feed, Callable[[Batch], tuple[Any, Any]]]:
        display.busy("loading the reward model")
        params = place(files.leaves, engine.mesh, engine.dtype)
        head = jax.device_put(np.asarray(model.score.read(), np.float32), replicated(engine.mesh))
        attention, _ = choose(jax.default_backend(), engine.dtype, c.kernels)
        run = make_reward_pass(
            files.config, engine.mesh, compute_dtype=engine.dtype, attention=attention, pad_id=model.pad_id
        )
        feed = replace(engine.feed_of(pairs, c.per_device_eval_batch_size), router=True, ld_alpha=None)
        return feed, lambda made: run(params, jnp.asarray(head), made)

    made = two_sides(
        engine,
        pairs,
        Kept(reward_cache(c.dataset_cache_dir), lambda: _key(model, engine, pairs)),
        begin,
        batch=c.per_device_eval_batch_size,
        what="the reward model's numbers",
        display=display,
        asked=asked,
    )
    return made._replace(notes=notes + made.notes)


def _key(model: Classifier, engine: Engine, pairs: PairSet) -> str:
    """What the numbers of this model for these texts are kept under."""
    parts = {
        "format": _FORMAT,
        "weights": weights_digest({**model.files.leaves, "score.weight": model.score}),
        "shape": repr(model.files.config),
        "pad": model.pad_id,
        "pairs": pairs.pairs.content_hash(),
        "dtype": engine.dtype,
        "device": jax.default_backend(),
        "precision": str(jax.config.jax_default_matmul_precision),  # type: ignore[attr-defined]
    }
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


def _read(
    model: Classifier, tokenizer: Tokenizer, config: DPOConfig, data: PairSet, rows: Rows, display: Display
) -> tuple[PairSet, list[str]]:
    """The same pairs in the tokens of the reward model, uncut, and what the user should know of them."""
    facts, path, notes = data.pairs.table.facts, model.files.path, []
    reading = data_options(config).reading
    if not facts.chat and facts.explicit and getattr(tokenizer.loaded, "chat_template", None):
        rows, reading = _as_turns(rows, config), Reading(TRL)
        notes.append(
            named(
                "reward-model-chat",
                f"The reward model {path} has a chat template, so it was given each prompt as a user's turn and each answer as "
                "an assistant's.",
            )
        )
    read = prepare(
        rows,
        lambda: tokenizer.loaded,
        tokenizer_key=tokenizer.fingerprint,
        options=DataOptions(
            max_length=None,
            **asdict(reading),
            cache_dir=token_cache(config.dataset_cache_dir),
        ),
        progress=lambda done, total: display.busy(f"tokenizing {done:,} of {total:,} for the reward model"),
    )
    if read.drops:
        first = read.drops[0]
        raise UserError(
            "reward-model-rows",
            f"The reward model {path} cannot read {len(read.drops)} of the {len(rows)} pairs: {first.file}, "
            f"{name_rows([d.row for d in read.drops])}. Row {first.row}: {first.detail}. Leave these rows out, or take the gap from "
            "elsewhere (curriculum_by).",
        )
    most, longest = model.files.config.max_position_embeddings, read.pairs.sequence_lengths().max(1)
    if (longest > most).any():
        notes.append(
            named(
                "reward-model-length",
                f"{int((longest > most).sum())} pairs are longer than the {most} tokens that the reward model {path} was made for "
                "(max_position_embeddings); it was given them whole.",
            )
        )
    return PairSet(read, share_prompt=True), notes


def _as_turns(rows: Rows, config: DPOConfig) -> Rows:
    """Plain prompts and answers as the turns of a chat."""

    def load() -> Loaded:
        values = read_as(rows.rows, data_options(config).reading, rows.name)
        turned = [
            {
                **row,
                "prompt": [{"role": "user", "content": row["prompt"].strip()}],
                **{side: [{"role": "assistant", "content": row[side].strip()}] for side in ("chosen", "rejected")},
            }
            for row in values
        ]
        return rows.loaded._replace(values=turned)

    how = f"turns {data_options(config).reading}"
    return Rows(rows.name, rows.files, digest(rows.fingerprint.encode(), how.encode()), load)
