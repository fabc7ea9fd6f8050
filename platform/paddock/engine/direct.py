"""The short way to vLLM's completions: its own endpoints, past what FastAPI and vLLM do around them for each request.

A request comes to the engine without waiting for its turn in between, so that the first of many that arrive together
is being computed while the others are still read. Whatever is not an ordinary request, or goes wrong, is left to vLLM's
app, which says what there is to say.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

PATHS = ("/v1/completions", "/v1/chat/completions")


class Direct:
    """An ASGI app for POST requests to PATHS, whose body comes in one message. To be cancelled when the client leaves:
    it does not listen for that."""

    def __init__(self, app: Any) -> None:
        """app: vLLM's (`openai_app.build`)."""
        self._app = app
        self._endpoints = {route.path: _Endpoint(route.endpoint) for route in app.routes if _is_ours(route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope["path"]).removeprefix(scope.get("root_path", "").rstrip("/"))
        message = await receive()
        try:
            endpoint = self._endpoints[path]
            request = endpoint.request(Headers(scope=scope), message.get("body", b""))
            response = await endpoint.call(request, raw_request=Request({**scope, "app": self._app}, receive))
        except Exception:  # of any kind: vLLM's app has a handler for each
            await self._app(scope, _again(message, receive), send)
            return
        if isinstance(response, StreamingResponse):
            await _stream(response, send)
        else:
            await response(scope, receive, send)
        if response.background is not None:
            await response.background()


class _Endpoint:
    """What vLLM calls for a path: `call(request, raw_request=...)`, a Response."""

    def __init__(self, endpoint: Callable[..., Any]) -> None:
        # The outermost wrapper listens for the client, apart from the call, which then cannot be cancelled.
        self.call: Callable[..., Any] = getattr(endpoint, "__wrapped__", endpoint)
        self._model = typing.get_type_hints(endpoint)["request"]

    def request(self, headers: Headers, body: bytes) -> Any:
        """The body as vLLM's model of a request. Raises where it is none."""
        if headers.get("content-type", "").partition(";")[0].lower() != "application/json":
            raise ValueError("vLLM wants application/json")
        return self._model.model_validate(json.loads(body))


async def _stream(response: StreamingResponse, send: Send) -> None:
    start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    await send(start)
    async with aclosing(typing.cast(Any, response.body_iterator)) as pieces:
        async for piece in pieces:
            body = piece if isinstance(piece, bytes) else piece.encode(response.charset)
            await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _is_ours(route: Any) -> bool:
    return getattr(route, "path", None) in PATHS and "POST" in (getattr(route, "methods", None) or ())


def _again(message: Message, receive: Receive) -> Receive:
    """`receive`, with a message before what it still has."""
    said = False

    async def receiving() -> Message:
        nonlocal said
        if said:
            return await receive()
        said = True
        return message

    return receiving
