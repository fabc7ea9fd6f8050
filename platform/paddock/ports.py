"""A port for a server that is about to start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

# Below the ports that Linux gives to whoever asks for any, as Ray's processes do while they start and connect, and
# above those that Ray takes for its workers: one that was free a moment ago is not taken meanwhile.
_FIRST, _LAST = 20_000, 32_000


def free_port(host: str = "127.0.0.1") -> int:
    """One on which nobody listens. Raises OSError where there is none."""
    # Not by the seed of a run: two of them would agree.
    for port in random.SystemRandom().sample(range(_FIRST, _LAST), 1000):
        with suppress(OSError), socket.socket() as tried:
            tried.bind((host, port))
            return port
    raise OSError(f"no free port between {_FIRST} and {_LAST}")
