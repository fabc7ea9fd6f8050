"""Which adapters have answered through Serve's own proxy: a request for one of them prefers replicas that hold it.

Serve's router knows what the replicas have told (`deployments.held`), and goes by the id of a model in a request's
headers. Here it is put there, for adapters that have answered before: of a name that no replica has told the router
would wait for one, and remember it for ever. HAProxy does the same by itself; see haproxy.py.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from paddock.ingress.answers import ADAPTER

HEADER = b"serve_multiplexed_model_id"  # ray.serve._private.constants
_MOST_NAMES = 1024
_MOST_BYTES = 64 * 1024  # of a body that is looked at: as much as HAProxy sees
_MOST_SECONDS = 1.0  # that its end is waited for; how long a body may take is the replica's to say
_MOST_ONGOING = 16
"""How many requests of an adapter prefer its holders at a time. The router would fill one replica before it asks the
next, so the others go where there is least to do; then more replicas hold it."""


class Holders:
    """The names of adapters, with the requests for them that are under way."""

    def __init__(self) -> None:
        self._ongoing: OrderedDict[str, int] = OrderedDict()

    def hear(self, headers: Headers) -> None:
        """Of an answer."""
        if ADAPTER in headers:
            name = unquote(headers[ADAPTER])
            self._ongoing.setdefault(name, 0)
            self._ongoing.move_to_end(name)
            if len(self._ongoing) > _MOST_NAMES:
                self._ongoing.popitem(last=False)

    async def asked(self, scope: Scope, receive: Receive) -> str | None:
        """The adapter that a request asks for, where it has answered before. Reads what there is of the body."""
        if not self._ongoing or scope["method"] != "POST":
            return None
        body, more = b"", True
        try:
            async with asyncio.timeout(_MOST_SECONDS):
                while more and len(body) <= _MOST_BYTES:
                    message = await receive()
                    body, more = body + message.get("body", b""), message.get("more_body", False)
        except TimeoutError:
            return None
        if more or len(body) > _MOST_BYTES:
            return None
        try:
            model = json.loads(body)["model"].rpartition(":")[2]  # of `NAME` and `BASE:NAME`
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
        return model if model in self._ongoing else None

    @contextmanager
    def headers(self, scope: Scope, name: str | None) -> Iterator[list[tuple[bytes, bytes]]]:
        """A request's headers, while it is under way: with Serve's own where holders are preferred, not a client's."""
        given = [(key, value) for key, value in scope["headers"] if key.lower().replace(b"-", b"_") != HEADER]
        if name is None:
            yield given
            return
        ongoing = self._ongoing.get(name, 0)
        self._ongoing[name] = ongoing + 1
        try:
            yield [*given, (HEADER, name.encode())] if ongoing < _MOST_ONGOING else given
        finally:
            if name in self._ongoing:
                self._ongoing[name] -= 1
