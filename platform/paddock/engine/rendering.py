"""What a request says -> token ids, inside vLLM too: every text and chat goes through `prompts.py`.

Text never becomes a control token: vLLM's renderer, from which all of its OpenAI app gets its ids, is taken
over, so that a string prompt, a chat and `/tokenize` are encoded as training and batch are; a vLLM version
that does not let it is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from paddock import prompts
from paddock.data import Row
from paddock.errors import ServiceError

Result = TypeVar("Result")

_SHORT = 2048
"""Characters that are read within a millisecond."""
# One thread, as vLLM has: several wait for each other and for Python's lock, and so do the answers under way.
_TOKENIZER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")


async def read(characters: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """What `work` returns or raises, which reads a text of so many characters.

    A long one is read beside the event loop, which it would hold up. A short one is not: while the loop is busy,
    another thread waits for Python's lock for many times as long as the reading takes.
    """
    if characters <= _SHORT:
        return work(*arguments)
    return await asyncio.get_running_loop().run_in_executor(_TOKENIZER, work, *arguments)


def request_row(template: prompts.Template, instruction: str, text: str) -> Row:
    """The row that a request asks about. Raises ValueError where the template cannot hold it."""
    if instruction.strip() and not template.takes_instruction:
        raise ValueError("the served prompt template has no slot for an instruction; put it into the input")
    if not instruction.strip() and not text.strip():
        raise ValueError("the input is empty")
    _check_text(instruction + text)
    return Row(input=text, instruction=instruction)


def take_over_text(renderer: Any, template: prompts.Template) -> None:
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
        return await read(len(prompt["prompt"]), tokenize, prompt, params)

    def render(messages: Sequence[Mapping[str, Any]], params: Any) -> tuple[list[Any], dict[str, Any]]:
        try:
            if params.chat_template_kwargs.get("tools"):
                raise ValueError("tools: the served model was not trained with any")
            row = chat_row(template, messages)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from None
        ids = prompts.prompt_ids(renderer.get_tokenizer(), template, row)
        return [dict(message) for message in messages], {"prompt_token_ids": ids}

    async def render_async(messages: Sequence[Mapping[str, Any]], params: Any) -> tuple[list[Any], dict[str, Any]]:
        return await read(len(str(messages)), render, messages, params)

    renderer._tokenize_prompt, renderer._tokenize_prompt_async = tokenize, tokenize_async
    renderer.render_messages, renderer.render_messages_async = render, render_async

    probe = f"{template.text}<s>x</s>"
    (rendered,) = renderer.render_cmpl([{"prompt": probe}])
    if list(rendered["prompt_token_ids"]) != prompts.encode(renderer.get_tokenizer(), probe):
        raise ServiceError("this version of vLLM reads control tokens from a user's text, and would not let us stop it")


def name_all_ids(tokenizer: Any) -> None:
    """Give ids that the tokenizer does not know, rows that an embedding was padded with, the empty token for a name.

    vLLM (0.32) takes their None for a text where it names the likeliest tokens, and ends with it for all requests.
    """
    named = tokenizer.convert_ids_to_tokens

    def convert_ids_to_tokens(ids: Any, *arguments: Any, **options: Any) -> Any:
        found = named(ids, *arguments, **options)
        return [token or "" for token in found] if isinstance(found, list) else found

    tokenizer.convert_ids_to_tokens = convert_ids_to_tokens


def read_short_ones_at_once(renderer: Any) -> None:
    """Where all of a request is short, vLLM's methods that wait for nothing, for those that start tasks."""
    cmpl, chat = renderer.render_cmpl_async, renderer.render_chat_async

    async def render_cmpl(given: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        texts = [prompt.get("prompt") or "" for prompt in given if isinstance(prompt, Mapping)]
        short = len(texts) == len(given) and sum(map(len, texts)) <= _SHORT
        return renderer.render_cmpl(given, *arguments, **options) if short else await cmpl(given, *arguments, **options)

    async def render_chat(given: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        short = len(str(given)) <= _SHORT
        return renderer.render_chat(given, *arguments, **options) if short else await chat(given, *arguments, **options)

    renderer.render_cmpl_async, renderer.render_chat_async = render_cmpl, render_chat


def chat_row(template: prompts.Template, messages: Sequence[Mapping[str, Any]]) -> Row:
    """One turn of chat as the row that it was trained as. Raises ValueError for any other conversation."""
    if not all(isinstance(message, Mapping) for message in messages):  # vLLM reads other models' formats, too
        raise ValueError("messages: each is an object with a role and a content")
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
