"""The command line: finds the command, runs it, and turns whatever ends it into one message and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

from jax_dpo.cli.commands import COMMANDS
from jax_dpo.cli.help import command_help, overview
from jax_dpo.config.fields import nearest
from jax_dpo.errors import OK, STOPPED, UNEXPECTED, USER_INPUT, Stopped, UserError, named

INTERRUPTED = 130  # as shells say it of Ctrl-C
NO_READER = 141  # as shells say it of a closed pipe

_HELP = ("-h", "--help", "help")

_OUT_OF_MEMORY = named(
    "out-of-memory",
    """\
error: out of memory
What helps, the first being the cheapest:
  smaller micro-batches: --per_device_train_batch_size halved and --gradient_accumulation_steps doubled, or --micro_batch_tokens
  shorter sequences: --max_length
  recomputation: --gradient_checkpointing true
  an adapter instead of the whole model: --use_peft
  more devices to share the parameters: --mesh_fsdp""",
)

_DENIED = named("no-permission", "permission denied; make it accessible, or write elsewhere with --output_dir")
_MACHINE_FAULTS = {
    errno.ENOSPC: named(
        "no-space-left", "there is no space left on the device; free some, or write elsewhere with --output_dir"
    ),
    errno.EDQUOT: named("no-space-left", "the disk quota is used up; free some, or write elsewhere with --output_dir"),
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: named("no-permission", "the file system is read-only; write elsewhere with --output_dir"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jax-dpo` with these arguments (those of the process by default) and returns the exit code; never raises.

    0 done, 1 unexpected, 2 the input is wrong, 3 trained but a gate failed, 75 stopped by a signal after saving,
    130 interrupted, 141 nobody reads the output.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python would try to flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except Stopped as stopped:
        return _say(stopped.message, STOPPED)
    except UserError as error:
        return _alone(_say(f"error: {error}", USER_INPUT))
    except Exception as error:
        return _alone(_lost(error) or _unexpected(error))


def _dispatch(argv: list[str]) -> int:
    if not argv:
        return _say(overview(COMMANDS), USER_INPUT)
    first, rest = argv[0], argv[1:]
    if first in _HELP:
        print(command_help(COMMANDS[rest[0]]) if rest and rest[0] in COMMANDS else overview(COMMANDS))
        return OK
    if first in ("--version", "-V", "version"):
        from importlib.metadata import version

        print(f"jax-dpo {version('jax-dpo')}")
        return OK
    if first not in COMMANDS:
        close = nearest(first, COMMANDS, n=1)
        words = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise UserError("unknown-command", f"there is no command {first!r}; {words}")
    command = COMMANDS[first]
    if {"-h", "--help"} & set(rest):
        print(command_help(command))
        return OK
    return command.run(rest)


def _unexpected(error: Exception) -> int:
    """Tells the machine's own faults in a sentence; anything else is a fault of the program and keeps its traceback."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return _say(_OUT_OF_MEMORY, UNEXPECTED)
    if isinstance(error, OSError) and error.errno in _MACHINE_FAULTS:
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"error: {where}{_MACHINE_FAULTS[error.errno]}", USER_INPUT)
    traceback.print_exception(error)
    return _say(
        named(
            "unexpected",
            "This should not have happened. Please report it with the lines above and the output of `jax-dpo doctor`.",
        ),
        UNEXPECTED,
    )


def _lost(error: Exception) -> int:
    """Says so where the error is that another process of the run is gone; else 0."""
    if "jax" not in sys.modules:
        return OK
    from jax_dpo.sharding.multihost import lost_peer

    text = lost_peer(error)
    return OK if text is None else _say(text, UNEXPECTED)


def _alone(code: int) -> int:
    """Ends one of several processes at once after an error; the others wait for it in vain."""
    if "jax" in sys.modules:
        from jax_dpo.sharding.multihost import abandon

        abandon(code)
    return code


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code
