"""vLLM behind one door: engine, sampling, and vLLM's own OpenAI app. No other module imports vLLM.

vLLM is imported when something here is called, not with this module: it takes 5 s and 700 MB, and who only
checks a model directory or names a request's row needs none of it.

Text never becomes a control token: `Engine` takes over vLLM's way from text to ids, so that a string prompt,
a chat and `/tokenize` go through `prompts.py` like training and batch do, and refuses to start where a vLLM
version does not let it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paddock import manifest, prompts, storage
from paddock.config import SamplingPart, ServeConfig, nearest
from paddock.data import Row
from paddock.errors import ConfigError, ModelError, ServiceError

logger = logging.getLogger(__name__)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0, "max_tokens": 512},
    "reference": {
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": 512,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.2,
        "temperature": 1e-6,
    },
}
# Below this every vLLM means greedy; a newer one raises it to 0.01 first, which draws at near-ties.
_GREEDY_TEMPERATURE = 1e-5
# What is set by the configuration's own keys, or by Engine itself.
_OWN_ARGUMENTS = {"model": "model", "served_model_name": "served_model_name", "tokenizer": "model"}
# Read when vLLM or huggingface_hub is imported; models come from directories only.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several processes share the cores
    # Needed for one worker inside the engine's process: binding threads is what it rules out, and we do not.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@dataclass(frozen=True)
class Generation:
    """What the model said to one prompt."""

    text: str
    """The generated text, special tokens left out."""
    token_ids: list[int]
    """Its ids, EOS included where the model stopped by itself."""
    prompt_token_ids: list[int]
    """The ids that the model was given."""
    finish_reason: str
    """`stop` or `length`."""


def check_model(path: str | Path) -> None:
    """Raise ModelError where there is no model to serve, OutputError where one of ours is damaged."""
    if not storage.exists(path):
        raise ModelError(f"model: {path}: no such directory; give a Hugging Face model directory as model=DIR")
    if not storage.exists(storage.join(path, "config.json")):
        raise ModelError(f"model: {path}: no config.json, so not a Hugging Face model directory")
    if manifest.read(path) is None:
        logger.info("%s: has no manifest, taken as it is", path)
    else:
        manifest.check(path, "model")


def check_engine_args(engine: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that vLLM's engine arguments do not have, with the nearest one."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [field.name for field in fields(AsyncEngineArgs) if field.name not in _OWN_ARGUMENTS]
    for key in engine:
        if key in _OWN_ARGUMENTS:
            raise ConfigError(f"serve.engine.{key}: is set by the key {_OWN_ARGUMENTS[key]!r}")
        if key not in known:
            raise ConfigError(f"serve.engine.{key}: vLLM has no such engine argument{nearest(key, known)}")


def sampling_params(part: SamplingPart) -> dict[str, Any]:
    """A preset with what overrides it, as plain values for `Engine.generate`.

    Raises ConfigError for a key or value that vLLM's SamplingParams does not take.
    """
    values = preset(part)
    try:
        _vllm_sampling(values)
    except ValueError as error:
        raise ConfigError(f"sampling: {error}") from None
    return values


def preset(part: SamplingPart) -> dict[str, Any]:
    """A preset with what overrides it, as it is given: for an endpoint whose vLLM, if it is one, is another."""
    return {**PRESETS[part.preset], **(part.model_extra or {})}


def request_row(template: prompts.Template, instruction: str, text: str) -> Row:
    """The row that a request asks about. Raises ValueError where the template cannot hold it."""
    if instruction.strip() and not template.takes_instruction:
        raise ValueError("the served prompt template has no slot for an instruction; put it into the input")
    if not instruction.strip() and not text.strip():
        raise ValueError("the input is empty")
    _check_text(instruction + text)
    return Row(input=text, instruction=instruction)


class Engine:
    """One vLLM engine: a model in the memory of this process and of those that it starts.

    It belongs to the event loop that is running when it is made. Raises ConfigError, ModelError or
    OutputError for what is wrong before anything is loaded, ServiceError where vLLM does not come up.
    """

    def __init__(self, config: ServeConfig, template: prompts.Template) -> None:
        check_model(config.model)
        model = storage.fetch(config.model)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        check_engine_args(config.engine)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        self.served_model_name = config.served_model_name or Path(config.model).name
        engine = dict(config.engine)
        if current_platform.is_cpu():
            for name, value in _CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            engine.setdefault("enforce_eager", True)
            if engine.get("tensor_parallel_size", 1) == 1:
                # Saves starting another process, which on two cores is a third of the time to start.
                engine.setdefault("distributed_executor_backend", "uni")
        with _as_config_error():
            self._args = AsyncEngineArgs(model=str(model), served_model_name=self.served_model_name, **engine)
            # Without it vLLM takes the sizes of a batch that a test would, not those of `vllm serve`.
            vllm_config = self._args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        try:
            self._llm = AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=self._args.disable_log_stats)
        except Exception as error:
            raise ServiceError(f"{config.model}: vLLM did not start: {_line(error)}; its log says why") from error
        _take_over_text(self._llm.renderer, template)
        self._adapters: dict[str, int] = {}

    @property
    def tokenizer(self) -> Any:
        return self._llm.renderer.get_tokenizer()

    @property
    def max_model_len(self) -> int:
        """The most tokens that prompt and answer have together."""
        return int(self._llm.model_config.max_model_len)

    @property
    def dtype(self) -> str:
        """What the model computes in, such as `float32`."""
        return str(self._llm.model_config.dtype).removeprefix("torch.")

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: Mapping[str, Any],
        request_id: str,
        *,
        adapter: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> Generation:
        """Answer one prompt. `sampling` is what `sampling_params` returns, or a SamplingPart's plain values.

        `adapter` is the directory of a LoRA adapter, for an engine with `enable_lora`; `choices` are the only
        texts that may come out.

        Raises ValueError where the request can never succeed (its prompt is too long, its sampling wrong),
        ServiceError where another try, or another replica, may.
        """
        from vllm.exceptions import VLLMNotFoundError, VLLMUnprocessableEntityError, VLLMValidationError
        from vllm.sampling_params import StructuredOutputsParams

        # Newer ones are no longer ValueErrors.
        refusals = (ValueError, VLLMNotFoundError, VLLMUnprocessableEntityError, VLLMValidationError)
        values = dict(sampling)
        values = {**PRESETS.get(values.pop("preset", ""), {}), **values}
        params = _vllm_sampling(values)
        if choices is not None:
            params.structured_outputs = StructuredOutputsParams(choice=list(choices))
        lora = self._lora_request(adapter) if adapter is not None else None
        final: Any = None
        try:
            renderer = self._llm.renderer
            (prompt,) = await renderer.render_cmpl_async([{"prompt_token_ids": list(prompt_token_ids)}])
            async for output in self._llm.generate(prompt, params, request_id, lora_request=lora):
                final = output
        except refusals as error:
            raise ValueError(_line(error)) from None
        except Exception as error:
            raise ServiceError(f"request {request_id}: {_line(error)}") from error
        if final is None or not final.finished:
            raise ServiceError(f"request {request_id}: the engine stopped before the answer was complete")
        answer = final.outputs[0]
        return Generation(
            text=answer.text,
            token_ids=list(answer.token_ids),
            prompt_token_ids=list(final.prompt_token_ids),
            finish_reason=str(answer.finish_reason),
        )

    def _lora_request(self, adapter: str) -> Any:
        """vLLM's name for an adapter: a number of its own within this engine."""
        from vllm.lora.request import LoRARequest

        if not self._args.enable_lora:
            raise ValueError(f"{adapter}: this engine serves no adapters; start it with enable_lora")
        number = self._adapters.setdefault(adapter, len(self._adapters) + 1)
        return LoRARequest(lora_name=adapter, lora_int_id=number, lora_path=str(storage.fetch(adapter)))

    async def openai_app(self) -> Any:
        """vLLM's own FastAPI app on this engine: `/v1/*`, `/tokenize`, `/health`, `/metrics` and more.

        All its routes are there, administrative ones too: who serves it chooses which to open.
        """
        build_app, init_app_state, make_arg_parser, argument_parser = _entrypoints()
        defaults = vars(make_arg_parser(argument_parser()).parse_args([]))
        args = Namespace(**{**defaults, **vars(self._args)})
        args.served_model_name = [self.served_model_name]
        args.allowed_origins = []  # vLLM's default lets every web site call
        tasks = await self._llm.get_supported_tasks()
        app = build_app(args, tasks, self._llm.model_config)
        await init_app_state(self._llm, app.state, args, tasks)
        return app

    async def check_health(self) -> None:
        """Raise ServiceError where the engine is dead."""
        try:
            await self._llm.check_health()
        except Exception as error:
            raise ServiceError(f"the engine is dead: {_line(error)}") from error

    def shutdown(self) -> None:
        """Stop the engine's processes."""
        self._llm.shutdown()


