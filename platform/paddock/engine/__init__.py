"""vLLM behind one door: engine, sampling, and (openai_app.py, rendering.py) vLLM's own OpenAI app over it.

vLLM is imported when something here is called, not with this module: it takes 5 s and 700 MB, and who only
checks a model directory or names a request's row needs none of it. No other module imports vLLM. adapters.py waits
likewise: transformers and PEFT take 3 s.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from paddock import manifest, prompts, storage
from paddock.config import SamplingPart, ServeConfig, nearest
from paddock.engine import openai_app
from paddock.engine.rendering import name_all_ids, read_short_ones_at_once, take_over_text
from paddock.errors import ConfigError, ModelError, ServiceError, UnknownAdapterError
from paddock.usage import counted

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
REPLICA = "PADDOCK_REPLICA"
"""The environment variable that has the process id of the replica, for worker.py."""
_BEAMS = 4  # as many as Hugging Face's examples take
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
        self.adapters: Any = None
        if config.adapters:
            from paddock.adapters import AdapterDirectory

            self.adapters, engine["enable_lora"] = AdapterDirectory(config.adapters, model), True
        engine.setdefault("worker_extension_cls", "paddock.engine.worker.WorkerExtension")
        os.environ[REPLICA] = str(os.getpid())
        if current_platform.is_cpu():
            for name, value in _CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            engine.setdefault("enforce_eager", True)
            if engine.get("tensor_parallel_size", 1) == 1:
                # Saves starting another process, which on two cores is a third of the time to start.
                engine.setdefault("distributed_executor_backend", "uni")
        if int(engine.get("tensor_parallel_size", 1)) * int(engine.get("pipeline_parallel_size", 1)) > 1:
            # In a placement group vLLM would start its workers as actors, which find no room in the replica's own.
            engine.setdefault("distributed_executor_backend", "mp")
        with _as_config_error():
            self._args = AsyncEngineArgs(model=str(model), served_model_name=self.served_model_name, **engine)
            # Without a context vLLM takes the sizes of a batch that a test would.
            batch = config.optimize_for == "throughput"
            vllm_config = self._args.create_engine_config(
                UsageContext.LLM_CLASS if batch else UsageContext.OPENAI_API_SERVER
            )
        try:
            self._llm = AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=self._args.disable_log_stats)
        except Exception as error:
            raise ServiceError(f"{config.model}: vLLM did not start: {_line(error)}; its log says why") from error
        take_over_text(self._llm.renderer, template)
        read_short_ones_at_once(self._llm.renderer)
        name_all_ids(self.tokenizer)
        self._llm.generate = counted(self._llm.generate, self.served_model_name)
        self._adapters: dict[str, Any] = {}
        self._loaded: set[str] = set()
        self._used: dict[str, None] = {}
        self._numbers = itertools.count(1)
        self._loading = asyncio.Lock()
        self._openai_app: Any = None
        self._running = AsyncExitStack()

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
        """Answer one prompt. `sampling` is what `sampling_params` returns, or a SamplingPart's plain values; beside
        vLLM's parameters it may have `best_of` (answers drawn, of which the likeliest is returned) and
        `use_beam_search` (`best_of` beams, or 4).

        `adapter` is the directory of a LoRA adapter, for an engine with `enable_lora`; `choices` are the only
        texts that may come out.

        Raises ValueError where the request can never succeed (its prompt is too long, its sampling wrong),
        ServiceError where another try, or another replica, may.
        """
        from vllm.exceptions import VLLMNotFoundError, VLLMUnprocessableEntityError, VLLMValidationError
        from vllm.sampling_params import StructuredOutputsParams

        # Newer ones are no longer ValueErrors.
        refusals = (ValueError, OverflowError, VLLMNotFoundError, VLLMUnprocessableEntityError, VLLMValidationError)
        values = dict(sampling)
        values = {**PRESETS.get(values.pop("preset", ""), {}), **values}
        beams, best_of = bool(values.pop("use_beam_search", False)), values.pop("best_of", None)
        params = _vllm_sampling(values)
        if best_of is not None and params.temperature > 0:  # greedy ones would all be the same
            params.n, params.logprobs = best_of, params.logprobs or 0
        if choices is not None:
            params.structured_outputs = StructuredOutputsParams(choice=list(choices))
        lora = None if adapter is None else await self._lora_request(adapter)
        final: Any = None
        try:
            renderer = self._llm.renderer
            (prompt,) = await renderer.render_cmpl_async([{"prompt_token_ids": list(prompt_token_ids)}])
            if beams:
                width = best_of or _BEAMS
                final = await openai_app.beam_search(self._openai_app, prompt, values, width, request_id, lora)
            else:
                async for output in self._llm.generate(prompt, params, request_id, lora_request=lora):
                    final = output
        except refusals as error:
            raise ValueError(_line(error)) from None
        except Exception as error:
            raise ServiceError(f"request {request_id}: {_line(error)}") from error
        if final is None or not final.finished:
            raise ServiceError(f"request {request_id}: the engine stopped before the answer was complete")
        # Beams come in the order of their merit, drawn answers in the order of drawing.
        answer = final.outputs[0] if beams else max(final.outputs, key=lambda said: said.cumulative_logprob or 0.0)
        return Generation(
            text=answer.text,
            token_ids=list(answer.token_ids),
            prompt_token_ids=list(final.prompt_token_ids),
            finish_reason=str(answer.finish_reason),
        )

    def held(self) -> list[str]:
        """The names of the adapters in memory: of those that were asked for, as many as vLLM keeps, the latest last."""
        config = self._llm.vllm_config.lora_config
        return [] if config is None else list(self._used)[-config.max_cpu_loras :]

    async def find_adapter(self, model: str | None) -> str | None:
        """The directory (for `generate`) of the adapter that a request's `model` names; None for the base.

        `NAME` or `base:NAME`, looked up anew and loaded where it is new. Raises UnknownAdapterError, or ModelError
        that says what is wrong with the adapter.
        """
        found = await self._find(model)
        return None if found is None else str(found.lora_path)

    async def _find(self, model: str | None) -> Any:
        if not model or model == self.served_model_name:
            return None
        name = model.removeprefix(f"{self.served_model_name}:")
        if self.adapters is None:
            raise UnknownAdapterError(f"the model {model[:100]!r} does not exist; {self.served_model_name!r} is served")
        directory = str(await asyncio.to_thread(self.adapters.open, name))
        request = await self._lora_request(directory, name)
        # One that vLLM has not yet taken must not reach its scheduler: failing to load there ends the engine.
        if directory not in self._loaded:
            async with self._loading:
                try:
                    if directory not in self._loaded:
                        await self._llm.add_lora(request)
                except Exception as error:
                    raise ModelError(f"adapter {name!r}: vLLM refuses it: {_line(error)}") from None
                self._loaded.add(directory)
        self._used.pop(name, None)
        self._used[name] = None
        return request

    async def _lora_request(self, adapter: str, name: str | None = None) -> Any:
        """vLLM's name for an adapter: a number of its own within this engine."""
        from vllm.lora.request import LoRARequest

        if not self._args.enable_lora:
            raise ValueError(f"{adapter}: this engine serves no adapters; start it with enable_lora")
        if adapter not in self._adapters:
            path = str(await asyncio.to_thread(storage.fetch, adapter))  # of a URI it may take long
            if adapter not in self._adapters:  # else another request was quicker
                number = next(self._numbers)
                self._adapters[adapter] = LoRARequest(lora_name=name or adapter, lora_int_id=number, lora_path=path)
        return self._adapters[adapter]

    async def openai_app(self) -> Any:
        """vLLM's own FastAPI app on this engine: `/v1/*`, `/tokenize`, `/health`, `/metrics` and more.

        All its routes are there, administrative ones too: who serves it chooses which to open. It runs as under
        `vllm serve`: with a line on its load now and then, and what was loaded so far kept from garbage collection.
        """
        if self._openai_app is None:
            self._openai_app = await openai_app.build(self._llm, self._args, self.served_model_name)
            if self.adapters is not None:
                openai_app.open_adapters(self._openai_app, self._find)
            await self._running.enter_async_context(self._openai_app.router.lifespan_context(self._openai_app))
        return self._openai_app

    async def check_health(self, timeout_s: float) -> None:
        """Raise ServiceError where the engine is dead, or has not answered within `timeout_s`.

        It answers between two steps: a step that takes longer counts as one that never ends.
        """
        try:
            await self._llm.check_health()
            await asyncio.wait_for(self._llm.is_sleeping(), timeout_s)
        except TimeoutError:
            raise ServiceError(f"the engine has been silent for {timeout_s:g} s") from None
        except Exception as error:
            raise ServiceError(f"the engine is dead: {_line(error)}") from error

    def is_dead(self) -> bool:
        return bool(self._llm.errored)

    def kill(self) -> None:
        """End the engine's processes at once, also those that hang."""
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()

    async def shutdown(self) -> None:
        """Stop the engine's processes."""
        try:
            await self._running.aclose()
        finally:
            self._llm.shutdown()
            if self.adapters is not None:
                self.adapters.close()


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
