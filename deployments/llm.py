"""The Serve deployment: one vLLM engine a replica, our routes before vLLM's own OpenAI app.

    HTTP     POST /generate, GET /is_ready            the reference endpoint (reference.py)
             GET /v1/models                           what can be asked for (models.py)
             GET /openapi.json                        all of these routes (openapi.py)
             /v1/completions, ... (FORWARDED)         vLLM's app, handed the request as it came
             all of them behind keys and limits       access.py
    handle   generate(prompt_token_ids, sampling, request_id, ...), describe()

A route of vLLM that is not listed here is closed, its administrative ones among them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

import paddock
from deployments import models, openapi, reference
from deployments.access import Gate, logger
from deployments.held import Held
from deployments.keys import ApiKey, KeyRing
from deployments.metrics import RayExport
from paddock import manifest
from paddock.config import ServeConfig
from paddock.engine import Engine, sampling_params
from paddock.engine.direct import Direct
from paddock.errors import ServiceError
from paddock.ingress.answers import error_response
from paddock.prompts import Template

FORWARDED = {
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/health": "GET",
    "/version": "GET",
    "/metrics": "GET",
}
"""What vLLM's app answers. The gate hands it over, which spares each request a second pass through FastAPI."""

http = FastAPI(title="Paddock", version=paddock.__version__, docs_url=None, redoc_url=None, openapi_url=None)


async def _forwarded() -> None:
    """Not called: the routes are here for the OpenAPI document, and for a 405 to other methods."""


for _path, _method in FORWARDED.items():
    http.add_api_route(_path, _forwarded, methods=[_method])


@http.exception_handler(HTTPException)
async def as_openai_error(request: Request, error: HTTPException) -> JSONResponse:
    """What a client of the OpenAI API expects of a path or method that is not there."""
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return error_response("", error.status_code, message, error.headers)


class Access:
    """Puts the replica's gate around its routes: Serve makes the app before the replica, and its config, are there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.gate: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.gate is None:
            self.gate = serve.get_replica_context().servable_object.gate(self.app)
        await self.gate(scope, receive, send)


http.add_middleware(Access)


class SharedLimits:
    """`limits.Limits` as the gate asks it."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def admit(self, key: ApiKey) -> float:
        """Where nobody counts, callers are let in: a limit protects the service, and queues are bounded anyway."""
        try:
            return float(await asyncio.wait_for(self._handle.admit.remote(key), timeout=5))
        except Exception as error:
            logger.error("the limits of key %r were not asked: %s", key.name, error)
            return 0.0

    def spend(self, key: ApiKey, tokens: int) -> None:
        self._handle.spend.remote(key, tokens)


@serve.deployment(name="LLM")
@serve.ingress(http)
class LLM:
    """One replica: an engine, its HTTP routes and its handle."""

    async def __init__(  # type: ignore[misc]
        self,
        config: ServeConfig,
        template: Template,
        keys: Sequence[ApiKey] = (),
        limits: DeploymentHandle | None = None,
    ) -> None:
        """keys: those of the environment. limits: of `limits.Limits`, where keys are asked for."""
        # Of a request over HTTP the request log says more than Serve's line does.
        logger.addFilter(lambda record: not getattr(record, "serve_access_log", False))
        self.config = config
        self.template = template
        self.keys = KeyRing(keys, config.access.keys)
        self.limits = None if limits is None else SharedLimits(limits)
        self.sampling = sampling_params(config.sampling)
        if config.access.admin_routes:
            os.environ.setdefault("VLLM_SERVER_DEV_MODE", "1")  # else vLLM has them not
        self.engine = Engine(config, template)
        self.openai_app = await self.engine.openai_app()
        self.model_hash: str | None = None
        self.openapi: dict[str, Any] | None = None
        self.telling = [asyncio.ensure_future(RayExport().run())]
        if config.adapters:
            self.telling.append(asyncio.ensure_future(Held(self.engine.held).run()))

    def gate(self, app: ASGIApp) -> Gate:
        access, direct = self.config.access, Direct(self.openai_app)
        return Gate(app, access, self.keys, self.limits, self.openai_app, FORWARDED, direct, self.leave_if_dead)

    @http.post("/generate")
    async def generate_http(self, request: Request) -> Response:
        request_id = f"generate-{request.headers['x-request-id']}"
        return await reference.generate(self.engine, self.template, self.sampling, await request.body(), request_id)

    @http.get("/is_ready")
    async def is_ready(self) -> bool:
        try:
            await self.engine.check_health(self.config.health_check_timeout_s)
        except ServiceError:
            return False
        return True

    @http.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        cards = await asyncio.to_thread(lambda: list(models.cards(self.engine, self.config.model)))
        return {"object": "list", "data": cards}

    @http.get("/openapi.json", include_in_schema=False)
    async def openapi_document(self, request: Request) -> dict[str, Any]:
        if self.openapi is None:
            theirs = await asyncio.to_thread(self.openai_app.openapi)
            self.openapi = openapi.document(request.app.openapi(), theirs)
        return {**self.openapi, "servers": [{"url": request.scope.get("root_path", "") or "/"}]}

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
            "arguments": self.config.model_dump(mode="json"),
            "served_model_name": self.engine.served_model_name,
            "max_model_len": self.engine.max_model_len,
            "dtype": self.engine.dtype,
            "prompt": self.template.text,
        }

    async def check_health(self) -> None:
        """Serve asks every few seconds, and replaces a replica whose process has ended.

        That is quicker than telling it so, which it would have to be told three times, while a dead engine refuses
        requests faster than others answer them and so gets most of them. Those that it had are asked again elsewhere.
        """
        try:
            await self.engine.check_health(self.config.health_check_timeout_s)
        except ServiceError as error:
            logger.error("this replica ends: %s", error)
            self.engine.kill()
            os._exit(1)

    def leave_if_dead(self) -> None:
        """End this replica before it passes on what a dead engine says."""
        if self.engine.is_dead():
            logger.error("this replica ends: the engine is dead")
            self.engine.kill()
            os._exit(1)

    async def __del__(self) -> None:
        for task in getattr(self, "telling", ()):
            task.cancel()
        if hasattr(self, "engine"):
            # Not in a thread: vLLM's own task would see its engine die, and log that as an error.
            await self.engine.shutdown()
