"""How a process comes to the others of its run, as far as one process shows it; tests/multihost has several."""

from __future__ import annotations

import socket
import time

import jax
import pytest
from ports import held_port

from jax_dpo.cli import main
from jax_dpo.errors import UserError
from jax_dpo.sharding.multihost import join


def test_a_port_of_another_run_is_not_shared(capsys: pytest.CaptureFixture[str]) -> None:
    """JAX would listen there as well, and the kernel would deal out the processes of both runs between the two."""
    began = time.monotonic()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        where = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError) as error:
            join(where, 2, 0)
        place = ["--coordinator_address", where, "--num_processes", "2", "--process_id", "0"]
        assert main(["train", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", *place]) == 2
    assert error.value.name == "coordinator-port-in-use"
    assert f"coordinator_address {where}: something listens there already" in str(error.value)
    assert "another port" in capsys.readouterr().err
    assert time.monotonic() - began < 30 and not jax.distributed.is_initialized()


def test_a_held_port_is_nobody_elses() -> None:
    with held_port() as port, held_port() as other, socket.socket() as asks:
        asks.bind(("localhost", 0))
        assert len({port, other, asks.getsockname()[1]}) == 3
        with socket.socket() as takes, pytest.raises(OSError, match="in use"):
            takes.bind(("localhost", port))
