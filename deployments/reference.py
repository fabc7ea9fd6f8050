"""The PromptCBLUE reference endpoint: `POST /generate`.

    {"instruction": "", "input": "...", "parameters": {"max_tokens": 64}}
    -> {"generated_text": "...", "num_output_tokens_cf": 12, "error": ""}

`generated_text` is `prompts.answer` of what the model said, the text that a parser is given, so that an
answer over HTTP is the one that batch prediction scores. Token ids are built by `prompts.py` alone.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paddock import prompts
from paddock.engine import Generation, request_row
from paddock.errors import ServiceError


class GenerationEngine(Protocol):
    """What this endpoint asks of `paddock.engine.Engine`."""

    @property
    def tokenizer(self) -> Any: ...

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling: Mapping[str, Any], request_id: str
    ) -> Generation: ...


class _Strict(BaseModel):
    # The reference's own clients send whole numbers as floats and the other way round, but no texts.
    model_config = ConfigDict(extra="forbid")


class Parameters(_Strict):
    """What a request may say of sampling; what it leaves out is the service's default."""

    best_of: int | None = None
    use_beam_search: bool | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None

    def sampling(self) -> dict[str, Any]:
        """vLLM's parameters. Raises ValueError for what vLLM no longer does."""
        if self.best_of not in (None, 1):
            raise ValueError(f"parameters.best_of: only 1 is served, found {self.best_of}")
        if self.use_beam_search:
            raise ValueError("parameters.use_beam_search: beam search is not served")
        return self.model_dump(exclude_none=True, exclude={"best_of", "use_beam_search"})


class GenerateRequest(_Strict):
    """The body of `POST /generate`."""

    instruction: str = ""
    input: str = ""
    parameters: Parameters | None = Field(default_factory=Parameters)


async def generate(
    engine: GenerationEngine, template: prompts.Template, defaults: Mapping[str, Any], body: bytes
) -> JSONResponse:
    """Answer one request: 200, 400 where it can never be answered, 503 where it may be tried again."""
    try:
        request = GenerateRequest.model_validate_json(body)
        sampling = {**defaults, **(request.parameters or Parameters()).sampling()}
        row = request_row(template, request.instruction, request.input)
        ids = prompts.prompt_ids(engine.tokenizer, template, row)
        said = await engine.generate(ids, sampling, f"generate-{uuid.uuid4().hex}")
    except ValidationError as error:
        return _refused(400, "; ".join(_explain(e) for e in error.errors(include_url=False)))
    except ValueError as error:
        return _refused(400, str(error))
    except ServiceError as error:
        return _refused(503, str(error))
    text = prompts.answer(said.text)
    return JSONResponse({"generated_text": text, "num_output_tokens_cf": len(said.token_ids), "error": ""})


def _refused(status: int, message: str) -> JSONResponse:
    return JSONResponse({"generated_text": "", "num_output_tokens_cf": 0, "error": message}, status_code=status)


def _explain(error: Any) -> str:
    where = ".".join(str(step) for step in error["loc"]) or "the body"
    known = Parameters if error["loc"][:1] == ("parameters",) else GenerateRequest
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; known are {', '.join(known.model_fields)}"
    return f"{where}: {error['msg']}"
