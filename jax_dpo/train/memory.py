"""Running out of memory: told apart from other errors, and answered with what to change."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jax_dpo.errors import UserError
from jax_dpo.train.disk import size_text

# JAX raises one class for whatever the compiler or the device says; its name differs by version.
_XLA_ERRORS = {"XlaRuntimeError", "JaxRuntimeError"}
_XLA_WORDS = re.compile(
    r"RESOURCE_EXHAUSTED.*(memory|alloc)|\bout of memory\b|CUDA_ERROR_OUT_OF_MEMORY|failed to allocate",
    re.IGNORECASE | re.DOTALL,
)
# A TPU core's own scratch memory: a kernel that asks for too much of it is a fault of ours, not of the user's options.
_SCRATCH = re.compile(r"memory space [vs]mem")
_USED = re.compile(r"Used ([\d.]+[KMGT]i?B?) of ([\d.]+[KMGT]i?B?)\b")
_ASKED = re.compile(r"allocat\w*\s+(?:request for\s+)?(\d+(?:\.\d*)?)\s*(bytes|[KMGTP]i?B|B)\b", re.IGNORECASE)


@dataclass(frozen=True)
class MemorySettings:
    """The options that memory depends on, as they are; the advice names them. None: not known, or not an option here."""

    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    max_length: int | None = None
    gradient_checkpointing: bool | None = None
    use_peft: bool | None = None
    bf16: bool | None = None
    micro_batch_tokens: int | None = None
    may_precompute: bool = False
    """the reference runs in the step, and nothing there needs its whole distribution"""
    reference_batch: int | None = None
    """pairs of a batch, where the reference alone is run"""
    optim: str | None = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, is want of memory: the device's (at compile or run) or the host's."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return True
        names = {kind.__name__ for kind in type(seen).__mro__}
        text = str(seen)
        if names & _XLA_ERRORS and _XLA_WORDS.search(text) and not _SCRATCH.search(text):
            return True
        seen = seen.__cause__
    return False


def memory_error(error: BaseException, settings: MemorySettings, *, doing: str) -> UserError:
    """The message for an error that `is_out_of_memory`.

    Args:
        doing: what was under way, such as "compiling the training step" or "training step 12".
    """
    lines = [f"Out of memory while {doing}{_amount(error)}. What takes less, best first:"]
    lines += [f"  - {text}" for text in _advice(settings)]
    return UserError("out-of-memory", "\n".join(lines))


@contextmanager
def memory_advice(settings: MemorySettings, *, doing: str) -> Iterator[None]:
    """Turn running out of memory inside the block into a `UserError`; other errors pass as they are."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        # Without the allocator's dump, which says nothing about what to change.
        raise memory_error(error, settings, doing=doing) from None


def _advice(now: MemorySettings) -> list[str]:
    if now.reference_batch is not None:
        half = max(1, now.reference_batch // 2)
        texts = [f"a smaller batch: precompute_ref_batch_size {now.reference_batch} -> {half}"] * (
            now.reference_batch > 1
        )
        return [*texts, "more devices: the reference is spread over all of them"]
    texts = []
    if now.micro_batch_tokens:
        texts.append(
            f"a smaller micro-batch: micro_batch_tokens {now.micro_batch_tokens} -> {now.micro_batch_tokens // 2}"
        )
    batch, steps = now.per_device_train_batch_size, now.gradient_accumulation_steps
    if batch is None or steps is None:
        texts.append("a smaller micro-batch: halve per_device_train_batch_size, double gradient_accumulation_steps")
    elif batch > 1:
        # Rounded so that a step has at least the pairs that it had.
        half = batch // 2
        texts.append(
            f"a smaller micro-batch: per_device_train_batch_size {batch} -> {half} with gradient_accumulation_steps "
            f"{steps} -> {-(-batch * steps // half)} (as many pairs a step)"
        )
    if now.max_length is None:
        texts.append("shorter sequences: set max_length")
    elif now.max_length > 64:
        texts.append(f"shorter sequences: max_length {now.max_length} -> {now.max_length // 2}")
    if not now.gradient_checkpointing:
        texts.append("gradient_checkpointing true: activations are computed again instead of kept")
    if not now.use_peft:
        texts.append("LoRA (use_peft true): no optimizer state and no second copy of the model for the reference")
    if now.may_precompute:
        texts.append("precompute_ref_log_probs true: neither the reference nor its forward pass is in the step")
    moments = {"adamw_torch": "two copies", "adamw_torch_fused": "two copies", "lion_32bit": "one copy"}.get(
        now.optim or ""
    )
    if moments and not now.use_peft:
        texts.append(f"optim adafactor: {moments} of the weights less (it wants a learning rate of its own)")
    if now.bf16 is False:
        texts.append("bf16 true, on a TPU or GPU: half the memory of activations")
    texts.append("more devices: parameters, gradients and optimizer state are spread over all of them")
    return texts


def _amount(error: BaseException) -> str:
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if used := _USED.search(text):
            return f" (it needs {used[1]}, the device has {used[2]})"
        if asked := _ASKED.search(text):
            plain = asked[2].lower() in ("bytes", "b")
            size = size_text(int(float(asked[1]))) if plain else f"{asked[1].rstrip('.')} {asked[2]}"
            return f" ({size} more were asked for)"
        seen = seen.__cause__
    return ""
