"""Running out of memory. The oracles are JAX's and numpy's own errors, and messages as GPUs and TPUs word them."""

from __future__ import annotations

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_dpo.errors import UserError
from jax_dpo.train.memory import MemorySettings, is_out_of_memory, memory_advice, memory_error

XLA = jax.errors.JaxRuntimeError
TPU = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of 15.48G hbm.
Total hbm usage >= 22.47G:
    reserved        530.00M
    program          21.95G"""


def on_device() -> None:
    jnp.zeros((1 << 46,), jnp.uint8).block_until_ready()


def in_a_program() -> None:
    jax.jit(lambda x: x[:, None] * x[None, :])(jnp.zeros(1 << 23)).block_until_ready()


def on_the_host() -> None:
    np.zeros(1 << 46)


@pytest.mark.parametrize(
    ("grab", "amount"),
    [(on_device, "70.4 TB"), (in_a_program, "281.5 TB"), (on_the_host, "512 TiB")],
)
def test_real_errors(grab, amount: str) -> None:
    with pytest.raises(UserError) as error, memory_advice(MemorySettings(), doing="training step 12"):
        grab()
    assert error.value.name == "out-of-memory"
    first = error.value.message.splitlines()[0]
    assert first == f"Out of memory while training step 12 ({amount} more were asked for). What takes less, best first:"
    assert error.value.__suppress_context__, "no allocator's dump beside the message"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (XLA(TPU), True),
        (XLA("RESOURCE_EXHAUSTED: Failed to allocate request for 2.99GiB (3206250496B) on device ordinal 0"), True),
        (
            XLA("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment ..."),
            True,
        ),
        (XLA("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (XLA("INVALID_ARGUMENT: shapes differ"), False),
        (XLA("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem."), False),
        (XLA("RESOURCE_EXHAUSTED: Received message larger than max (5 vs. 4)"), False),
        (ValueError("RESOURCE_EXHAUSTED: Error writing d/1: No space left on device, failed to allocate"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_recognised(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    wrapped = RuntimeError("the step failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) is expected


def test_what_the_device_has() -> None:
    text = memory_error(XLA(TPU), MemorySettings(), doing="compiling the training step").message
    assert "while compiling the training step (it needs 21.95G, the device has 15.48G)." in text
    assert "program" not in text


def test_advice_names_the_values_in_force() -> None:
    settings = MemorySettings(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_length=1024,
        gradient_checkpointing=False,
        use_peft=False,
        bf16=False,
        optim="adamw_torch_fused",
    )
    lines = memory_error(MemoryError(), settings, doing="training step 1").message.splitlines()
    assert lines[0] == "Out of memory while training step 1. What takes less, best first:"
    words = [
        "micro-batch",
        "shorter sequences",
        "gradient_checkpointing true",
        "LoRA",
        "two copies of the weights",
        "bf16 true",
        "more",
    ]
    assert len(lines) == 1 + len(words)
    for line, word in zip(lines[1:], words, strict=True):
        assert word in line
    assert "per_device_train_batch_size 4 -> 2 with gradient_accumulation_steps 4 -> 8" in lines[1]
    assert "max_length 1024 -> 512" in lines[2]


def test_advice_leaves_out_what_is_done_already() -> None:
    settings = MemorySettings(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
        max_length=64,
        gradient_checkpointing=True,
        use_peft=True,
        bf16=True,
    )
    lines = memory_error(MemoryError(), settings, doing="training step 1").message.splitlines()
    assert len(lines) == 2 and "more devices" in lines[1]


def test_an_odd_batch_keeps_the_pairs_of_a_step() -> None:
    settings = MemorySettings(per_device_train_batch_size=5, gradient_accumulation_steps=3)
    assert "5 -> 2 with gradient_accumulation_steps 3 -> 8" in memory_error(MemoryError(), settings, doing="x").message


def test_other_errors_pass_as_they_are() -> None:
    own = UserError("no-space-left", "a disk is full")
    for error in (own, KeyError("slip"), XLA("INVALID_ARGUMENT: shapes differ")):
        with pytest.raises(type(error)) as caught, memory_advice(MemorySettings(), doing="x"):
            raise error
        assert caught.value is error
