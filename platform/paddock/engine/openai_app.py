"""vLLM's own OpenAI app on our engine, with adapters found by name, and its beam search.

A part of `paddock.engine`, which alone uses it and is the one place that knows vLLM.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from fastapi.responses import JSONResponse

from paddock.errors import ModelError, ServiceError, UnknownAdapterError

# What vLLM's beam search knows of sampling.
_BEAM_SEARCH = {"max_tokens", "ignore_eos", "include_stop_str_in_output"}
# What each request, and each piece of a stream, would pass: origins are the gate's business, and Serve counts requests.
_LEFT_OUT = ("CORSMiddleware", "PrometheusInstrumentatorMiddleware")


async def build(llm: Any, engine_args: Any, served_model_name: str) -> Any:
    """The FastAPI app of an AsyncLLM: `/v1/*`, `/tokenize`, `/health`, `/metrics` and more.

    Environment variables of vLLM that are set later are not looked at.
    """
    from vllm import envs

    build_app, init_app_state, make_arg_parser, argument_parser = _entrypoints()
    defaults = vars(make_arg_parser(argument_parser()).parse_args([]))
    args = Namespace(**{**defaults, **vars(engine_args)})
    args.served_model_name = [served_model_name]
    args.allowed_origins = []  # vLLM's default lets every web site call
    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    app.add_exception_handler(AttributeError, _answer_harmony)
    await init_app_state(llm, app.state, args, tasks)
    app.state.server = SimpleNamespace()  # what vLLM tells to stop where the engine is dead
    leave_out_middlewares(app)
    envs.enable_envs_cache()  # it looks them up for each batch of tokens
    return app


def leave_out_middlewares(app: Any) -> None:
    """Take out what the gate and Serve do already, before the app's first request."""
    app.user_middleware = [m for m in app.user_middleware if getattr(m.cls, "__name__", "") not in _LEFT_OUT]


async def _answer_harmony(request: Any, error: Exception) -> JSONResponse:
    """400 for messages in OpenAI's Harmony format: vLLM reads them, and then takes them for dictionaries.

    Raises whatever else it is given.
    """
    if not str(error).startswith("'Message' object has no attribute"):
        raise error
    message = "messages: each is an object with a role and a content"
    body = {"message": message, "type": "BadRequestError", "param": "messages", "code": 400}
    return JSONResponse({"error": body}, status_code=400)


def open_adapters(app: Any, find: Callable[[str | None], Awaitable[Any]]) -> None:
    """Let every route ask `find` which adapter a request's `model` names: a LoRARequest, None for the base.

    `find` raises UnknownAdapterError, or ModelError for an adapter that cannot be served. vLLM's own way
    would never look at an adapter again and never say what is wrong with one.
    """
    models = app.state.openai_serving_models

    async def check_model(request: Any) -> Any:
        try:
            found = await find(request.model)
        except ModelError as error:
            models.lora_requests.pop(request.model, None)
            unknown = isinstance(error, UnknownAdapterError)
            return app.state.openai_serving_completion.create_error_response(
                message=str(error),
                err_type="NotFoundError" if unknown else "BadRequestError",
                status_code=HTTPStatus.NOT_FOUND if unknown else HTTPStatus.BAD_REQUEST,
                param="model",
            )
        if found is not None:
            models.lora_requests[request.model] = found
        return None

    for name in ("openai_serving_completion", "openai_serving_chat", "serving_tokenization"):
        serving: Any = getattr(app.state, name, None) or getattr(app.state, f"openai_{name}", None)
        if not hasattr(serving, "_check_model") or not hasattr(serving, "_maybe_get_adapters"):
            raise ServiceError("this version of vLLM looks up adapters in another way; serve without adapters")
        serving._check_model = check_model
        # It would answer a chat whose parts are of type `text` by an adapter that is called so.
        serving._get_active_default_mm_loras = lambda request: None


async def beam_search(app: Any, prompt: Any, values: Mapping[str, Any], width: int, request_id: str, lora: Any) -> Any:
    """vLLM's beam search: a RequestOutput, best beam first.

    Raises ValueError for sampling that it does not know, unless it says nothing (`top_p` 1).
    """
    from vllm.sampling_params import BeamSearchParams, SamplingParams

    neutral = SamplingParams()
    nothing = [("top_k", -1), ("temperature", 0.0)]
    for name, value in values.items():
        if name not in _BEAM_SEARCH and value not in (getattr(neutral, name), None) and (name, value) not in nothing:
            raise ValueError(f"{name}: vLLM's beam search knows no such parameter; leave it out")
    beams = {name: value for name, value in values.items() if name in _BEAM_SEARCH}
    params = BeamSearchParams(beam_width=width, temperature=0.0, **beams)
    final = None
    search = app.state.openai_serving_completion.beam_search(prompt, request_id, params, lora_request=lora)
    async for output in search:
        final = output
    return final


def _entrypoints() -> tuple[Any, Any, Any, Any]:
    """build_app, init_app_state, make_arg_parser and the parser's class, wherever this vLLM has them."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.30
        from vllm.entrypoints.openai.api_server import build_app, init_app_state
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    return build_app, init_app_state, make_arg_parser, FlexibleArgumentParser
