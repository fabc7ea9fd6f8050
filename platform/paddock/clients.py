"""Who answers a row: a Serve handle, an HTTP endpoint, or an engine in this very process.

Each client has one coroutine, `ask`. What it raises says what to do: ValueError, the row can never be answered;
BusyError, ask again later; a PaddockError, nobody will be answered; anything else, this try failed.

What a client needs is imported with it: tokenizers and engines take seconds, and an endpoint needs neither.
"""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import aiohttp
from ray import serve
from ray.serve.exceptions import BackPressureError

from paddock import prompts
from paddock.config import ServeConfig
from paddock.data import Row
from paddock.errors import ConfigError, ServiceError

_PROBE_TIMEOUT_S = 30
# The endpoint's own defaults are others, and count where a request does not say.
_NO_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True)
class Question:
    """What is asked about one row."""

    row: Row
    sampling: Mapping[str, Any]
    """vLLM's SamplingParams as plain values."""
    adapter: str | None = None
    """The directory of the adapter that answers, or None for the model alone."""
    choices: Sequence[str] | None = None
    """The only texts that may be answered, or None for any."""


@dataclass(frozen=True)
class Answer:
    """What was said to it."""

    text: str
    finish_reason: str
    """`stop` or `length`; empty where an endpoint does not tell."""
    prompt_tokens: int
    completion_tokens: int


class BusyError(Exception):
    """There is no room for the request now."""


class Client(Protocol):
    async def ask(self, question: Question, request_id: str) -> Answer: ...


class HandleClient:
    """Asks a Serve application by its handle, with token ids."""

    def __init__(self, app_name: str, model: str, template: prompts.Template) -> None:
        from paddock.lora import load_tokenizer

        self.handle = serve.get_app_handle(app_name)
        self.tokenizer = load_tokenizer(model)
        self.template = template

    async def ask(self, question: Question, request_id: str) -> Answer:
        ids = prompts.prompt_ids(self.tokenizer, self.template, question.row)
        request = self.handle.generate.remote(
            ids, dict(question.sampling), request_id, question.adapter, question.choices
        )
        try:
            return _answer(await request)
        except BackPressureError as error:
            raise BusyError(str(error)) from None
        except asyncio.CancelledError:
            request.cancel()  # the caller's patience ended: the replica need not go on
            raise


class LocalClient:
    """Holds an engine itself; it starts with the first question."""

    def __init__(self, config: ServeConfig, template: prompts.Template) -> None:
        self.config, self.template = config, template
        self.engine: Any = None
        self.starting: asyncio.Lock | None = None

    async def start(self) -> None:
        """Load the model, in the loop that the engine then belongs to."""
        from paddock.engine import Engine

        self.starting = self.starting or asyncio.Lock()
        async with self.starting:
            self.engine = self.engine or Engine(self.config, self.template)

    async def ask(self, question: Question, request_id: str) -> Answer:
        assert self.engine is not None
        ids = prompts.prompt_ids(self.engine.tokenizer, self.template, question.row)
        try:
            said = await self.engine.generate(
                ids, question.sampling, request_id, adapter=question.adapter, choices=question.choices
            )
        except ServiceError as error:
            raise RuntimeError(str(error)) from None  # one request's; the next may be answered
        return _answer(vars(said))


def _answer(said: Mapping[str, Any]) -> Answer:
    return Answer(said["text"], said["finish_reason"], len(said["prompt_token_ids"]), len(said["token_ids"]))


@dataclass(frozen=True)
class Endpoint:
    """Where and how an HTTP service is asked."""

    url: str
    kind: Literal["completions", "chat", "generate"]
    model: str
    """The name that a request gives; empty for `generate`."""


