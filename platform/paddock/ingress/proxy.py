"""What Serve itself says to a client, in the words of the service; and another try where a replica died.

In Serve's proxy, which chooses a replica, those that hold an adapter are preferred for it (holders.py).

Serve's proxy, and each replica that HAProxy asks directly, puts `Proxied` around itself where
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names `middlewares`. Without it they answer in plain text, and where a
replica died with a 500.
"""

from __future__ import annotations

import json
import os
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paddock.ingress import tries
from paddock.ingress.answers import error_response
from paddock.ingress.holders import Holders

# What is kept of a request to be sent again.
_MOST_BYTES = 8 * 2**20
_RETRY_AFTER = {"retry-after": "1"}
WATCHES = "PADDOCK_WATCHES_CLIENTS"
"""The environment variable of replicas whose app hears by itself that a client has left. Serve, which would listen for
that too, is told not to: it takes two tasks a request, and turns in which others come first."""
_UNWATCHED = (b"x-request-disconnect-disabled", b"?1")  # ray.serve._private.constants
_MESSAGES = {
    408: "the answer took too long",
    429: "all replicas and their queues are full; try again later",
    503: "the service has no replica that works; try again later",
}


def middlewares() -> list[Middleware]:
    """What Serve calls."""
    return [Middleware(Proxied)]


class Proxied:
    """An ASGI app around Serve's own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._holders = app, Holders()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, answer, begun = _Request(receive), _Answer(scope, send), tries.Tries(Headers(scope=scope))
        if WATCHES in os.environ:  # a replica
            headers = [*scope["headers"], _UNWATCHED] if os.environ[WATCHES] else scope["headers"]
            await self._ask(scope, headers, request, answer, begun)
            return
        adapter = await self._holders.asked(scope, request.receive)
        with self._holders.headers(scope, adapter) as headers:
            await self._ask(scope, headers, request, answer, begun)
        self._holders.hear(answer.headers)

    async def _ask(
        self, scope: Scope, headers: list[tuple[bytes, bytes]], request: _Request, answer: _Answer, begun: tries.Tries
    ) -> None:
        """Ask the app, and once more where nothing came of it."""
        try:
            while (number := begun.begin()) <= tries.MOST:
                request.rewind()
                again = {**scope, "headers": list(headers), tries.SCOPE: number}
                await self._app(again, request.receive, answer)
                # Where a replica died, Serve ends without a word.
                if answer.begun or not request.whole:
                    break
            await answer.end(request.left)
        finally:
            begun.end()


class _Request:
    """`receive` that can be read again."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._kept, self._next, self._bytes = receive, list[Message](), 0, 0
        self.left = False
        """Whether the client has left."""

    @property
    def whole(self) -> bool:
        """Whether it can be read again."""
        return self._bytes <= _MOST_BYTES and not self.left

    def rewind(self) -> None:
        self._next = 0

    async def receive(self) -> Message:
        if self._next < len(self._kept):
            self._next += 1
            return self._kept[self._next - 1]
        message = await self._receive()
        self.left = self.left or message["type"] == "http.disconnect"
        self._bytes += len(message.get("body", b""))
        if self.whole:
            self._kept.append(message)
            self._next += 1
        else:
            self._kept.clear()
            self._next = 0
        return message


class _Answer:
    """`send`, with what is Serve's own put into the shape of `answers`."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self.begun = self._complete = self._events = False
        self.headers = Headers(raw=[])
        self._instead: JSONResponse | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            status, headers = message["status"], Headers(raw=message["headers"])
            self.headers = headers
            kind = headers.get("content-type", "")
            self._events = kind.startswith("text/event-stream")
            if status >= 400 and kind.startswith("text/plain") and not self._scope["path"].startswith("/-/"):
                self._instead = self._error(status, headers)
                return
        elif message["type"] == "http.response.body":
            self._complete = not message.get("more_body", False)
            if self._instead is not None:
                if self._complete:
                    await self._instead(self._scope, _nothing, self._send)
                return
        await self._send(message)

    async def end(self, left: bool) -> None:
        """Say what Serve did not."""
        if left or self._complete:
            return
        if not self.begun:
            lost = "each replica that worked on the request was lost; try again"
            await self._response(503, lost, _RETRY_AFTER)(self._scope, _nothing, self._send)
        elif self._events:
            lost = "the replica that worked on the request was lost, and the answer ends here"
            event = b"data: " + bytes(self._response(503, lost).body) + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        # Else the server sees that the answer is not complete, and cuts the connection.

    def _error(self, status: int, headers: Headers) -> JSONResponse:
        kept = {name: headers[name] for name in ("retry-after", "x-request-id") if name in headers}
        path = str(self._scope["path"])
        unknown = "no such path" if status == 404 else f"the service answered {status}"
        message = _MESSAGES.get(status, f"{self._scope['method']} {json.dumps(path[:100])}: {unknown}")
        return self._response(status, message, {**(_RETRY_AFTER if status in (429, 503) else {}), **kept})

    def _response(self, status: int, message: str, headers: Any = None) -> JSONResponse:
        # Below which prefix an application lies is not known here.
        path = "/generate" if str(self._scope["path"]).endswith("/generate") else ""
        return error_response(path, status, message, headers)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
