"""The gate's way of a completion: at once to the engine, and given up with whoever waits for it."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.access import Gate
from deployments.keys import KeyRing
from deployments.llm import LLM
from paddock.config_parts import AccessPart


async def other(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError(scope["path"])


class Client:
    """The two ends of a connection to a gate, by which one request for a completion comes at once."""

    def __init__(self) -> None:
        self.left, self.sent = asyncio.Event(), list[Any]()
        self.messages = [{"type": "http.request", "body": b"{}"}]

    async def receive(self) -> Any:
        if not self.messages:
            await self.left.wait()
        return self.messages.pop() if self.messages else {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def ask(self, direct: ASGIApp, **part: Any) -> asyncio.Future[None]:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        gate = Gate(other, AccessPart(**part), KeyRing(), direct=lambda scope, body: direct)
        return asyncio.ensure_future(gate(scope, self.receive, self.send))


@pytest.mark.parametrize("says", [False, True], ids=["it ends", "it says something"])
@pytest.mark.parametrize("how", ["the client leaves", "it takes too long", "Serve cancels it"])
def test_a_completion_begins_at_once_and_ends_with_whoever_waits_for_it(how: str, says: bool) -> None:
    events: list[str] = []

    async def direct(scope: Scope, receive: Receive, send: Send) -> None:
        events.append("begun")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            events.append("ended")
            if not says:
                raise
            if how != "Serve cancels it":  # as vLLM does, which takes every cancellation for a client that has left
                await PlainTextResponse("Client disconnected", 400)(scope, receive, send)

    async def call() -> None:
        client = Client()
        asked = client.ask(direct, request_timeout_s=0.1 if how == "it takes too long" else 60)
        await asyncio.sleep(0)
        assert events == ["begun"]  # before any other request has had its turn
        await asyncio.sleep(0.02)
        if how == "the client leaves":
            client.left.set()
        if how == "Serve cancels it":
            asked.cancel()
        await asyncio.wait({asked}, timeout=2)
        assert asked.done()
        assert events == ["begun", "ended"]
        assert asked.cancelled() == (how == "Serve cancels it")
        status = {"the client leaves": [499], "it takes too long": [504], "Serve cancels it": []}[how]
        assert [message["status"] for message in client.sent if "status" in message] == status

    asyncio.run(call())


def test_a_completion_that_is_complete_is_not_told_to_have_failed_when_its_client_leaves() -> None:
    async def direct(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"all"})
        await asyncio.sleep(30)

    async def call() -> None:
        client = Client()
        asked = client.ask(direct)
        await asyncio.sleep(0.02)
        client.left.set()
        await asyncio.wait({asked}, timeout=2)
        assert asked.done()
        assert not asked.cancelled()
        assert [message.get("status", message.get("body")) for message in client.sent] == [200, b"all"]

    asyncio.run(call())


def test_a_replica_takes_completions_the_short_way() -> None:
    from vllm.entrypoints.openai.chat_completion.api_router import attach_router as attach_chat_router
    from vllm.entrypoints.openai.completion.api_router import attach_router

    app = FastAPI()
    attach_router(app)
    attach_chat_router(app)
    config = SimpleNamespace(access=AccessPart())
    replica = SimpleNamespace(config=config, keys=KeyRing(), limits=None, openai_app=app, leave_if_dead=lambda: None)
    gate = LLM.func_or_class.gate(replica, other)  # type: ignore[union-attr]
    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    prompt, chat = {"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}
    for path, body in (("/v1/completions", prompt), ("/v1/chat/completions", chat)):
        assert gate._direct({**scope, "path": path}, json.dumps({"model": "m", **body}).encode()) is not None
    assert gate._direct({**scope, "path": "/tokenize"}, b"{}") is None
