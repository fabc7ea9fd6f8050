"""The gate around an app, without Serve: who gets in, how much, how long, and what is written down."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from deployments.access import Gate
from deployments.keys import ApiKey, KeyRing, digest_of
from deployments.limits import Buckets
from paddock.config import ServeConfig, load
from paddock.config_parts import AccessPart
from paddock.ingress import tries
from paddock.ingress.answers import ADAPTER
from paddock.ingress.proxy import Proxied
from paddock.usage import CURRENT

PATHS = ("/v1/completions", "/v1/completions/", "/v1/models", "/load")
ALICE = ApiKey(name="alice", sha256=digest_of("sk-alice"))
ROOT = ApiKey(name="root", sha256=digest_of("sk-root"), admin=True)
SECRET = "患者李某，乙肝"
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with its body, as if 7 + 5 tokens had been generated for it."""
    body = (await receive())["body"]
    usage = CURRENT.get()
    assert usage is not None
    usage.model, usage.prompt_tokens, usage.completion_tokens = "base", 7, 5
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})


class LocalLimits:
    """The buckets, in this process."""

    def __init__(self, buckets: Buckets) -> None:
        self.buckets = buckets

    async def admit(self, key: ApiKey) -> float:
        return self.buckets.admit(key)

    def spend(self, key: ApiKey, tokens: int) -> None:
        self.buckets.spend(key, tokens)


def ask(gate: App, path: str = "/v1/completions", *, key: str | None = None, **options: Any) -> httpx.Response:
    headers = {**options.pop("headers", {}), **({"authorization": f"Bearer {key}"} if key else {})}
    method = options.pop("method", "POST")

    async def call() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://test") as client:
            return await client.request(method, path, headers=headers, **options)

    return asyncio.run(call())


def gate_of(*keys: ApiKey, app: App = echo, limits: Any = None, **part: Any) -> Gate:
    return Gate(app, AccessPart(**part), KeyRing(keys), limits, vllm_app=echo)


