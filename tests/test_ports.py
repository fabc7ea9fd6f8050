"""Free ports: none that the system gives to others."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from paddock import ports


def test_a_free_port_is_none_of_those_that_the_system_gives_away() -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    found = {ports.free_port() for _ in range(200)}
    assert max(found) < int(given.read_text().split()[0])
    assert len(found) > 150


def test_a_port_on_which_somebody_listens_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = ports.free_port()
    with socket.create_server(("127.0.0.1", taken)):
        monkeypatch.setattr(random.SystemRandom, "sample", lambda *_: [taken, taken])
        with pytest.raises(OSError, match="no free port"):
            ports.free_port()


def test_runs_of_one_seed_do_not_agree_on_a_port() -> None:
    random.seed(0)
    first = [ports.free_port() for _ in range(3)]
    random.seed(0)
    assert [ports.free_port() for _ in range(3)] != first
