"""What a request may ask of sampling, over HTTP: the OpenAI parameters, and the reference endpoint's own."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

PROMPT = "问：\n患者发热三天\n答：\n"


@pytest.fixture(scope="module")
def http(service: Any) -> httpx.Client:
    return httpx.Client(base_url=service.url, timeout=120)


@pytest.fixture(scope="module")
def client(service: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


def complete(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(
        **{"model": "base", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **options}
    )


def generate(http: httpx.Client, **parameters: Any) -> dict[str, Any]:
    asked = {"max_tokens": 8, "temperature": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, **parameters}
    response = http.post("/generate", json={"input": "患者发热三天", "parameters": asked})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_structured_outputs_are_what_was_asked_for(client: openai.OpenAI) -> None:
    def said(**structure: Any) -> str:
        text: str = complete(client, max_tokens=60, extra_body={"structured_outputs": structure}).choices[0].text
        return text.strip()

    assert said(choice=["是的", "不是"]) in ("是的", "不是")
    assert re.fullmatch("[0-9]{3}号", said(regex="[0-9]{3}号"))
    # A string: inside an object a model that knows no JSON may go on with white space for ever.
    assert json.loads(said(json={"type": "string", "enum": ["发热", "咳嗽"]})) in ("发热", "咳嗽")


def test_logprobs_and_several_answers(client: openai.OpenAI) -> None:
    (choice,) = complete(client, logprobs=3).choices
    assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.tokens) > 0
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs)
    # Greedy: each token is the likeliest of those that are told.
    for own, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert own == pytest.approx(max(top.values()))
    drawn = complete(client, n=3, temperature=2.0, seed=1).choices
    assert [choice.index for choice in drawn] == [0, 1, 2]
    assert len({choice.text for choice in drawn}) > 1


def test_a_seed_draws_the_same_again_and_a_stop_ends_the_answer(client: openai.OpenAI, http: httpx.Client) -> None:
    first, again, other = (complete(client, temperature=2.0, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert first == again != other
    assert generate(http, temperature=2.0, seed=1) == generate(http, temperature=2.0, seed=1)
    whole = generate(http)["generated_text"]
    stop = whole[2]
    assert generate(http, stop=stop)["generated_text"] == whole[: whole.index(stop)]


def test_a_repetition_penalty_changes_what_repeats(http: httpx.Client) -> None:
    assert generate(http, max_tokens=24, repetition_penalty=5.0) != generate(http, max_tokens=24)


def test_a_chat_is_streamed_as_it_is_answered(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "base",
        "messages": [{"role": "user", "content": "发热"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert len(chunks) > 3
    assert chunks[-1].choices[0].finish_reason == "length"


def test_beam_search_finds_an_answer_that_is_likelier_than_the_greedy_one(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    def likelihood(text: str) -> float:
        logprobs = complete(client, prompt=PROMPT + text, max_tokens=1, echo=True, logprobs=0).choices[0].logprobs
        start = next(i for i, offset in enumerate(logprobs.text_offset) if offset >= len(PROMPT))
        return sum(logprobs.token_logprobs[start:-1])

    greedy, found = generate(http, max_tokens=6), generate(http, max_tokens=6, use_beam_search=True, best_of=8)
    assert 0 < found["num_output_tokens_cf"] <= 6
    assert found == generate(http, max_tokens=6, use_beam_search=True, best_of=8)
    assert generate(http, max_tokens=6, use_beam_search=True, best_of=1)["generated_text"] == greedy["generated_text"]
    assert likelihood(found["generated_text"]) >= likelihood(greedy["generated_text"]) - 1e-3


def test_what_beam_search_does_not_know_is_a_400(http: httpx.Client) -> None:
    for unknown in ({"presence_penalty": 1.0}, {"stop": "x"}, {"seed": 3}, {"temperature": 0.7}, {"top_p": 0.5}):
        asked = {"input": "x", "parameters": {"use_beam_search": True, "max_tokens": 4, **unknown}}
        response = http.post("/generate", json=asked)
        assert response.status_code == 400
        assert f"{next(iter(unknown))}: vLLM's beam search knows no such parameter" in response.json()["error"]


def test_best_of_returns_the_likeliest_of_what_it_drew(http: httpx.Client) -> None:
    assert generate(http, best_of=4) == generate(http)  # greedy ones are all the same
    drawn = generate(http, best_of=4, temperature=1.5, seed=5)
    assert drawn == generate(http, best_of=4, temperature=1.5, seed=5)


@pytest.mark.parametrize(
    "body",
    [
        {"input": "患者发热三天", "parameters": {}},
        {"instruction": "", "input": "患者发热三天"},
        {
            "instruction": "",
            "input": "患者发热三天",
            "parameters": {
                "best_of": 1,
                "use_beam_search": False,
                "top_p": 1,
                "top_k": -1,
                "max_tokens": 16,
                "presence_penalty": 0.2,
                "frequency_penalty": 0.2,
                "temperature": 1e-6,
            },
        },
    ],
)
def test_the_references_own_bodies_are_taken(http: httpx.Client, body: dict[str, Any]) -> None:
    response = http.post("/generate", json=body)
    assert response.status_code == 200
    assert response.json().keys() == {"generated_text", "num_output_tokens_cf", "error"}
