"""How often a request was begun: written down before it is, so that a replica that dies of it leaves that behind.

HAProxy sends a request to another replica with the same headers, and cannot be told to do so less often where it was
begun than where nobody took the connection. So it names each request, and whoever begins one adds a byte to a file of
that name, which goes when the request is answered. Where HAProxy stands before replicas on several nodes, each node
counts for itself, unless PADDOCK_TRIES names a directory that they share.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("ray.serve")

MOST = 2
"""How often a request is begun at most: one of those that kill costs so many replicas, whoever asks for it."""
HEADER = "x-paddock-request"
"""HAProxy's name for a request; it replaces a client's own."""
SCOPE = "paddock.try"
"""Where an ASGI scope has the number of the try, from 1."""
PLACE = "PADDOCK_TRIES"
"""The environment variable that names the directory of the files. Without it a header is only a client's."""
_NAME = re.compile("[0-9a-f-]{36}")
_FORGOTTEN_S = 86_400  # what nobody came back for, such as a stream that was cut


class Tries:
    """The tries of one request, here and where it was before."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        place, name = os.environ.get(PLACE), headers.get(HEADER, "")
        self._file = _directory(place) / name if place and _NAME.fullmatch(name) else None
        self._number = 0

    def begin(self) -> int:
        """Count a try, and return its number."""
        self._number += 1
        if self._file is not None:
            try:
                self._number = _add_a_byte(self._file)
            except FileNotFoundError:  # the directory, which lies where others tidy up
                with suppress(OSError):
                    self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    self._number = _add_a_byte(self._file)
            except OSError as error:
                logger.warning("%s: tries are counted in this process only: %s", self._file.parent, error)
        return self._number

    def end(self) -> None:
        """The request has had its answer, or needs none."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)


def _add_a_byte(file: Path) -> int:
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(opened, b".")
        return os.lseek(opened, 0, os.SEEK_CUR)
    finally:
        os.close(opened)


@functools.cache
def _directory(place: str) -> Path:
    """The directory, once rid of what was forgotten there."""
    directory = Path(place)
    with suppress(OSError):
        for file in directory.iterdir():
            with suppress(OSError):
                if _NAME.fullmatch(file.name) and time.time() - file.stat().st_mtime > _FORGOTTEN_S:
                    file.unlink()
    return directory
