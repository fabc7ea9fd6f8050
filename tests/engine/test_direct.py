"""vLLM's own route of completions, with an engine that says one thing, directly and through its app."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

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
        if request.stream:
            return self._pieces()
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return CompletionResponse(id="1", created=1, model=request.model, choices=[], usage=usage)

    async def _pieces(self) -> AsyncIterator[str]:
        yield "data: 乙\n\n"
        yield "data: [DONE]\n\n"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    from vllm.entrypoints.openai.completion.api_router import attach_router

    made = FastAPI()
    attach_router(made)
    made.state.openai_serving_completion = Completions()
    made.add_exception_handler(ValueError, _said)
    return made


async def _said(request: Any, error: Exception) -> Any:
    from starlette.responses import PlainTextResponse

    return PlainTextResponse(f"the app says: {error}", 400)


def ask(app: Any, body: bytes, kind: str = "application/json") -> tuple[int, str, bytes]:
    async def post() -> tuple[int, str, bytes]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            said = await client.post("/v1/completions", content=body, headers={"content-type": kind})
            return said.status_code, said.headers["content-type"], said.content

    return asyncio.run(post())


@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=str)
def test_an_ordinary_request_is_answered_as_by_the_app_without_it(
    app: FastAPI, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({**BODY, **more}).encode()
    direct = Direct(app)
    expected = ask(app, body)

    async def nobody(self: FastAPI, scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("not directly")

    monkeypatch.setattr(FastAPI, "__call__", nobody)
    assert ask(direct, body) == expected
    assert expected[0] == 200


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "application/json"),
        (b"[" * 100_000, "application/json"),
        (json.dumps({**BODY, "max_tokens": "x"}).encode(), "application/json"),
        (json.dumps({**BODY, "prompt": None}).encode(), "application/json"),
        (json.dumps(BODY).encode(), "text/plain"),
        (json.dumps({**BODY, "prompt": "wrong"}).encode(), "application/json"),
    ],
)
def test_what_goes_wrong_is_told_by_the_app(app: FastAPI, body: bytes, kind: str) -> None:
    expected = _outcome(app, body, kind)
    assert _outcome(Direct(app), body, kind) == expected
    assert expected[0] != 200


def _outcome(app: Any, body: bytes, kind: str) -> Any:
    try:
        return ask(app, body, kind)
    except Exception as error:  # FastAPI alone has no answer to it
        return type(error), str(error)


def test_cancelling_it_ends_the_work(app: FastAPI) -> None:
    """vLLM's wrapper would let it go on."""

    async def cancel() -> None:
        completions = app.state.openai_serving_completion = Completions()
        messages = [{"type": "http.request", "body": json.dumps({**BODY, "prompt": "for ever"}).encode()}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": PATHS[0], "headers": headers, "query_string": b""}
        call = asyncio.ensure_future(Direct(app)(scope, receive, _never))
        await asyncio.sleep(0.05)
        call.cancel()
        await asyncio.wait({call}, timeout=1)
        assert completions.ended.is_set()

    asyncio.run(cancel())


async def _never(message: Any) -> None:
    raise AssertionError(message)


def test_a_vllm_without_these_routes_is_asked_by_its_app() -> None:
    said = SimpleNamespace(routes=[])
    assert Direct(said)._endpoints == {}
