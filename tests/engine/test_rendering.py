"""Requests as ids, in and out of vLLM."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from paddock import prompts
from paddock.engine import rendering
from paddock.errors import ServiceError

TEMPLATE = prompts.load_template("promptcblue")
ALPACA = prompts.load_template("alpaca")


def test_an_instruction_needs_a_slot_and_a_request_some_text() -> None:
    assert rendering.request_row(ALPACA, "译", "发热").instruction == "译"
    with pytest.raises(ValueError, match="no slot for an instruction"):
        rendering.request_row(TEMPLATE, "译", "发热")
    with pytest.raises(ValueError, match="empty"):
        rendering.request_row(TEMPLATE, " ", "\n")
    with pytest.raises(ValueError, match="surrogate"):
        rendering.request_row(TEMPLATE, "", "\ud800")


def test_a_chat_of_one_turn_is_the_row_that_it_was_trained_as() -> None:
    user = {"role": "user", "content": [{"type": "text", "text": "发"}, {"type": "text", "text": "热"}]}
    assert rendering.chat_row(TEMPLATE, [user]).input == "发热"
    row = rendering.chat_row(ALPACA, [{"role": "system", "content": "译"}, user])
    assert (row.instruction, row.input) == ("译", "发热")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": None}],
    ],
)
def test_any_other_conversation_is_refused(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="messages: "):
        rendering.chat_row(TEMPLATE, messages)


def test_a_vllm_that_would_read_control_tokens_from_text_is_refused(assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "base")

    class Renderer(SimpleNamespace):
        """A later vLLM's, which no longer calls what we replace."""

        def render_cmpl(self, given: list[dict[str, str]]) -> list[dict[str, list[int]]]:
            return [{"prompt_token_ids": tokenizer(p["prompt"])["input_ids"]} for p in given]

    with pytest.raises(ServiceError, match="control tokens"):
        rendering.take_over_text(Renderer(get_tokenizer=lambda: tokenizer), TEMPLATE)


def test_long_texts_are_read_by_one_thread_beside_the_event_loop_and_short_ones_at_once() -> None:
    async def threads(characters: int) -> set[int]:
        return set(await asyncio.gather(*(rendering.read(characters, threading.get_ident) for _ in range(8))))

    found = asyncio.run(threads(100_000))
    assert len(found) == 1
    assert threading.get_ident() not in found
    assert asyncio.run(threads(100)) == {threading.get_ident()}


def test_a_short_request_waits_for_nothing_and_a_long_one_does() -> None:
    def renderer() -> SimpleNamespace:
        def at_once(given: Any, *arguments: Any, **options: Any) -> str:
            return "at once"

        async def beside(given: Any, *arguments: Any, **options: Any) -> str:
            return "beside"

        names = ("render_cmpl", "render_chat")
        return SimpleNamespace(**dict.fromkeys(names, at_once), **{f"{name}_async": beside for name in names})

    made = renderer()
    rendering.read_short_ones_at_once(made)
    for render, short, long in (
        (made.render_cmpl_async, [{"prompt": "x"}], [{"prompt": "x" * 1500}] * 2),
        (made.render_cmpl_async, [{"prompt_token_ids": [1] * 5000}], [b"embedded"]),
        (made.render_chat_async, [[{"role": "user", "content": "x"}]], [[{"role": "user", "content": "x" * 3000}]]),
    ):
        assert asyncio.run(render(short)) == "at once"
        assert asyncio.run(render(long)) == "beside"


def test_an_id_without_a_token_has_an_empty_name_among_the_likeliest(assets: Path) -> None:
    from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

    tokenizer = AutoTokenizer.from_pretrained(assets / "base")
    padding = len(tokenizer) + 3
    rendering.name_all_ids(tokenizer)
    assert convert_ids_list_to_tokens(tokenizer, [padding, 1]) == ["", "<s>"]
    assert tokenizer.convert_ids_to_tokens([padding, 1]) == ["", "<s>"]
    assert tokenizer.convert_ids_to_tokens(1) == "<s>"
