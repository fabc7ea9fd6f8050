"""What stands between the network and the routes: keys, limits, sizes, times, CORS, and the request log.

    401  no key, or a wrong one          403  an administrative route without an `admin` key
    413  the body is too large           429  the key's limit is reached; Retry-After says for how long
    504  the answer took too long

`/health` and `/is_ready` need no key. The request log has one JSON line a request: id, key's name, model, token
counts, times; never its text. The id goes on to the engine, whose own ids contain it.

A request that is asked again, for its replica died, counts once against its key's limits: the proxy says in the scope,
where no client of HAProxy or Serve's proxy can, which try it is (paddock.ingress.tries).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping
from logging.handlers import WatchedFileHandler
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.keys import ApiKey, KeyRing
from paddock.config_parts import AccessPart
from paddock.ingress import tries
from paddock.ingress.answers import ADAPTER, error_response
from paddock.usage import CURRENT, Usage

logger = logging.getLogger("ray.serve")

_TO_HANG_UP_S = 0.5
_GONE = "the client has left"  # for Serve, which counts answers by status
OPEN_PATHS = ("/health", "/is_ready")


class KeyLimits(Protocol):
    """Who counts for keys that have limits (`limits.Limits`, behind a handle)."""

    async def admit(self, key: ApiKey) -> float: ...

    def spend(self, key: ApiKey, tokens: int) -> None: ...


class RefusedError(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class Gate:
    """An ASGI app around another one."""

    def __init__(
        self,
        app: ASGIApp,
        part: AccessPart,
        keys: KeyRing,
        limits: KeyLimits | None = None,
        vllm_app: Any = None,
        forwarded: Mapping[str, str] = MappingProxyType({}),
        direct: Callable[[Scope, bytes], ASGIApp | None] | None = None,
        before_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """limits: needed where a key has any. vllm_app: answers `part.admin_routes`, and paths with the methods of
        `forwarded`. direct: finds an app for a request and its body before all of these, one that is cancelled when
        nobody waits for it any more (`paddock.engine.direct`). before_answer: called when an answer is about to begin;
        nothing of it has been sent by then."""
        self._app, self._part, self._keys, self._limits = app, part, keys, limits
        self._vllm_app, self._forwarded, self._direct = vllm_app, forwarded, direct
        self._before_answer = before_answer
        self._ending: set[asyncio.Future[None]] = set()
        self._log = request_log(part.request_log)
        self._entered: ASGIApp = self._enter
        if part.allowed_origins:
            self._entered = CORSMiddleware(
                self._enter,
                allow_origins=part.allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._entered(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, usage = time.monotonic(), Usage()
        answer = _Answer(send, usage, self._before_answer)
        path, key, request_id = _path(scope), None, _request_id(scope)
        CURRENT.set(usage)
        try:
            key = self._caller(scope)
            if scope.get(tries.SCOPE, 1) == 1:  # a later try of a request whose replica died was counted with the first
                await self._within_limits(key)
            async with asyncio.timeout(self._part.request_timeout_s):
                body = await self._body(scope, receive)
            connection = _Connection(body, receive)
            direct = None if self._direct is None or path in self._part.admin_routes else self._direct(scope, body)
            if direct is not None:
                await self._run_direct(direct, scope, connection, answer)
            else:
                await self._run(scope, connection, answer)
        except RefusedError as refused:
            await error_response(path, refused.status, str(refused), refused.headers)(scope, receive, answer)
        except TimeoutError:
            await answer.fail(scope, 504, f"no complete answer within {self._part.request_timeout_s:g} s")
        except asyncio.CancelledError:
            answer.status = answer.status or 499
            raise
        except Exception:
            logger.exception("request %s failed", request_id)
            await answer.fail(scope, 500, f"internal error; the service's log has it as request {request_id}")
        finally:
            used = usage.prompt_tokens + usage.completion_tokens
            if key is not None and key.tokens_per_minute and self._limits is not None and used:
                self._limits.spend(key, used)
            self._write(scope, request_id, key, answer.status, usage, begun)

    def _caller(self, scope: Scope) -> ApiKey | None:
        """Whose request this is, None where nobody needs a key. Raises RefusedError."""
        path = _path(scope)
        admin = path in self._part.admin_routes
        if not self._keys.required or (path in OPEN_PATHS and not admin):
            return None
        scheme, _, presented = Headers(scope=scope).get("authorization", "").partition(" ")
        key = self._keys.find(presented.strip())
        if scheme.lower() != "bearer" or key is None:
            raise RefusedError(
                401, "a valid API key is needed: Authorization: Bearer KEY", {"www-authenticate": "Bearer"}
            )
        if admin and not key.admin:
            raise RefusedError(403, f"{path}: an administrative route; the key {key.name!r} is not an admin's")
        return key

    async def _within_limits(self, key: ApiKey | None) -> None:
        if key is None or self._limits is None or not (key.requests_per_minute or key.tokens_per_minute):
            return
        wait = await self._limits.admit(key)
        if wait > 0:
            seconds = math.ceil(wait)
            raise RefusedError(
                429,
                f"the key {key.name!r} has reached its limit; try again in {seconds} s",
                {"retry-after": str(seconds)},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body: routes answer JSON, which is read whole anyway. Raises RefusedError."""
        most = self._part.max_body_bytes
        too_large = RefusedError(413, f"the body is larger than {most} bytes")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(499, _GONE)
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)

    async def _run_direct(self, app: ASGIApp, scope: Scope, connection: _Connection, answer: _Answer) -> None:
        """The answer of an app that ends when it is cancelled, whatever it makes of that. Raises as `_run` does."""
        call, why, over = asyncio.current_task(), "", False
        assert call is not None
        cancelled = call.cancelling()

        def end(reason: str) -> None:
            nonlocal why
            if not over and not why:
                why, answer.muted = reason, True
                call.cancel()

        timer = asyncio.get_running_loop().call_later(self._part.request_timeout_s, end, "late")
        connection.left.add_done_callback(lambda _: end("left"))
        try:
            await app(scope, connection.receive, answer)
        except (asyncio.CancelledError, Exception):
            if not why:
                raise
        finally:
            over = True
            timer.cancel()
            connection.left.cancel()
        if (call.uncancel() if why else call.cancelling()) > cancelled:  # by Serve
            raise asyncio.CancelledError
        if why == "late":
            raise TimeoutError
        if why == "left":
            await answer.fail(scope, 499, _GONE)

    async def _run(self, scope: Scope, connection: _Connection, answer: _Answer) -> None:
        """The app's answer. Raises TimeoutError where it takes too long, and whatever the app raises."""
        path = _path(scope)
        theirs = path in self._part.admin_routes or self._forwarded.get(path) == scope["method"]
        app = self._vllm_app if theirs else self._app
        running = asyncio.ensure_future(app(scope, connection.receive, answer))
        try:
            ends = {running, connection.left}
            done, _ = await asyncio.wait(
                ends, timeout=self._part.request_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise TimeoutError
            if running in done or answer.complete:
                await running
            else:
                await answer.fail(scope, 499, _GONE)
        finally:
            if not running.done():
                # vLLM gives up an answer when it hears that the client has left; merely cancelled, it would go on.
                answer.muted = True
                connection.hang_up()
                # Apart, for Serve may cancel this call a second time before the app has heard.
                ending = asyncio.ensure_future(_end(running))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)
            connection.left.cancel()

    def _write(
        self, scope: Scope, request_id: str, key: ApiKey | None, status: int, usage: Usage, begun: float
    ) -> None:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": request_id,
            "key": None if key is None else key.name,
            "method": scope["method"],
            "path": _path(scope)[:100],
            "status": status,
            "model": usage.model,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "first_token_s": None if usage.first_token_at is None else round(usage.first_token_at - begun, 4),
            "seconds": round(time.monotonic() - begun, 4),
        }
        self._log.info("%s", json.dumps(line))


