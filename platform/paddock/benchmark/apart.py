"""Functions called in a process of their own, which is killed when it is late and gives its memory back."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from paddock.errors import ServiceError


class Apart:
    """A process for one call after another. `with Apart() as apart: apart(30, work, argument)`."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the parent's CUDA and threads
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def __call__(self, timeout_s: float, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` returns or raises. Raises ServiceError where it takes too long or the process dies."""
        try:
            self._pipe.send((work, arguments))
            if not self._pipe.poll(timeout_s):
                self._process.kill()
                raise ServiceError(f"{work.__name__} took longer than {timeout_s:g} s")
            value, error = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ServiceError(f"{work.__name__}: its process ended with {self._process.exitcode}") from None
        if error is not None:
            raise error
        return value


def _work(pipe: Connection) -> None:
    while True:
        work, arguments = pipe.recv()
        try:
            pipe.send((work(*arguments), None))
        except Exception as error:
            error.add_note(traceback.format_exc())
            pipe.send((None, error))
