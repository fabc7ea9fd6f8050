"""Reading and writing much beside other work: without filling the page cache, without taking the cores.

A model is larger than the memory that a machine has to spare. Kept in the page cache, each of its pages takes a new one
that the kernel, or the host of a virtual machine, has to find and clear: measured, up to 2 s a GB, which is more than
all that a merge computes from it. Where pages go round it is 0.1 to 0.3 s.
"""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path

# Bytes from one advice to the next, and how far each reaches back: what was not on disk yet is tried again.
_STEP, _REACH = 32 * 2**20, 128 * 2**20
_NICE = 10


def let_go(handle: int, start: int, stop: int) -> None:
    """Say that bytes start to stop of an open file went by, and that neither they nor those before are wanted again.

    handle: its file descriptor. To be called for all bytes, in order: now and then it drops what is behind and sends
    what was written on its way to the disk. It is advice, so wherever it does not work nothing is lost but time.
    """
    if start // _STEP != stop // _STEP:
        begin = max(0, min(start, stop - _REACH))
        _drop(handle, begin, stop - begin)


def sha256(file: Path) -> str:
    """A file's sha256, in few calls: between them Python's lock is taken from the other threads."""
    digest, buffer, begin = hashlib.sha256(), memoryview(bytearray(_STEP)), 0
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
            _drop(stream.fileno(), begin, size)
            begin += size
    return digest.hexdigest()


def give_way() -> None:
    """Let this thread take what the others leave of the cores; on Linux a thread has a priority of its own."""
    thread = threading.get_native_id()
    with suppress(OSError):  # a courtesy
        os.setpriority(os.PRIO_PROCESS, thread, max(_NICE, os.getpriority(os.PRIO_PROCESS, thread)))


def _drop(handle: int, begin: int, size: int) -> None:
    with suppress(OSError):  # not every file system knows it
        os.posix_fadvise(handle, begin, size, os.POSIX_FADV_DONTNEED)