class HttpClient:
    """Asks an endpoint. An `OPENAI_API_KEY` of the environment is sent along."""

    def __init__(self, endpoint: Endpoint, template: prompts.Template) -> None:
        self.endpoint, self.template = endpoint, template
        self.session: aiohttp.ClientSession | None = None

    async def ask(self, question: Question, request_id: str) -> Answer:
        if self.session is None:
            # The caller limits the number of requests and the time that each may take.
            self.session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), headers=_headers()
            )
        body = self._body(question)
        async with self.session.post(self.endpoint.url, json=body, headers={"X-Request-Id": request_id}) as response:
            text = await response.text()
            if response.status != 200:
                raise _refusal(self.endpoint, response.status, text)
        try:
            said = self._read(json.loads(text))
        except (ValueError, KeyError, IndexError, TypeError):
            raise ServiceError(
                f"target_url: {self.endpoint.url}: said {text[:100]!r}, which is no answer of a"
                f" {self.endpoint.kind} endpoint; check the URL"
            ) from None
        # Texts are generated ones here, and become answers where all rows are there.
        return replace(said, text=prompts.unanswer(said.text)) if prompts.ANSWERED in response.headers else said

    def _body(self, question: Question) -> dict[str, Any]:
        row, sampling = question.row, {**_NO_PENALTIES, **question.sampling}
        if self.endpoint.kind == "generate":
            return {"instruction": row.instruction, "input": row.input, "parameters": sampling}
        body = {"model": self.endpoint.model, **sampling}
        if question.choices is not None:
            body["structured_outputs"] = {"choice": list(question.choices)}
        if self.endpoint.kind == "completions":
            return {**body, "prompt": self.template.render(row)}
        system = [{"role": "system", "content": row.instruction}] if row.instruction.strip() else []
        return {**body, "messages": [*system, {"role": "user", "content": row.input}]}

    def _read(self, said: dict[str, Any]) -> Answer:
        if self.endpoint.kind == "generate":
            return Answer(str(said["generated_text"]), "", 0, int(said.get("num_output_tokens_cf") or 0))
        (choice, *_), usage = said["choices"], said.get("usage") or {}
        text = choice["text"] if self.endpoint.kind == "completions" else choice["message"]["content"] or ""
        counts = (int(usage.get(f"{part}_tokens") or 0) for part in ("prompt", "completion"))
        return Answer(str(text), str(choice.get("finish_reason") or ""), *counts)


def find_endpoint(target_url: str, model: str | None = None) -> Endpoint:
    """What answers at a URL: `.../generate`, `.../v1[/completions|/chat/completions]`, or a host that has either.

    `model` is the name to ask for where it serves several. Raises ConfigError for what is no URL and ServiceError
    where nobody answers.
    """
    if urlsplit(target_url).scheme not in ("http", "https") or not urlsplit(target_url).netloc:
        raise ConfigError(f"target_url: {target_url!r} is no URL; give one such as http://127.0.0.1:8000")
    url = target_url.rstrip("/")
    if url.endswith("/generate"):
        _get(url)
        return Endpoint(url, "generate", "")
    base = url.removesuffix("/chat/completions").removesuffix("/completions")
    if base == url and not url.endswith("/v1"):
        base = f"{url}/v1"
    status, said = _get(f"{base}/models")
    if status == 404 and base == f"{url}/v1":
        return Endpoint(f"{url}/generate", "generate", "")
    try:
        names = [str(entry["id"]) for entry in json.loads(said)["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    if status != 200 or not (model or names):
        raise ServiceError(f"target_url: {base}/models: answered {status} {said[:100]!r}; check URL and OPENAI_API_KEY")
    if model is not None and names and model not in names:
        raise ServiceError(f"target_url: {base} serves {', '.join(names)}, no {model!r}; check serve.served_model_name")
    kind: Literal["completions", "chat"] = "chat" if url.endswith("/chat/completions") else "completions"
    path = "chat/completions" if kind == "chat" else "completions"
    return Endpoint(f"{base}/{path}", kind, model or names[0])


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=_headers()), timeout=_PROBE_TIMEOUT_S
        ) as response:
            return response.status, response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        raise ServiceError(f"target_url: {url}: nobody answers ({error}); start the service or check the URL") from None


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _refusal(endpoint: Endpoint, status: int, text: str) -> Exception:
    told = f"{endpoint.url}: {status}: {' '.join(_message(text).split())[:300]}"
    if status in (400, 413, 422):
        return ValueError(told)
    if status in (401, 403, 404, 405):
        return ServiceError(f"target_url: {told}; check URL, OPENAI_API_KEY and serve.served_model_name")
    return BusyError(told) if status in (429, 503) else RuntimeError(told)


def _message(text: str) -> str:
    """What an error body says: OpenAI's, FastAPI's or the reference's, or the body itself."""
    try:
        body = json.loads(text)
        error = body.get("error") or body.get("message") or body.get("detail") or text
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return text