def _vllm_sampling(values: Mapping[str, Any]) -> Any:
    """Plain values as vLLM's SamplingParams. Raises ValueError for a key or value that it does not take."""
    import msgspec
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    own = ("output_kind", "skip_clone", "output_text_buffer_length", "n", "detokenize")
    known = [name for name in SamplingParams.__struct_fields__ if not name.startswith("_") and name not in own]
    for key in values:
        if key not in known:
            raise ValueError(f"{key}: vLLM has no such sampling parameter{nearest(key, known)}")
    values = dict(values)
    temperature = values.get("temperature")
    if isinstance(temperature, float) and 0 < temperature < _GREEDY_TEMPERATURE:
        values["temperature"] = 0.0
    try:
        # The constructor alone does not look at types.
        params = msgspec.convert(values, SamplingParams)
    except (msgspec.MsgspecError, VLLMValidationError, ValueError, TypeError) as error:
        raise ValueError(_line(error)) from None
    params.output_kind = RequestOutputKind.FINAL_ONLY
    return params


def _take_over_text(renderer: Any, template: prompts.Template) -> None:
    """Let vLLM's renderer turn text and messages into ids by `prompts.py`. Raises ServiceError where it cannot.

    Everything of vLLM's app that reads text goes through these four methods.
    """
    from vllm.exceptions import VLLMValidationError

    def tokenize(prompt: Mapping[str, Any], params: Any) -> dict[str, Any]:
        try:
            _check_text(prompt["prompt"])
        except ValueError as error:
            raise VLLMValidationError(str(error)) from None
        ids = prompts.encode(renderer.get_tokenizer(), prompt["prompt"])
        return {**prompt, "prompt_token_ids": ids if params.add_special_tokens else ids[1:]}

    async def tokenize_async(prompt: Mapping[str, Any], params: Any) -> dict[str, Any]:
        return await asyncio.to_thread(tokenize, prompt, params)

    def render(messages: Sequence[Mapping[str, Any]], params: Any) -> tuple[list[Any], dict[str, Any]]:
        try:
            if params.chat_template_kwargs.get("tools"):
                raise ValueError("tools: the served model was not trained with any")
            row = _chat_row(template, messages)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from None
        ids = prompts.prompt_ids(renderer.get_tokenizer(), template, row)
        return [dict(message) for message in messages], {"prompt_token_ids": ids}

    async def render_async(messages: Sequence[Mapping[str, Any]], params: Any) -> tuple[list[Any], dict[str, Any]]:
        return await asyncio.to_thread(render, messages, params)

    renderer._tokenize_prompt, renderer._tokenize_prompt_async = tokenize, tokenize_async
    renderer.render_messages, renderer.render_messages_async = render, render_async

    probe = f"{template.text}<s>x</s>"
    (rendered,) = renderer.render_cmpl([{"prompt": probe}])
    if list(rendered["prompt_token_ids"]) != prompts.encode(renderer.get_tokenizer(), probe):
        raise ServiceError("this version of vLLM reads control tokens from a user's text, and would not let us stop it")


def _chat_row(template: prompts.Template, messages: Sequence[Mapping[str, Any]]) -> Row:
    """One turn of chat as the row that it was trained as. Raises ValueError for any other conversation."""
    roles = [str(message.get("role")) for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(f"messages: one turn is served, a user's, after a system's or none; found {', '.join(roles)}")
    system, user = (["", *(_message_text(message) for message in messages)])[-2:]
    return request_row(template, system, user)


def _message_text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in content or [] if isinstance(part, Mapping) and part.get("type") == "text"]
    if not content or len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
        raise ValueError("messages: content is a text, or a list of parts of type text")
    return "".join(map(str, texts))


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text has half a surrogate pair, which no tokenizer can read") from None


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


@contextmanager
def _as_config_error() -> Iterator[None]:
    """vLLM checks the values of its own arguments, and the model's config with them."""
    try:
        yield
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise ConfigError(f"serve.engine, or the model's config.json: {_line(error)}") from None


def _line(error: BaseException) -> str:
    said = "; ".join(e["msg"] for e in error.errors()) if isinstance(error, ValidationError) else str(error)
    return " ".join(said.split())[:500] or type(error).__name__
