"""`POST /generate` against an engine that writes down what it is asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from deployments import reference
from paddock import prompts
from paddock.config import SamplingPart
from paddock.data import Row
from paddock.engine import Generation, sampling_params
from paddock.errors import ServiceError, UnknownAdapterError

TEMPLATE = prompts.load_template("promptcblue")
DEFAULTS = sampling_params(SamplingPart(preset="reference"))


class Recorder:
    """Says the same to everyone and keeps the requests."""

    def __init__(self, tokenizer: Any, text: str = " 是的\n", error: Exception | None = None) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.error = error
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    async def find_adapter(self, model: str | None) -> str | None:
        if model == "nope":
            raise UnknownAdapterError("there is no adapter 'nope'")
        return model

    async def generate(
        self, prompt_token_ids: list[int], sampling: Mapping[str, Any], request_id: str, *, adapter: str | None
    ) -> Generation:
        assert request_id == "generate-7"
        self.adapter = adapter
        if self.error is not None:
            raise self.error
        self.asked.append((prompt_token_ids, dict(sampling)))
        return Generation(self.text, [5, 6, 2], prompt_token_ids, "stop")


@pytest.fixture(scope="module")
def tokenizer(assets: Path) -> Any:
    return AutoTokenizer.from_pretrained(assets / "base")


def post(
    recorder: Recorder, body: Any, template: prompts.Template = TEMPLATE, *, raw: bool = False
) -> tuple[int, dict[str, Any]]:
    content = body if raw else json.dumps(body).encode()
    response = asyncio.run(reference.generate(recorder, template, DEFAULTS, content, "generate-7"))
    return response.status_code, json.loads(bytes(response.body))


@pytest.mark.parametrize("text", ["患者发热三天，咳嗽。\n答：", "甲</s>乙<s>丙", " <unk> "])
def test_the_engine_is_given_the_ids_of_prompts(tokenizer: Any, text: str) -> None:
    recorder = Recorder(tokenizer)
    status, _ = post(recorder, {"input": text})
    assert status == 200
    ids, _ = recorder.asked[0]
    assert ids == prompts.prompt_ids(tokenizer, TEMPLATE, Row(input=text))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_the_answer_is_what_is_scored(tokenizer: Any) -> None:
    _, body = post(Recorder(tokenizer), {"input": "x"})
    assert body == {"generated_text": "是的", "num_output_tokens_cf": 3, "error": ""}


@pytest.mark.parametrize("body", [{"input": "x"}, {"input": "x", "parameters": {}}, {"input": "x", "parameters": None}])
def test_no_parameters_means_the_defaults(tokenizer: Any, body: dict[str, Any]) -> None:
    recorder = Recorder(tokenizer)
    assert post(recorder, body)[0] == 200
    assert recorder.asked[0][1] == DEFAULTS


def test_parameters_win_over_the_defaults(tokenizer: Any) -> None:
    recorder = Recorder(tokenizer)
    said = {"max_tokens": 8, "temperature": 0.0, "stop": ["。"], "best_of": 1, "use_beam_search": False, "seed": 3}
    assert post(recorder, {"input": "x", "parameters": said})[0] == 200
    assert recorder.asked[0][1] == {**DEFAULTS, **said}


def test_beam_search_is_not_told_of_defaults_that_it_does_not_know(tokenizer: Any) -> None:
    recorder = Recorder(tokenizer)
    repeated = {**DEFAULTS, "use_beam_search": True, "best_of": 3, "max_tokens": 8}
    for parameters in (repeated, {"use_beam_search": True, "best_of": 3, "max_tokens": 8}):
        assert post(recorder, {"input": "x", "parameters": parameters})[0] == 200
        asked = recorder.asked.pop()[1]
        assert asked == {"max_tokens": 8, "temperature": 0.0, "use_beam_search": True, "best_of": 3}
    assert post(recorder, {"input": "x", "parameters": {**repeated, "presence_penalty": 1.0}})[0] == 200
    assert recorder.asked[0][1]["presence_penalty"] == 1.0  # which the engine refuses


def test_a_model_is_an_adapters_name(tokenizer: Any) -> None:
    recorder = Recorder(tokenizer)
    assert post(recorder, {"input": "x"})[0] == 200
    assert recorder.adapter is None
    assert post(recorder, {"input": "x", "model": "a"})[0] == 200
    assert recorder.adapter == "a"
    status, body = post(recorder, {"input": "x", "model": "nope"})
    assert (status, body["error"]) == (404, "there is no adapter 'nope'")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": "x", "inputs": "y"}, "inputs: unknown key"),
        ({"input": "x", "parameters": {"top_q": 1}}, "parameters.top_q: unknown key"),
        ({"input": "x", "parameters": {"best_of": 0}}, "parameters.best_of: "),
        ({"input": "x", "parameters": {"best_of": 21}}, "parameters.best_of: "),
        ({"input": "x", "model": 3}, "model: "),
        ({"input": "x", "parameters": {"max_tokens": "y"}}, "parameters.max_tokens: "),
        ({"input": 3}, "input: "),
        ({"instruction": "译", "input": "x"}, "no slot for an instruction"),
        ({"input": " "}, "the input is empty"),
        ({}, "the input is empty"),
        ([], "the body: "),
    ],
)
def test_what_can_never_be_answered_is_a_400(tokenizer: Any, body: Any, message: str) -> None:
    recorder = Recorder(tokenizer)
    status, answer = post(recorder, body)
    assert status == 400
    assert message in answer["error"]
    assert answer["generated_text"] == ""
    assert recorder.asked == []


def test_a_body_that_is_not_json_is_a_400(tokenizer: Any) -> None:
    for content in (b"", b"{", b"\xff", b'{"input": "\\ud800"}'):
        assert post(Recorder(tokenizer), content, raw=True)[0] == 400


def test_the_instruction_fills_the_templates_slot(tokenizer: Any) -> None:
    recorder, alpaca = Recorder(tokenizer), prompts.load_template("alpaca")
    assert post(recorder, {"instruction": "译", "input": "x"}, alpaca)[0] == 200
    assert recorder.asked[0][0] == prompts.prompt_ids(tokenizer, alpaca, Row(instruction="译", input="x"))


def test_the_engines_refusal_is_a_400_and_its_failure_a_503(tokenizer: Any) -> None:
    assert post(Recorder(tokenizer, error=ValueError("too long")), {"input": "x"})[0] == 400
    status, body = post(Recorder(tokenizer, error=ServiceError("gone")), {"input": "x"})
    assert (status, body["error"]) == (503, "gone")