def test_without_keys_all_may_call_and_with_keys_only_who_has_one() -> None:
    assert ask(gate_of()).status_code == 200
    gate = gate_of(ALICE, ROOT)
    assert ask(gate, key="sk-alice").status_code == 200
    for headers in (
        {},
        {"authorization": "sk-alice"},
        {"authorization": "Basic sk-alice"},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {ALICE.sha256}"},
        {"authorization": b"Bearer \xff\xfe\x80"},
        {"authorization": "Bearer " + "x" * 100_000},
    ):
        response = ask(gate, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "AuthenticationError"
        assert response.headers["www-authenticate"] == "Bearer"
    assert ask(gate, "/generate").json() == {
        "generated_text": "",
        "num_output_tokens_cf": 0,
        "error": "a valid API key is needed: Authorization: Bearer KEY",
    }
    for path in ("/health", "/is_ready"):
        assert ask(gate, path, method="GET").status_code == 200


def test_administrative_routes_are_an_admins() -> None:
    gate = gate_of(ALICE, ROOT, admin_routes=("/load",))
    assert ask(gate, "/load").status_code == 401
    assert ask(gate, "/load", key="sk-alice").status_code == 403
    assert ask(gate, "/load", key="sk-root").status_code == 200


def test_a_body_over_the_limit_is_a_413_however_it_is_sent() -> None:
    async def pieces() -> Any:
        for _ in range(3):
            yield b"x" * 50

    gate = gate_of(max_body_bytes=100)
    assert ask(gate, content=b"x" * 100).text == "x" * 100
    for content in (b"x" * 101, pieces()):
        response = ask(gate, content=content)
        assert response.status_code == 413
        assert "larger than 100 bytes" in response.json()["error"]["message"]
    for length in (b"99999999999999999999999", b"-1", b"\xb2", b"1e9"):
        assert ask(gate, content=b"x", headers={"content-length": length}).status_code in (200, 413)


def test_limits_are_429_with_the_time_to_wait() -> None:
    now = [0.0]
    limits = LocalLimits(Buckets(lambda: now[0]))
    twice = ALICE.model_copy(update={"requests_per_minute": 2})
    gate = gate_of(twice, ROOT, limits=limits)
    assert [ask(gate, key="sk-alice").status_code for _ in range(3)] == [200, 200, 429]
    response = ask(gate, key="sk-alice")
    assert response.headers["retry-after"] == "30"
    assert response.json()["error"]["type"] == "RateLimitError"
    assert ask(gate, key="sk-root").status_code == 200  # another's limit
    now[0] = 31.0
    assert [ask(gate, key="sk-alice").status_code for _ in range(2)] == [200, 429]


def test_a_request_whose_replica_died_is_charged_once() -> None:
    """The first of its replicas let it in; only the one that answers knows its tokens."""
    limits = LocalLimits(Buckets(lambda: 0.0))
    once = ALICE.model_copy(update={"requests_per_minute": 1, "tokens_per_minute": 100})
    died: list[int] = []

    async def dying(scope: Scope, receive: Receive, send: Send) -> None:
        """A replica: what goes wrong in one has no end in its gate."""
        if not died:
            died.append(scope[tries.SCOPE])
            await limits.admit(once)
        else:
            await gate_of(once, limits=limits)(scope, receive, send)

    assert ask(Proxied(dying), key="sk-alice").status_code == 200
    assert died == [1]
    assert limits.buckets._level(once, "tokens") == 100 - 12
    # A client cannot say so itself.
    for name in (tries.SCOPE, tries.HEADER):
        said = ask(Proxied(gate_of(once, limits=limits)), key="sk-alice", headers={name: "2"})
        assert said.status_code == 429


def test_only_forwarded_paths_by_their_methods_go_straight_to_vllm_and_only_with_a_key() -> None:
    def says(name: str) -> App:
        return PlainTextResponse(name)

    gate = Gate(says("ours"), AccessPart(), KeyRing([ALICE]), None, says("vLLM's"), {"/v1/completions": "POST"})
    asked = {(m, p): ask(gate, p, key="sk-alice", method=m).text for m in ("GET", "POST") for p in PATHS}
    assert {request for request, by in asked.items() if by == "vLLM's"} == {("POST", "/v1/completions")}
    assert ask(gate, "/v1/completions").status_code == 401


def test_tokens_over_the_limit_are_made_up_for() -> None:
    now = [0.0]
    few = ALICE.model_copy(update={"tokens_per_minute": 20})
    gate = gate_of(few, limits=LocalLimits(Buckets(lambda: now[0])))
    assert [ask(gate, key="sk-alice").status_code for _ in range(3)] == [200, 200, 429]  # 20 - 12 - 12 = -4
    assert ask(gate, key="sk-alice").headers["retry-after"] == "15"
    now[0] = 15.0
    assert ask(gate, key="sk-alice").status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_takes_too_long_ends_and_the_app_hears_of_it(streamed: bool) -> None:
    heard: list[Any] = []

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if streamed:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        heard.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})  # what vLLM says to nobody

    response = ask(gate_of(app=slow, request_timeout_s=0.2), timeout=5)
    assert heard == [{"type": "http.disconnect"}]
    assert response.status_code == (200 if streamed else 504)
    last = response.text.removeprefix("data: 1\n\ndata: ")
    assert "no complete answer within 0.2 s" in json.loads(last)["error"]["message"]


def test_a_bug_of_ours_is_a_500_that_names_the_request_and_nothing_else() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError(SECRET)

    response = ask(gate_of(app=broken))
    assert response.status_code == 500
    assert SECRET not in response.text


