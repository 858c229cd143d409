"""Compiles the real train step for a slice of TPUs that is not there, and says whether it fits.

    pip install --no-deps --target build/libtpu "libtpu==0.0.42.*"     # the version that the installed jax's `tpu` extra asks for
    PYTHONPATH=build/libtpu python scripts/aot.py

Exit codes: 0 it fits, 1 it does not, 2 libtpu is missing or does not know the topology.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

GIB = 2**30

# The shape of Llama-3.1-8B, its long-context scaling of RoPE left out: it changes numbers, no shape.
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--topology", default="v5e:4x4", help="a slice as libtpu names it")
    parser.add_argument("--memory_gib", type=float, default=16.0, help="memory of one device")
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"])
    parser.add_argument(
        "--row_tokens", type=int, default=2048, help="tokens of a row: two answers to one prompt of max_length 1024"
    )
    parser.add_argument("--rows", type=int, default=1, help="rows of a device in a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=8, help="micro-batches that a step has room for")
    return parser.parse_args(argv)


def _slice(topology: str) -> Any:
    """The devices of an abstract topology; must come before anything else uses jax."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # libtpu asks the metadata server of a cloud machine for its slice unless it is told; nothing of this is read further on.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-8")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock guards chips, of which there are none
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def _lowered(devices: Any, chosen: argparse.Namespace) -> Any:
    from jax_dpo.data.pack import RowShape
    from jax_dpo.loss.family import LossOptions
    from jax_dpo.models.families import model_config
    from jax_dpo.plan.lowered import abstract_params, lower_step
    from jax_dpo.sharding.mesh import make_mesh, row_shards
    from jax_dpo.train.optimizer import OptimizerOptions, make_optimizer
    from jax_dpo.train.state import Facts

    mesh = make_mesh(1, -1, 1, devices=devices)
    config = model_config({**LLAMA_8B, "num_hidden_layers": chosen.layers})
    facts = Facts(
        policy=config,
        reference=config,
        reference_on_base=False,
        shared_head=False,
        compute_dtype="bfloat16",
        remat=True,
        row_shards=row_shards(mesh),
    )
    scored = chosen.row_tokens * 2 // 3 // 8 * 8
    return lower_step(
        facts,
        LossOptions(),
        make_optimizer(OptimizerOptions(weight_decay=0.01), abstract_params(config)),
        mesh,
        RowShape(chosen.row_tokens, scored, 4, chosen.rows),
        micro_batches=chosen.micro_batches,
        max_grad_norm=1.0,
    )


def main(argv: list[str]) -> int:
    chosen = _arguments(argv)
    try:
        devices = _slice(chosen.topology)
    except Exception as error:
        print(f"aot: no topology {chosen.topology}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(
        f"aot: Llama-3.1-8B shape, {chosen.layers} layers, full training in bfloat16 with recomputation, fsdp {len(devices)} on "
        f"{chosen.topology}, {chosen.rows} x {chosen.row_tokens} tokens a device, {chosen.micro_batches} micro-batches",
        flush=True,
    )
    began = time.perf_counter()
    lowered = _lowered(devices, chosen)
    lowering = time.perf_counter() - began
    from jax_dpo.plan.lowered import memory_of

    try:
        compiled = lowered.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"aot: does not fit: {str(error).splitlines()[0]}")
        return 1
    need = memory_of(compiled)
    print(f"aot: lowered in {lowering:.1f} s, compiled in {time.perf_counter() - began - lowering:.1f} s")
    print(
        f"aot: {need.total / GIB:.2f} GiB a device: {need.arguments / GIB:.2f} state, reference and batch, "
        f"{need.temporary / GIB:.2f} while a step runs; {chosen.memory_gib:g} GiB are there"
    )
    if need.total > chosen.memory_gib * GIB:
        print("aot: does not fit")
        return 1
    print("aot: fits")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
