"""The PromptCBLUE reference endpoint: `POST /generate`.

    {"instruction": "", "input": "...", "parameters": {"max_tokens": 64}, "model": "ADAPTER"}
    -> {"generated_text": "...", "num_output_tokens_cf": 12, "error": ""}

`generated_text` is `prompts.answer` of what the model said, the text that a parser is given, so that an
answer over HTTP is the one that batch prediction scores; a header, `prompts.ANSWERED`, says so to clients that ask
other services, which may not do it. Token ids are built by `prompts.py` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paddock import prompts
from paddock.engine import Generation
from paddock.engine.rendering import read, request_row
from paddock.errors import ModelError, ServiceError, UnknownAdapterError


class GenerationEngine(Protocol):
    """What this endpoint asks of `paddock.engine.Engine`."""

    @property
    def tokenizer(self) -> Any: ...

    async def find_adapter(self, model: str | None) -> str | None: ...

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: Mapping[str, Any],
        request_id: str,
        *,
        adapter: str | None = None,
    ) -> Generation: ...


class _Strict(BaseModel):
    # The reference's own clients send whole numbers as floats and the other way round, but no texts.
    model_config = ConfigDict(extra="forbid")


# What the engine can hold.
Count = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Parameters(_Strict):
    """What a request may say of sampling; what it leaves out is the service's default."""

    best_of: int | None = Field(default=None, ge=1, le=20)
    """Answers that are drawn, of which the likeliest is returned; with `use_beam_search` the number of beams."""
    use_beam_search: bool | None = None
    """vLLM's beam search. It knows neither penalties nor `top_p`, `top_k`, `stop`, `seed`, ...: a value of theirs that
    is not the service's default is refused."""
    top_p: float | None = None
    top_k: Count | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None

    def sampling(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """`Engine.generate`'s sampling: what the request says over the service's defaults."""
        said = self.model_dump(exclude_none=True)
        if not self.use_beam_search:
            return {**defaults, **said}
        # The defaults are for drawing; repeated in a request they are no wish for what beam search cannot do.
        wished = {key: value for key, value in said.items() if value != defaults.get(key)}
        return {"max_tokens": defaults["max_tokens"], "temperature": 0.0, **wished}


class GenerateRequest(_Strict):
    """The body of `POST /generate`."""

    instruction: str = ""
    input: str = ""
    parameters: Parameters | None = Field(default_factory=Parameters)
    model: str | None = None
    """An adapter's name; null is the base."""


async def generate(
    engine: GenerationEngine, template: prompts.Template, defaults: Mapping[str, Any], body: bytes, request_id: str
) -> JSONResponse:
    """Answer one request: 200, 400 where it can never be answered, 404 for a model that is not there, 503 where it
    may be tried again."""
    try:
        request = GenerateRequest.model_validate_json(body)
        sampling = (request.parameters or Parameters()).sampling(defaults)
        row = request_row(template, request.instruction, request.input)
        ids = await read(len(body), prompts.prompt_ids, engine.tokenizer, template, row)
        adapter = await engine.find_adapter(request.model)
        said = await engine.generate(ids, sampling, request_id, adapter=adapter)
    except ValidationError as error:
        return _refused(400, "; ".join(_explain(e) for e in error.errors(include_url=False)))
    except UnknownAdapterError as error:
        return _refused(404, str(error))
    except (ValueError, ModelError) as error:
        return _refused(400, str(error))
    except ServiceError as error:
        return _refused(503, str(error))
    text = prompts.answer(said.text)
    body = {"generated_text": text, "num_output_tokens_cf": len(said.token_ids), "error": ""}
    return JSONResponse(body, headers={prompts.ANSWERED: "1"})


def _refused(status: int, message: str) -> JSONResponse:
    return JSONResponse({"generated_text": "", "num_output_tokens_cf": 0, "error": message}, status_code=status)


def _explain(error: Any) -> str:
    where = ".".join(str(step) for step in error["loc"]) or "the body"
    known = Parameters if error["loc"][:1] == ("parameters",) else GenerateRequest
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; known are {', '.join(known.model_fields)}"
    return f"{where}: {error['msg']}"