def test_no_origin_may_call_but_those_that_are_listed() -> None:
    here, there = {"origin": "https://here.example"}, {"origin": "https://there.example"}
    assert "access-control-allow-origin" not in ask(gate_of(), headers=here).headers
    gate = gate_of(ALICE, allowed_origins=("https://here.example",))
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = ask(gate, method="OPTIONS", headers={**here, **asking})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://here.example"
    assert ask(gate, headers=here).headers["access-control-allow-origin"] == "https://here.example"
    assert "access-control-allow-origin" not in ask(gate, key="sk-alice", headers=there).headers


def test_the_log_has_who_and_how_much_but_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    log = tmp_path / "requests.jsonl"
    gate = gate_of(ALICE, request_log=str(log))
    ask(gate, key="sk-alice", content=SECRET.encode(), headers={"x-request-id": "visit 12\t"})
    ask(gate, f"/{'x' * 1000}", content=SECRET.encode())
    first, second = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    assert first["key"] == "alice"
    assert first["id"].startswith("visit12-")
    assert (first["model"], first["prompt_tokens"], first["completion_tokens"]) == ("base", 7, 5)
    assert first["seconds"] >= 0
    assert (second["status"], second["key"], len(second["path"])) == (401, None, 100)
    for told in (log.read_text(encoding="utf-8"), caplog.text):
        assert SECRET not in told
        assert "sk-alice" not in told


def test_the_engine_is_given_the_id_that_is_logged(tmp_path: Path) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(value.decode() for name, value in scope["headers"] if name == b"x-request-id")
        await echo(scope, receive, send)

    gate = gate_of(app=app, request_log=str(tmp_path / "log"))
    for _ in range(2):
        ask(gate, headers={"x-request-id": "same"})
    assert [json.loads(line)["id"] for line in (tmp_path / "log").read_text().splitlines()] == seen
    assert len(set(seen)) == 2


def test_the_part_is_read_from_a_command_line() -> None:
    origins = "access.allowed_origins=https://a.example,https://b.example"
    config = load(ServeConfig, None, ["model=/m", origins, "access.max_body_bytes=10"])
    assert config.access.allowed_origins == ("https://a.example", "https://b.example")
    assert config.access.max_body_bytes == 10


def test_nothing_is_sent_before_there_is_something_to_say() -> None:
    """Until then another replica can still answer."""
    events: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        events.append("headers are ready")
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: 2\n\n"})

    async def call() -> None:
        async def receive() -> Any:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b""} if not events else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            events.append(message["type"])

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await Gate(app, AccessPart(), KeyRing(), before_answer=lambda: events.append("before"))(scope, receive, send)

    asyncio.run(call())
    body = "http.response.body"
    assert events == ["headers are ready", "before", "http.response.start", body, body]


@pytest.mark.parametrize(("status", "adapter", "said"), [(200, "a b", "a%20b"), (200, None, None), (400, "a", None)])
def test_an_answer_says_which_adapter_gave_it(status: int, adapter: str | None, said: str | None) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        usage = CURRENT.get()
        assert usage is not None
        usage.adapter = adapter
        await PlainTextResponse("x", status)(scope, receive, send)

    assert ask(gate_of(app=app)).headers.get(ADAPTER) == said


def test_a_failure_before_the_first_word_is_no_200() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError(SECRET)

    said = ask(gate_of(app=app))
    assert said.status_code == 500
    assert SECRET not in said.text


def test_an_app_is_ended_though_its_call_is_cancelled_twice() -> None:
    """As Serve does where HAProxy asks replicas directly."""
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append("cancelled")

    async def call() -> None:
        messages = [{"type": "http.request", "body": b""}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            raise AssertionError(message)

        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
        asked = asyncio.ensure_future(Gate(app, AccessPart(), KeyRing())(scope, receive, send))
        for _ in range(2):
            await asyncio.sleep(0.05)
            asked.cancel()
        await asyncio.sleep(1)
        assert asked.cancelled()
        assert ended == ["cancelled"]  # before the loop ends, which cancels all

    asyncio.run(call())
