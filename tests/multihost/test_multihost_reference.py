"""Two processes of four devices each, whose reference moves, was run beforehand, or orders the pairs.

Oracle: the same command on one process of eight."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from cluster import Cluster
from test_multihost import assert_same_numbers

# A cache of its own for each process, as on hosts that share no disk.
APART = "import os, sys\nos.environ['JAX_DPO_CACHE'] += '-' + sys.argv[sys.argv.index('--process_id') + 1]\n"


@pytest.mark.slow
def test_a_moving_reference_is_one_on_all_hosts_and_after_a_resumption(cluster: Cluster, tmp_path: Path) -> None:
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    one, two = tmp_path / "one", tmp_path / "two"
    assert cluster.run(one, processes=1, **moving)[0].code == 0
    assert [e.code for e in cluster.run(two, **moving)] == [0, 0]
    assert_same_numbers(two, one)
    resumed = tmp_path / "resumed"
    ended = cluster.run(resumed, **{**moving, "resume_from_checkpoint": two / "checkpoint-2"})
    assert [e.code for e in ended] == [0, 0], ended[0].err
    found, expected = (tiny.untimed(tiny.records(p, "train")) for p in (resumed, two))
    assert found == expected[2:]


@pytest.mark.slow
def test_one_process_keeps_what_was_computed_and_tells_the_others(cluster: Cluster, tmp_path: Path) -> None:
    before = {"precompute_ref_log_probs": True, "dataset_cache_dir": None}
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    assert cluster.run(one, processes=1, **before)[0].code == 0
    ended = cluster.run(two, before=APART, **before)
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    assert_same_numbers(two, one)
    caches = [cluster.folder / f"cache-{i}" for i in range(2)]
    assert list((caches[0] / "reference").rglob("*.logps")) and not (caches[1] / "reference").exists()
    # What the second process cannot find, the first has: the numbers are the same to the bit.
    ended = cluster.run(again, before=APART, **before)
    assert [e.code for e in ended] == [0, 0], ended[0].err
    assert "40 of them by an earlier run" in tiny.records(again, "start")[0]["reference"]
    losses = [[r["loss"] for r in tiny.records(p, "train")] for p in (two, again)]
    np.testing.assert_array_equal(*losses)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["reference", "reward_model"])
def test_a_curriculum_is_one_on_all_hosts_and_after_a_resumption(cluster: Cluster, by: str, tmp_path: Path) -> None:
    """By what is computed on all of them together, and kept by the first."""
    ordered = {"train_sampling_strategy": "curriculum", "curriculum_by": by, "curriculum_buckets": 40}
    ordered |= {"dataset_cache_dir": None}
    if by == "reward_model":
        ordered["curriculum_reward_model"] = shutil.copytree(tiny.GOLDEN / "reward" / "llama", tmp_path / "reward")
        for file in tiny.TOKENIZER.iterdir():
            shutil.copyfile(file, tmp_path / "reward" / file.name)
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    assert cluster.run(one, processes=1, **ordered)[0].code == 0
    ended = cluster.run(two, before=APART, **ordered)
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    assert_same_numbers(two, one)
    ended = cluster.run(resumed, before=APART, **{**ordered, "resume_from_checkpoint": two / "checkpoint-2"})
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    found, expected = (tiny.untimed(tiny.records(p, "train")) for p in (resumed, two))
    assert found == expected[2:]
    assert tiny.snapshot(resumed / "curriculum") == tiny.snapshot(two / "curriculum") != {}
