"""A row by handle, by `/v1/completions` and by `/generate`: the same ids in, the same answer out, whatever it holds."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from deployments import reference
from paddock import clients, lora, prompts
from paddock.clients import Client, Endpoint, HandleClient, HttpClient, Question
from paddock.data import Row
from paddock.engine import Generation
from paddock.engine.rendering import take_over_text

SPACES = ["\n", "\n\n", " ", "  ", "\t", "\r\n", "\r", "\u3000", "\u2028", "\x85", "\ufeff"]
PIECES = [
    "答：",
    "问：",
    "答:",
    "甲",
    "</s>",
    "<s>",
    "{input}",
    "{instruction}",
    "\x00",
    "😀",
    "e\u0301",
    '\\n"',
    *SPACES,
]
TEMPLATES = [
    *(prompts.load_template(name) for name in ("promptcblue", "alpaca")),
    prompts.Template("{input}\n答：{input}\n"),
]


def nasty(seed: int, number: int) -> list[str]:
    """Texts, each with something in it that is no space, as every row has."""
    choose = random.Random(seed)
    texts = ["甲\n\n", "\n\n甲", " 甲 ", "答：\n甲\n答：\n\n", "甲答：\n\n乙", "答：答：", "答答：：", "\n答：\n"]
    while len(texts) < number:
        text = "".join(choose.choices(PIECES, k=choose.randint(1, 7)))
        texts += [text] if text.strip() else []
    return texts


class Engine:
    """Says what it is told to, and keeps the ids that it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.says, self.given = tokenizer, "", list[list[int]]()

    async def find_adapter(self, model: str | None) -> None:
        return None

    async def generate(self, ids: Sequence[int], *_: Any, **more: Any) -> Generation:
        self.given.append(list(ids))
        return Generation(text=self.says, token_ids=[5], prompt_token_ids=list(ids), finish_reason="stop")

    def handle(self) -> Any:
        async def remote(*asked: Any) -> dict[str, Any]:
            return asdict(await self.generate(*asked))

        return SimpleNamespace(generate=SimpleNamespace(remote=remote))

    def app(self, template: prompts.Template) -> web.Application:
        """The service's two routes, with vLLM's renderer as we leave it and no engine behind it."""

        class Renderer(SimpleNamespace):
            def render_cmpl(self, given: list[dict[str, str]]) -> list[dict[str, Any]]:
                return [self._tokenize_prompt(text, SimpleNamespace(add_special_tokens=True)) for text in given]

        renderer = Renderer(get_tokenizer=lambda: self.tokenizer)
        take_over_text(renderer, template)

        async def completions(request: web.Request) -> web.Response:
            (prompt,) = renderer.render_cmpl([{"prompt": (await request.json())["prompt"]}])
            said = await self.generate(prompt["prompt_token_ids"])
            return web.json_response({"choices": [{"text": said.text, "finish_reason": "stop"}]})

        async def generate(request: web.Request) -> web.Response:
            said = await reference.generate(self, template, {}, await request.read(), "id")
            return web.Response(body=bytes(said.body), status=said.status_code, headers=dict(said.headers))

        app = web.Application()
        app.router.add_post("/v1/completions", completions)
        app.router.add_post("/generate", generate)
        return app


@asynccontextmanager
async def listening(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.mark.parametrize("template", TEMPLATES, ids=["promptcblue", "alpaca", "cue in the middle"])
def test_every_route_gives_the_model_the_same_ids_and_the_parser_the_same_text(
    template: prompts.Template, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(lora.load_tokenizer(base_model))
    monkeypatch.setattr(clients.serve, "get_app_handle", lambda name: engine.handle())

    async def compare() -> None:
        async with listening(engine.app(template)) as host:
            by_http = [
                HttpClient(Endpoint(f"{host}/v1/completions", "completions", "m"), template),
                HttpClient(Endpoint(f"{host}/generate", "generate", ""), template),
            ]
            ways: list[Client] = [HandleClient("any", str(base_model), template), *by_http]
            for text, engine.says in zip(nasty(1, 120), nasty(2, 120), strict=True):
                row = Row(input=text, instruction="译" * template.takes_instruction)
                engine.given.clear()
                answers = [prompts.answer((await way.ask(Question(row, {}), "id")).text) for way in ways]
                assert engine.given == [prompts.prompt_ids(engine.tokenizer, template, row)] * 3, repr(text)
                assert answers == [prompts.answer(engine.says)] * 3, repr(engine.says)

    asyncio.run(compare())


def test_another_services_text_is_taken_as_generated() -> None:
    """It does not say that it has cut anything off, and the reference's own does not cut."""

    async def generate(request: web.Request) -> web.Response:
        return web.json_response({"generated_text": " 甲\n"})

    async def ask() -> clients.Answer:
        app = web.Application()
        app.router.add_post("/generate", generate)
        async with listening(app) as host:
            client = HttpClient(Endpoint(f"{host}/generate", "generate", ""), TEMPLATES[0])
            return await client.ask(Question(Row(input="x"), {}), "id")

    assert asyncio.run(ask()).text == " 甲\n"


def test_an_answer_can_be_made_one_again() -> None:
    for text in ["", " ", "\n", "甲", " 甲\n", "  甲\n\n", *nasty(3, 200)]:
        assert prompts.answer(prompts.unanswer(text)) == text