class _Answer:
    """`send`, knowing what was sent. It keeps the headers until there is something to say: before the first byte a
    request can still be answered by another replica, or otherwise. By then it is known which adapter answers, if any,
    and said: what chooses a replica for the next request goes by that."""

    def __init__(self, send: Send, usage: Usage, before: Callable[[], None]) -> None:
        self._send, self._usage, self._before = send, usage, before
        self._headers: Message | None = None
        self._sent = self._stream = self.complete = False
        self.status = 0
        self.muted = False
        """Set when nothing that the app may still say is for the client."""

    async def __call__(self, message: Message) -> None:
        if self.muted:
            return
        if message["type"] == "http.response.start":
            self.status, self._headers = message["status"], message
            self._stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
            return
        if message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        if self._headers is not None and not self._sent:
            self._before()
            self._sent = True
            if self._usage.adapter is not None and self.status < 400:
                MutableHeaders(scope=self._headers)[ADAPTER] = quote(self._usage.adapter, safe="")
            await self._send(self._headers)
        await self._send(message)

    async def fail(self, scope: Scope, status: int, message: str) -> None:
        """Tell the client of a failure, in the stream where one has begun."""
        response = error_response(_path(scope), status, message)
        if not self._sent:
            self._before()
            self.status, self._sent = status, True
            await response(scope, _nothing, self._send)
        elif not self.complete:
            self.status = status
            event = b"data: " + bytes(response.body) + b"\n\n" if self._stream else b""
            await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _path(scope: Scope) -> str:
    """The path below the application's route prefix."""
    return str(scope["path"]).removeprefix(scope.get("root_path", "").rstrip("/"))


async def _end(running: asyncio.Future[Any]) -> None:
    await asyncio.wait({running}, timeout=_TO_HANG_UP_S)
    running.cancel()


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


class _Connection:
    """`receive`, with a body that was read already; it hears of the client's leaving whether the app listens or not."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive, self._over = receive, asyncio.Event()
        self.left = asyncio.ensure_future(self._watch())
        """Done when the client has left."""

    def hang_up(self) -> None:
        """To the app it is as if the client had left."""
        self.left.cancel()
        self._over.set()

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._over.wait()
        return {"type": "http.disconnect"}

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._over.set()


def _request_id(scope: Scope) -> str:
    """Serve's id of the request, or the client's own, made unique; it goes on with the request's headers.

    Two requests of one id would be one to the engine.
    """
    headers = MutableHeaders(scope=scope)
    given = re.sub(r"[^A-Za-z0-9._-]", "", headers.get("x-request-id", ""))[:64]
    headers["x-request-id"] = f"{given}-{secrets.token_hex(4)}".removeprefix("-")
    return headers["x-request-id"]


def request_log(file: str | None) -> logging.Logger:
    """Where lines about requests go: a file, which may be rotated, or Serve's log of the replica."""
    if file is None:
        return logger
    log = logging.getLogger(f"paddock.requests.{file}")
    if not log.handlers:
        log.addHandler(WatchedFileHandler(file, encoding="utf-8"))
    log.setLevel(logging.INFO)
    log.propagate = False
    return log
