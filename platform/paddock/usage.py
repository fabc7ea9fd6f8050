"""How much of the engine a request has used, counted where tokens are made, for streams and whole answers alike.

Whoever answers a request puts a Usage into CURRENT; what the engine generates for it is added there, whichever
route it came by.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class Usage:
    """What one request has used so far."""

    model: str | None = None
    """The base or the adapter that answers, None where nothing was generated."""
    adapter: str | None = None
    """The adapter that answers, None where the base does."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_at: float | None = None
    """`time.monotonic()` when the first token was there."""


CURRENT: ContextVar[Usage | None] = ContextVar("usage", default=None)


def counted(generate: Callable[..., Any], model: str) -> Callable[..., AsyncIterator[Any]]:
    """vLLM's `generate`, adding what it generates to the Usage of the request that asks, where there is one."""

    def counting(
        prompt: Any, params: Any, request_id: str, *, lora_request: Any = None, **options: Any
    ) -> AsyncIterator[Any]:
        outputs: AsyncIterator[Any] = generate(prompt, params, request_id, lora_request=lora_request, **options)
        usage = CURRENT.get()
        if usage is None:
            return outputs
        usage.adapter = None if lora_request is None else lora_request.lora_name
        usage.model = usage.adapter or model
        # A beam search asks for each token of each beam anew.
        return _add(usage, outputs, prompt_counts="-beam-" not in request_id or not usage.prompt_tokens)

    return counting


async def _add(usage: Usage, outputs: Any, *, prompt_counts: bool) -> AsyncIterator[Any]:
    # Closed with this one, so that a client's leaving reaches the engine.
    async with aclosing(outputs):
        async for output in outputs:
            if prompt_counts and output.prompt_token_ids:
                usage.prompt_tokens += len(output.prompt_token_ids)
                prompt_counts = False
            made = sum(len(choice.token_ids) for choice in output.outputs)
            if made and usage.first_token_at is None:
                usage.first_token_at = time.monotonic()
            # Outputs are deltas, or one final answer: vLLM's app and ours ask for no other kind.
            usage.completion_tokens += made
            yield output
