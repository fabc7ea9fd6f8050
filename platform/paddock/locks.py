"""One run at a time on one output directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from paddock import storage
from paddock.errors import OutputError


@contextmanager
def locked(output_dir: str | Path) -> Iterator[None]:
    """Hold an output directory for one run. Raises OutputError where another run holds it.

    A URI is held on this machine only: an object store has no locks.
    """
    place = storage.workplace(output_dir)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output_dir}: cannot be made ({error.strerror}: {error.filename})") from None
    if place.is_file():
        raise OutputError(f"{output_dir}: is a file; output_dir names a directory")
    lock = FileLock(place.parent / f".{place.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"{output_dir}: another run is writing here; wait for it or choose another output_dir"
        ) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
