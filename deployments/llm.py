"""The Serve deployment: one vLLM engine a replica, our routes before vLLM's own OpenAI app.

    HTTP     POST /generate, GET /is_ready            the reference endpoint (reference.py)
             /v1/models, /v1/completions, ...         vLLM's app, handed the request as it came
    handle   generate(prompt_token_ids, sampling, request_id, ...), describe()

A route of vLLM that is not listed here is closed, its administrative ones among them.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments import reference
from paddock import manifest
from paddock.config import ServeConfig
from paddock.engine import Engine, sampling_params
from paddock.prompts import Template

http = FastAPI(title="Paddock", docs_url=None, redoc_url=None)


@http.exception_handler(HTTPException)
async def as_openai_error(request: Request, error: HTTPException) -> JSONResponse:
    """What a client of the OpenAI API expects of a path or method that is not there."""
    kind = "NotFoundError" if error.status_code == 404 else "BadRequestError"
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = {"message": message, "type": kind, "param": None, "code": error.status_code}
    return JSONResponse({"error": body}, status_code=error.status_code, headers=error.headers)


class Forward(Response):
    """A response that another ASGI app gives, streaming included."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


@serve.deployment(name="LLM")
@serve.ingress(http)
class LLM:
    """One replica: an engine, its HTTP routes and its handle."""

    async def __init__(self, config: ServeConfig, template: Template) -> None:  # type: ignore[misc]
        self.config = config
        self.template = template
        self.sampling = sampling_params(config.sampling)
        self.engine = Engine(config, template)
        self.openai_app = await self.engine.openai_app()
        self.model_hash: str | None = None

    @http.post("/generate")
    async def generate_http(self, request: Request) -> Response:
        return await reference.generate(self.engine, self.template, self.sampling, await request.body())

    @http.get("/is_ready")
    async def is_ready(self) -> bool:
        try:
            await self.engine.check_health()
        except Exception:
            return False
        return True

    @http.get("/v1/models")
    @http.post("/v1/completions")
    @http.post("/v1/chat/completions")
    @http.post("/tokenize")
    @http.post("/detokenize")
    @http.get("/health")
    @http.get("/version")
    @http.get("/metrics")
    async def openai(self) -> Response:
        return Forward(self.openai_app)

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: dict[str, Any],
        request_id: str,
        adapter: str | None = None,
        choices: list[str] | None = None,
    ) -> dict[str, Any]:
        """`Engine.generate` by handle: `text` (raw), `token_ids`, `prompt_token_ids`, `finish_reason`."""
        said = await self.engine.generate(prompt_token_ids, sampling, request_id, adapter=adapter, choices=choices)
        return asdict(said)

    async def describe(self) -> dict[str, Any]:
        """What is served, so that a caller can tell whether it is what they mean."""
        if self.model_hash is None:  # Of a directory without a manifest every byte is read, once.
            self.model_hash = await asyncio.to_thread(manifest.fingerprint, self.config.model)
        return {
            "model": self.config.model,
            "model_hash": self.model_hash,
            "engine": self.config.engine,
            "served_model_name": self.engine.served_model_name,
            "max_model_len": self.engine.max_model_len,
            "dtype": self.engine.dtype,
            "prompt": self.template.text,
        }

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        await self.engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "engine"):
            # Not in a thread: vLLM's own task would see its engine die, and log that as an error.
            self.engine.shutdown()
