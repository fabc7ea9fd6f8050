"""What Serve itself says, as clients get it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from paddock.ingress import holders, tries
from paddock.ingress.answers import ADAPTER
from paddock.ingress.proxy import WATCHES, Proxied, middlewares


class Serve:
    """Serve's proxy: the answers of its tries, one after the other; an empty one is a replica that died."""

    def __init__(self, *answers: list[Message]) -> None:
        self.answers, self.bodies, self.tries = list(answers), list[bytes](), list[int]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        self.tries.append(scope[tries.SCOPE])
        for message in self.answers.pop(0) if self.answers else []:
            await send(message)


def answer(status: int, body: bytes, kind: str = "text/plain", **headers: str) -> list[Message]:
    raw = [
        (name.replace("_", "-").encode(), value.encode()) for name, value in {"content_type": kind, **headers}.items()
    ]
    return [
        {"type": "http.response.start", "status": status, "headers": raw},
        {"type": "http.response.body", "body": body, "more_body": False},
    ]


def ask(app: Any, path: str, body: bytes = b"{}") -> httpx.Response:
    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post(path, content=body)

    return asyncio.run(post())


def through(serve: Serve, path: str = "/v1/completions", body: bytes = b"{}") -> httpx.Response:
    (middleware,) = middlewares()
    return ask(middleware.cls(serve), path, body)


def test_a_full_queue_is_told_in_the_shape_of_the_route() -> None:
    full = answer(429, b"Request dropped due to backpressure", retry_after="3")
    refused = through(Serve(full))
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
    error = refused.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("RateLimitError", None, 429)
    refused = through(Serve(full), "/prefix/generate")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
    assert set(refused.json()) == {"generated_text", "num_output_tokens_cf", "error"}
    assert "backpressure" not in refused.text


def test_a_service_without_replicas_may_be_asked_again() -> None:
    refused = through(Serve(answer(503, b"deployment LLM of app x failed: /home/someone")))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["code"] == 503
    assert "someone" not in refused.text


def test_what_the_service_says_is_passed_on() -> None:
    for status, kind in [(200, "text/plain"), (429, "application/json"), (400, "application/json")]:
        said = through(Serve(answer(status, b"as it is", kind)))
        assert (said.status_code, said.content) == (status, b"as it is")


@pytest.mark.parametrize("body", [b"", b'{"input": "x"}', b"x" * 200_000])
def test_a_request_whose_replica_died_goes_to_another(body: bytes) -> None:
    serve = Serve([], answer(200, b"said", "application/json"))
    said = through(serve, body=body)
    assert (said.status_code, said.content) == (200, b"said")
    assert serve.bodies == [body, body]
    assert serve.tries == [1, 2]


def test_it_does_not_take_every_replica_with_it() -> None:
    serve = Serve()
    said = through(serve, "/generate")
    assert (said.status_code, said.headers["retry-after"]) == (503, "1")
    assert said.json()["generated_text"] == ""
    assert len(serve.bodies) == tries.MOST == 2


def test_a_request_that_is_too_large_to_be_kept_is_asked_once() -> None:
    serve = Serve()
    assert through(serve, body=b"x" * (9 * 2**20)).status_code == 503
    assert len(serve.bodies) == 1


def test_a_stream_that_is_cut_says_so() -> None:
    begun = answer(200, b'data: {"choices": []}\n\n', "text/event-stream")
    begun[1]["more_body"] = True
    serve = Serve(begun, answer(200, b"never"))
    lines = through(serve).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == 503
    assert len(serve.bodies) == 1


def test_a_client_that_left_is_not_asked_for() -> None:
    serve, sent = Serve([], answer(200, b"never")), list[Message]()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(Proxied(serve)(scope, receive, send))
    assert (sent, len(serve.bodies)) == ([], 1)


