"""Tokens are counted for the request that asks, for streams and whole answers alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from paddock.usage import CURRENT, Usage, counted

closed: list[str] = []


async def generate(prompt: Any, params: Any, request_id: str, *, lora_request: Any = None) -> AsyncIterator[Any]:
    """Two tokens of each of two answers, one a time, for a prompt of three."""
    try:
        for _ in range(2):
            choices = [SimpleNamespace(token_ids=[1]), SimpleNamespace(token_ids=[2])]
            yield SimpleNamespace(prompt_token_ids=[7, 8, 9], outputs=choices)
    finally:
        closed.append(request_id)


def use(request_id: str = "a", *, lora: str | None = None, stop_early: bool = False, times: int = 1) -> Usage:
    async def ask() -> Usage:
        usage = Usage()
        CURRENT.set(usage)
        lora_request = None if lora is None else SimpleNamespace(lora_name=lora)
        for _ in range(times):
            outputs: Any = counted(generate, "base")([], None, request_id, lora_request=lora_request)
            async for _ in outputs:
                if stop_early:
                    await outputs.aclose()
                    break
        return usage

    return asyncio.run(ask())


def test_prompts_count_once_and_every_answers_tokens() -> None:
    usage = use()
    assert (usage.adapter, usage.model, usage.prompt_tokens, usage.completion_tokens) == (None, "base", 3, 4)
    assert usage.first_token_at is not None
    other = use(lora="one", times=2)
    assert (other.adapter, other.model, other.prompt_tokens, other.completion_tokens) == ("one", "one", 6, 8)
    assert use("x-beam-0", times=2).prompt_tokens == 3  # one prompt, asked for again at each step


def test_leaving_early_reaches_the_engine() -> None:
    closed.clear()
    assert use(stop_early=True).completion_tokens == 2
    assert closed == ["a"]


def test_nothing_is_counted_where_nobody_asks() -> None:
    assert CURRENT.get() is None
    stream = counted(generate, "base")([], None, "a")
    assert type(stream).__name__ == "async_generator"
