"""The short way to vLLM's completions: its own endpoints, past what FastAPI and vLLM do around them for each request.

A request comes to the engine without waiting for its turn in between, so that the first of many that arrive together
is being computed while the others are still read. Whatever is not an ordinary request is left to vLLM's app, which says
what there is to say.
"""

from __future__ import annotations

import json
import logging
import typing
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

PATHS = ("/v1/completions", "/v1/chat/completions")
_HARMLESS = {"ScalingMiddleware"}  # of elastic expert parallelism, for models of experts


class Direct:
    """Finds out which requests can go the short way."""

    def __init__(self, app: Any) -> None:
        """app: vLLM's (`openai_app.build`)."""
        self._app = app
        self._endpoints = {route.path: _Endpoint(route.endpoint) for route in app.routes if _is_ours(route)}
        around = {getattr(middleware.cls, "__name__", "") for middleware in app.user_middleware} - _HARMLESS
        # Such as one that asks for a key of vLLM's own. FastAPI 0.137 has the routes elsewhere.
        if around or len(self._endpoints) < len(PATHS):
            self._endpoints = {}
            why = f"it has {', '.join(sorted(around))}" if around else "its routes are not where they were"
            logger.warning("completions take the long way, through all of vLLM's app: %s", why)

    def __call__(self, scope: Scope, body: bytes) -> ASGIApp | None:
        """What answers an ordinary request, None for any other. It ends when it is cancelled, and does not listen for
        the client; as vLLM's own code does, it may say something instead of passing the cancellation on."""
        path = str(scope["path"]).removeprefix(scope.get("root_path", "").rstrip("/"))
        endpoint = self._endpoints.get(path) if scope["method"] == "POST" else None
        if endpoint is None:
            return None
        try:
            request = endpoint.request(Headers(scope=scope), body)
        except Exception:  # of any kind, and vLLM's app has a word for each
            return None
        return partial(self._answer, endpoint, request)

    async def _answer(self, endpoint: _Endpoint, request: Any, scope: Scope, receive: Receive, send: Send) -> None:
        raw_request = Request({**scope, "app": self._app}, receive)
        try:
            response = await endpoint.call(request, raw_request=raw_request)
        except Exception as error:
            handlers = self._app.exception_handlers
            handler = next((handlers[kind] for kind in type(error).__mro__ if kind in handlers), None)
            if handler is None:
                raise
            response = await handler(raw_request, error)
        if isinstance(response, StreamingResponse):
            await _stream(response, send)
        else:
            await response(scope, receive, send)


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
    if response.background is not None:
        await response.background()


def _is_ours(route: Any) -> bool:
    return getattr(route, "path", None) in PATHS and "POST" in (getattr(route, "methods", None) or ())