@pytest.mark.parametrize("watches", [False, True])
def test_serve_listens_for_clients_that_leave_unless_the_replica_does(
    watches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve._private.http_util import parse_disconnect_disabled_header

    monkeypatch.setenv(WATCHES, "1" if watches else "")
    seen: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(parse_disconnect_disabled_header(dict(scope["headers"])))
        for message in answer(200, b"fine"):
            await send(message)

    ask(Proxied(app), "/v1/completions")
    assert seen == [watches]


class Router:
    """Serve's proxy, whose replicas answer as an adapter where one is asked for; it keeps whom it would prefer."""

    def __init__(self) -> None:
        self.preferred: list[bytes | None] = []
        self.bodies: list[bytes] = []
        self.free = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ids = [value for name, value in scope["headers"] if name.replace(b"-", b"_") == b"serve_multiplexed_model_id"]
        self.preferred.append(b",".join(ids) if ids else None)
        self.bodies.append((await receive()).get("body", b""))
        if b"wait" in self.bodies[-1]:
            await self.free.wait()
        adapter = {ADAPTER: "%E8%82%BA a"} if "肺 a".encode() in self.bodies[-1] else {}
        for message in answer(200, b"{}", "application/json", **adapter):
            await send(message)


def test_a_request_for_an_adapter_prefers_its_holders_once_it_has_answered() -> None:
    router = Router()
    app, known = Proxied(router), '{"prompt": "咳", "model": "肺 a"}'.encode()
    bodies = [known, known, known.replace(b"model", b"m"), '{"model": "base:肺 a"}'.encode(), b'{"model": "none"}']
    bodies += [b"[]", b'{"model": 3}', b"[" * 60_000, b'{"a": "' + b"x" * 2**16 + b'", ' + known[1:], known]
    for body in bodies:
        assert ask(app, "/v1/completions", body).status_code == 200
    holds = "肺 a".encode()
    assert router.preferred == [None, holds, None, holds, *[None] * 5, holds]
    assert router.bodies == bodies


def test_a_body_that_is_slow_to_come_is_waited_for_by_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "_MOST_SECONDS", 0.05)
    router, sent = Router(), list[Message]()
    app = Proxied(router)
    app._holders.hear(Headers({ADAPTER: "a"}))
    parts = iter([{"type": "http.request", "body": b'{"model"', "more_body": True}])

    async def receive() -> Message:
        part = next(parts, None)
        return part if part is not None else await asyncio.sleep(60)  # type: ignore[func-returns-value, return-value]

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), timeout=10))
    assert (router.preferred, router.bodies) == ([None], [b'{"model"'])


def test_a_client_does_not_choose_for_the_router() -> None:
    router = Router()

    async def post() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(Proxied(router)), base_url="http://x") as client:
            for name in ("serve_multiplexed_model_id", "Serve-Multiplexed-Model-Id"):
                await client.post("/", content=b"{}", headers={name: "x"})

    asyncio.run(post())
    assert router.preferred == [None, None]


def test_a_hot_adapter_goes_to_others_too_and_names_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "_MOST_NAMES", 1)
    router = Router()
    app, known = Proxied(router), '{"model": "肺 a"}'.encode()

    async def post() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            await client.post("/", content=known)
            asked = [asyncio.ensure_future(client.post("/", content=known[:-1] + b', "wait": 1}')) for _ in range(40)]
            await asyncio.sleep(0.2)
            router.free.set()
            await asyncio.gather(*asked)
            await client.post("/", content=known)

    asyncio.run(post())
    assert router.preferred[1:].count("肺 a".encode()) == 16 + 1
    app._holders.hear(Headers({ADAPTER: "other"}))
    ask(app, "/", known)
    assert router.preferred[-1] is None


def test_a_replica_of_haproxys_chooses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WATCHES, "1")
    router = Router()
    app = Proxied(router)
    for _ in range(2):
        ask(app, "/", '{"model": "肺 a"}'.encode())
    assert router.preferred == [None, None]
