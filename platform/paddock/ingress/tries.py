"""How often a request was begun: written down before it is, so that a replica that dies of it leaves that behind.

HAProxy sends a request to another replica with the same headers, and cannot be told to do so less often where it was
begun than where nobody took the connection. So it names each request, and whoever begins one adds a byte to a file of
that name, which goes when the request is answered. Where HAProxy stands before replicas on several nodes, each node
counts for itself, unless PADDOCK_TRIES names a directory that they share.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

MOST = 2
"""How often a request is begun at most: one of those that kill costs so many replicas, whoever asks for it."""
HEADER = "x-paddock-request"
"""HAProxy's name for a request; it replaces a client's own."""
SCOPE = "paddock.try"
"""Where an ASGI scope has the number of the try, from 1."""
PLACE = "PADDOCK_TRIES"
"""The environment variable that names the directory of the files. Without it a header is only a client's."""
_FORGOTTEN_S = 86_400  # what nobody came back for, such as a stream that was cut


class Tries:
    """The tries of one request, here and where it was before."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        place, name = os.environ.get(PLACE), headers.get(HEADER, "")
        self._file = _directory(place) / name if place and re.fullmatch("[0-9a-f-]{36}", name) else None
        self._number = 0

    def begin(self) -> int:
        """Count a try, and return its number."""
        self._number += 1
        if self._file is not None:
            with suppress(OSError), self._file.open("ab", buffering=0) as file:  # else it is counted here only
                file.write(b".")
                self._number = file.tell()
        return self._number

    def end(self) -> None:
        """The request has had its answer, or needs none."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)


@functools.cache
def _directory(place: str) -> Path:
    directory = Path(place)
    with suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in directory.iterdir():
            if time.time() - file.stat().st_mtime > _FORGOTTEN_S:
                file.unlink(missing_ok=True)
    return directory
