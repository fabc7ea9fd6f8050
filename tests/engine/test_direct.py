"""vLLM's own route of completions, with an engine that says one thing, directly and through its app."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from paddock.engine import Engine, openai_app
from paddock.engine.direct import PATHS, Direct

BODY = {"model": "m", "prompt": "p", "max_tokens": 2}


class Completions:
    """What vLLM has in its app's state."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def create_completion(self, request: Any, raw_request: Any) -> Any:
        from vllm.entrypoints.openai.completion.protocol import CompletionResponse

        assert raw_request.headers["content-type"].startswith("application/json")
        if request.prompt == "wrong":
            raise ValueError("wrong")
        if request.prompt == "for ever":
            try:
                await asyncio.Event().wait()
            finally:
                self.ended.set()
        if request.prompt == "harmony":
            raise AttributeError("harmony")
        if request.stream:
            return self._pieces()
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return CompletionResponse(id="1", created=1, model=request.model, choices=[], usage=usage)

    async def _pieces(self) -> AsyncIterator[str]:
        yield "data: 乙\n\n"
        yield "data: [DONE]\n\n"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    from vllm.entrypoints.openai.chat_completion.api_router import attach_router as attach_chat_router
    from vllm.entrypoints.openai.completion.api_router import attach_router

    made = FastAPI()
    attach_router(made)
    attach_chat_router(made)
    made.state.openai_serving_completion = Completions()
    made.add_exception_handler(ValueError, _said)
    return made


async def _said(request: Any, error: Exception) -> Any:
    return PlainTextResponse(f"the app says: {error}", 400)


def ask(app: Any, body: bytes, kind: str = "application/json") -> tuple[int, str, bytes]:
    async def post() -> tuple[int, str, bytes]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            said = await client.post("/v1/completions", content=body, headers={"content-type": kind})
            return said.status_code, said.headers["content-type"], said.content

    return asyncio.run(post())


def directly(app: FastAPI) -> Any:
    """An ASGI app that goes the short way, or fails."""
    direct = Direct(app)

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        found = direct(scope, (await receive())["body"])
        assert found is not None, "the long way"
        await found(scope, receive, send)

    return call


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"prompt": "wrong"}], ids=str)
def test_an_ordinary_request_is_answered_as_by_the_app_without_it(
    app: FastAPI, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({**BODY, **more}).encode()
    expected = ask(app, body)

    async def nobody(self: FastAPI, scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("not directly")

    monkeypatch.setattr(FastAPI, "__call__", nobody)
    assert ask(directly(app), body) == expected
    assert expected[0] == (400 if more.get("prompt") else 200)


def test_an_error_without_a_handler_is_raised(app: FastAPI) -> None:
    with pytest.raises(AttributeError, match="harmony"):
        ask(directly(app), json.dumps({**BODY, "prompt": "harmony"}).encode())


@pytest.mark.parametrize(
    ("body", "kind", "method"),
    [
        (b"{", "application/json", "POST"),
        (b"[" * 100_000, "application/json", "POST"),
        (json.dumps({**BODY, "max_tokens": "x"}).encode(), "application/json", "POST"),
        (json.dumps({**BODY, "prompt": None}).encode(), "application/json", "POST"),
        (json.dumps(BODY).encode(), "text/plain", "POST"),
        (json.dumps(BODY).encode(), "application/json", "GET"),
    ],
)
def test_what_is_no_ordinary_request_is_left_to_the_app(app: FastAPI, body: bytes, kind: str, method: str) -> None:
    scope = {"type": "http", "method": method, "path": PATHS[0], "headers": [(b"content-type", kind.encode())]}
    assert Direct(app)(scope, body) is None


def test_cancelling_it_ends_the_work(app: FastAPI) -> None:
    """vLLM's wrapper would let it go on."""

    async def cancel() -> None:
        completions = app.state.openai_serving_completion = Completions()
        messages = [{"type": "http.request", "body": json.dumps({**BODY, "prompt": "for ever"}).encode()}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": PATHS[0], "headers": headers, "query_string": b""}
        call = asyncio.ensure_future(directly(app)(scope, receive, _never))
        await asyncio.sleep(0.05)
        call.cancel()
        await asyncio.wait({call}, timeout=1)
        assert completions.ended.is_set()

    asyncio.run(cancel())


async def _never(message: Any) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize("why", ["routes", "middleware"])
def test_a_vllm_whose_app_does_more_is_asked_through_it(
    why: str, app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    class Authentication:
        """vLLM's, where VLLM_API_KEY is set."""

    routes = [] if why == "routes" else app.routes
    middleware = [SimpleNamespace(cls=Authentication)] if why == "middleware" else []
    direct = Direct(SimpleNamespace(routes=routes, user_middleware=middleware))
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": PATHS[0], "headers": headers}
    assert direct(scope, json.dumps(BODY).encode()) is None
    assert ("Authentication" if why == "middleware" else "not where they were") in caplog.text


def test_it_knows_the_routes_of_vllms_whole_app_without_the_middlewares_that_are_left_out() -> None:
    build_app, _, make_arg_parser, argument_parser = openai_app._entrypoints()
    app = build_app(make_arg_parser(argument_parser()).parse_args([]), ("generate",), None)
    assert Direct(app)._endpoints == {}  # one that counts requests and one for origins are around
    openai_app.leave_out_middlewares(app)
    assert set(Direct(app)._endpoints) == set(PATHS)


def test_vllms_app_runs_until_the_engine_is_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        events.append("begun")
        yield
        events.append("ended")
        raise RuntimeError("and failed")

    async def build(*arguments: Any) -> FastAPI:
        return FastAPI(lifespan=lifespan)

    async def run() -> None:
        monkeypatch.setattr(openai_app, "build", build)
        engine = object.__new__(Engine)
        engine._openai_app, engine.adapters, engine._running = None, None, AsyncExitStack()
        engine._llm = SimpleNamespace(shutdown=lambda: events.append("engine stopped"))
        engine._args, engine.served_model_name = None, "m"
        assert await engine.openai_app() is await engine.openai_app()
        with pytest.raises(RuntimeError, match="and failed"):
            await engine.shutdown()

    asyncio.run(run())
    assert events == ["begun", "ended", "engine stopped"]
