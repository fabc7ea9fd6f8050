"""A service as it stands on a network: keys, limits, adapters, clients that leave, and clients that mean no good."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from ray import serve
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments.keys import digest_of
from paddock import manifest, prompts
from paddock.config_parts import AccessPart
from paddock.data import Row, read_rows
from paddock.service import start

TEMPLATE = prompts.load_template("promptcblue")
GREEDY = {"max_tokens": 12, "temperature": 0.0}
OVER_HTTP = {**GREEDY, "presence_penalty": 0.0, "frequency_penalty": 0.0}
LONG = {"prompt": "咳嗽", "max_tokens": 3900, "ignore_eos": True}
SECRET = "患者李某"


def make_adapter(base: Path, directory: Path, seed: int, **settings: Any) -> Path:
    """An adapter that changes what the base says."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


@dataclass
class Public:
    """The service, and what it may be compared with."""

    url: str
    adapters: Path
    base: Path
    keys: Path
    log: Path

    def http(self, key: str | None = "sk-free") -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, timeout=60, headers=headers)

    def openai(self, key: str = "sk-free") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def said(self, model: str, row: Row) -> str:
        completion = self.openai().completions.create(model=model, prompt=TEMPLATE.render(row), **GREEDY)  # type: ignore[call-overload]
        text: str = completion.choices[0].text
        return text

    def peft_says(self, adapter: str, row: Row) -> str:
        """The answer by transformers and peft alone."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(self.adapters / adapter))
        ids = torch.tensor([prompts.prompt_ids(tokenizer, TEMPLATE, row)])
        made = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        text: str = tokenizer.decode(made, skip_special_tokens=True)
        return text

    def running(self) -> float:
        """The requests in the engine, by its own count, which it renews when it works."""
        self.openai().completions.create(model="base", prompt="x", max_tokens=2)
        for line in self.http().get("/metrics").text.splitlines():
            if line.startswith("vllm:num_requests_running"):
                return float(line.split()[-1])
        raise AssertionError("no such metric")


@pytest.fixture(scope="module")
def public(service: Any, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Public]:
    place = tmp_path_factory.mktemp("public")
    adapters = place / "adapters"
    for number, name in enumerate(("one", "two", "text")):
        make_adapter(base_model, adapters / name, number)
    callers = [
        {"name": "free", "sha256": digest_of("sk-free")},
        {"name": "few", "sha256": digest_of("sk-few"), "requests_per_minute": 2},
        {"name": "short", "sha256": digest_of("sk-short"), "tokens_per_minute": 10},
        {"name": "chief", "sha256": digest_of("sk-chief"), "admin": True},
    ]
    (place / "keys.yaml").write_text(yaml.safe_dump({"keys": callers}), encoding="utf-8")
    access = AccessPart(
        keys=str(place / "keys.yaml"), request_log=str(place / "log"), max_body_bytes=100_000, admin_routes=("/load",)
    )
    changes = {
        "adapters": str(adapters),
        "access": access,
        "engine": {"dtype": "float32", "max_model_len": 4096, "max_loras": 1},
        "max_ongoing_requests": 8,
        "max_queued_requests": 8,
    }
    start(service.config.model_copy(update=changes), "public", route_prefix="/public")
    yield Public(f"{service.url}/public", adapters, base_model, place / "keys.yaml", place / "log")
    serve.delete("public")


@pytest.fixture(scope="module")
def rows(assets: Path) -> list[Row]:
    return read_rows(assets / "data" / "test.json")[:3]


def test_a_key_opens_the_service_and_its_limits_close_it(public: Public) -> None:
    assert public.http(None).get("/is_ready").text == "true"
    with pytest.raises(openai.AuthenticationError):
        public.openai("sk-wrong").models.list()
    few = public.openai("sk-few")
    for _ in range(2):
        few.models.list()
    with pytest.raises(openai.RateLimitError) as caught:
        few.models.list()
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    short = public.openai("sk-short")
    short.completions.create(model="base", prompt="x", max_tokens=12, extra_body={"ignore_eos": True})
    with pytest.raises(openai.RateLimitError):
        short.completions.create(model="base", prompt="x", max_tokens=1)
    assert public.http().get("/load").status_code == 403
    assert public.http("sk-chief").get("/load").status_code == 200


def test_a_key_is_revoked_while_the_service_runs(public: Public) -> None:
    before = public.keys.read_text(encoding="utf-8")
    assert public.http("sk-chief").get("/version").status_code == 200
    public.keys.write_text(before.replace(digest_of("sk-chief"), digest_of("sk-new")), encoding="utf-8")
    time.sleep(0.6)
    assert public.http("sk-chief").get("/version").status_code == 401
    assert public.http("sk-new").get("/version").status_code == 200
    public.keys.write_text(before, encoding="utf-8")
    time.sleep(0.6)


def test_what_is_served_is_told_with_its_manifest(public: Public) -> None:
    base, *adapters = public.http().get("/v1/models").json()["data"]
    assert (base["id"], base["max_model_len"]) == ("base", 4096)
    told = manifest.read(public.base)
    assert told is not None
    assert base["manifest"]["hash"] == told.hash
    assert base["manifest"]["inputs"] == told.inputs
    assert [(card["id"], card["parent"]) for card in adapters] == [(n, "base") for n in ("one", "text", "two")]
    assert str(public.base.parent) not in json.dumps([base, *adapters])


def test_an_adapter_answers_as_peft_says_and_never_for_another(service: Any, public: Public, rows: list[Row]) -> None:
    session = Public(service.url, public.adapters, public.base, public.keys, public.log)
    base = [session.said("base", row) for row in rows]  # by an engine without adapters
    expected = {name: [public.peft_says(name, row) for row in rows] for name in ("one", "two")}
    expected["base"] = base
    assert expected["one"] != base
    assert expected["one"] != expected["two"]
    # More adapters at a time than max_loras, mixed with the base, each on its first request.
    asked = [(name, number) for number in range(len(rows)) for name in expected]
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda pair: public.said(pair[0], rows[pair[1]]), asked)
        assert list(answers) == [expected[name][number] for name, number in asked]
    assert public.said("base:one", rows[0]) == expected["one"][0]

    message = {"role": "user", "content": [{"type": "text", "text": rows[0].input}]}
    for model in ("one", "text", "base"):  # `text`: what vLLM would take for such a message's own adapter
        body = {"model": model, "messages": [message], **GREEDY}
        answer = public.http().post("/v1/chat/completions", json=body).json()
        assert answer["model"] == model
        assert answer["choices"][0]["message"]["content"] == public.said(model, rows[0])
        asked_of = {"input": rows[0].input, "parameters": OVER_HTTP, "model": model}
        generated = public.http().post("/generate", json=asked_of).json()
        assert generated["generated_text"] == prompts.answer(public.said(model, rows[0]))


def test_adapters_come_change_and_go_without_a_restart(public: Public, rows: list[Row]) -> None:
    with pytest.raises(openai.NotFoundError):
        public.said("late", rows[0])
    make_adapter(public.base, public.adapters / "late", 7)
    first = public.said("late", rows[0])
    assert first == public.peft_says("late", rows[0])
    shutil.rmtree(public.adapters / "late")
    make_adapter(public.base, public.adapters / "late", 8)
    assert public.said("late", rows[0]) == public.peft_says("late", rows[0]) != first
    shutil.rmtree(public.adapters / "late")
    with pytest.raises(openai.NotFoundError, match="no adapter 'late'"):
        public.said("late", rows[0])
    assert "late" not in public.http().get("/v1/models").text


def test_an_adapter_that_cannot_be_served_is_a_400_that_says_why(public: Public, rows: list[Row]) -> None:
    base = public.said("base", rows[0])
    shutil.copytree(public.adapters / "one", public.adapters / "cut")
    weights = public.adapters / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(public.adapters / "one", public.adapters / "narrow")
    narrow = public.adapters / "narrow" / "adapter_model.safetensors"
    tensors = {n: t[:, :-8].contiguous() if "lora_A" in n else t for n, t in load_file(narrow).items()}
    save_file(tensors, narrow)
    make_adapter(public.base, public.adapters / "whole", 3, modules_to_save=["lm_head"])
    make_adapter(public.base, public.adapters / "dora", 3, use_dora=True)
    (public.adapters / "linked").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        outside = shutil.copy(public.adapters / "one" / name, public.adapters.parent / name)
        (public.adapters / "linked" / name).symlink_to(outside)
    for name, why in [
        ("cut", "safetensors"),
        ("narrow", "asks? for"),
        ("whole", "merge it"),
        ("dora", "merge it"),
        ("linked", "link out of the directory"),
    ]:
        for path, body in [
            ("/v1/completions", {"model": name, "prompt": "x"}),
            ("/generate", {"model": name, "input": "x"}),
        ]:
            response = public.http().post(path, json=body)
            assert response.status_code == 400, response.text
            assert name in response.text
            assert str(public.adapters) not in response.text
        with pytest.raises(openai.BadRequestError, match=why):
            public.said(name, rows[0])
        shutil.rmtree(public.adapters / name)
    assert public.said("base", rows[0]) == base


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "/etc", "one/../two", "one/", "o\x00ne", "\n", "ONE", "甲" * 300_000]
)
def test_a_name_never_leaves_the_directory(public: Public, name: str) -> None:
    for path, body in [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x"}),
        ("/generate", {"input": "x"}),
    ]:
        for model in (name, f"base:{name}"):
            response = public.http().post(path, json={**body, "model": model})
            assert response.status_code == (413 if len(name) > 100_000 else 404), response.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/completions?stream", "/generate"])
def test_a_client_that_leaves_frees_its_slot_within_a_second(public: Public, path: str) -> None:
    body: dict[str, Any] = {"model": "base", **LONG, "stream": path.endswith("stream")}
    if path == "/generate":
        body = {"input": "咳嗽", "parameters": {"max_tokens": 3900, "min_tokens": 3900}}
    # Either the first bytes of 3900 tokens are there after a second, or none.
    with (
        contextlib.suppress(httpx.ReadTimeout),
        public.http() as client,
        client.stream("POST", path, json=body, timeout=1) as response,
    ):
        assert response.status_code == 200
        assert len(next(response.iter_bytes())) < 10_000
    # Leaving the `with` has closed the connection.
    left = time.monotonic()
    while (running := public.running()) > 0 and time.monotonic() - left < 5:
        pass
    assert running == 0
    assert time.monotonic() - left < 1.2  # of which the last question took some


def test_more_than_the_queues_hold_is_a_429_to_be_tried_again(public: Public) -> None:
    def ask(_: int) -> httpx.Response:
        return public.http().post("/v1/completions", json={"model": "base", **LONG, "max_tokens": 200})

    with ThreadPoolExecutor(40) as pool:
        responses = list(pool.map(ask, range(40)))
    assert {response.status_code for response in responses} == {200, 429}
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert {**refused.json()["error"], "message": ""} == {
        "message": "",
        "type": "RateLimitError",
        "param": None,
        "code": 429,
    }


FUZZ: list[bytes] = [
    b"",
    b"null",
    b"[]",
    b'"x"',
    b"{",
    b"\xff\xfe",
    b'{"model": 3}',
    b'{"model": ["base"], "prompt": "x"}',
    b'{"model": "base", "prompt": null}',
    b'{"model": "base", "prompt": [[]]}',
    b'{"model": "base", "prompt": [[-1]]}',
    b'{"model": "base", "prompt": [99999999]}',
    b'{"model": "base", "prompt": "\\ud800"}',
    b'{"model": "base", "prompt": "x", "max_tokens": -1}',
    b'{"model": "base", "prompt": "x", "max_tokens": 1e99}',
    b'{"model": "base", "prompt": "x", "temperature": NaN}',
    b'{"model": "base", "prompt": "x", "n": 100000}',
    b'{"model": "base", "prompt": "x", "logprobs": 100000}',
    b'{"model": "base", "prompt": "x", "logit_bias": {"x": 1}}',
    b'{"model": "base", "prompt": "x", "logit_bias": {"99999999": 1}}',
    b'{"model": "base", "prompt": "x", "stop": [""]}',
    b'{"model": "base", "prompt": "x", "seed": 99999999999999999999}',
    b'{"model": "base", "prompt": "x", "structured_outputs": {"regex": "("}}',
    b'{"model": "base", "prompt": "x", "structured_outputs": {"json": "{"}}',
    b'{"model": "base", "prompt": "x", "structured_outputs": {"choice": []}}',
    b'{"model": "base", "prompt": "x", "response_format": {"type": "json_schema"}}',
    b'{"model": "base", "prompt": "x", "stop_token_ids": [-1]}',
    b'{"model": "base", "prompt": "x", "allowed_token_ids": [99999999]}',
    b'{"model": "base", "prompt": "x", "truncate_prompt_tokens": -5}',
    b'{"model": "base", "prompt": "x", "bad_words": [""]}',
    b'{"model": "base", "prompt": "x", "prompt_logprobs": 1, "stream": true}',
    b'{"model": "base", "prompt": "x", "use_beam_search": true, "n": 11}',
    b'{"model": "base", "prompt": "x", "kv_transfer_params": {"a": 1}}',
    b'{"model": "base", "prompt_embeds": "AAAA"}',
    b'{"model": "base", "prompt": "x", "echo": true, "max_tokens": 0}',
    b'{"messages": []}',
    b'{"messages": [{}]}',
    b'{"messages": [{"role": "user", "content": 3}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1/0 }}"}',
    b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 5}',
    b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}}',
    b'{"input": "x", "parameters": {"temperature": 1e999}}',
    b'{"input": "x", "parameters": {"top_p": NaN, "max_tokens": -3}}',
    b'{"input": "x", "parameters": {"max_tokens": 99999999999999999999}}',
    b'{"input": "x", "parameters": {"seed": 99999999999999999999}}',
    b'{"input": "x", "parameters": {"stop": [""]}}',
    b'{"input": "x", "parameters": {"use_beam_search": true, "best_of": 20}}',
    b'{"tokens": [-1], "model": "base"}',
    b'{"tokens": [99999999], "model": "base"}',
    b'{"a":' * 2000,
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/detokenize"])
def test_nothing_that_is_sent_makes_a_500(public: Public, path: str) -> None:
    codes = {}
    with public.http() as client:
        for body in FUZZ:
            response = client.post(path, content=body, headers={"content-type": "application/json"})
            codes[body] = response.status_code
        for headers in (
            {"content-type": "text/plain"},
            {"content-type": "application/json; charset=\x00"},
            {"x-request-id": "\x01" * 5000},
            {"content-length": "x"},
            {"x-data-parallel-rank": "x"},
            {"traceparent": "x"},
        ):
            with contextlib.suppress(httpx.HTTPError, ValueError):  # httpx or uvicorn would have none of it
                codes[str(headers).encode()] = client.post(path, content=b'{"input": "x"}', headers=headers).status_code
    assert {body: code for body, code in codes.items() if code >= 500} == {}
    assert public.http(None).get("/is_ready").text == "true"


def test_the_log_tells_tokens_as_the_answers_do_and_no_text(public: Public) -> None:
    client = public.openai()
    options: Any = {"model": "one", "prompt": f"{SECRET}咳嗽", "max_tokens": 5}
    usages = []
    for asked in (
        {},
        {"n": 3, "temperature": 1.0},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"prompt": [SECRET, SECRET]},
    ):
        answer = client.completions.with_raw_response.create(**{**options, **asked})
        parsed = answer.parse()
        usages.append(parsed.usage if "stream" not in asked else list(parsed)[-1].usage)
        request_id = answer.headers["x-request-id"]
    time.sleep(0.3)
    text = public.log.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()][-4:]
    for line, usage in zip(lines, usages, strict=True):
        assert (line["key"], line["model"], line["status"]) == ("free", "one", 200)
        assert (line["prompt_tokens"], line["completion_tokens"]) == (usage.prompt_tokens, usage.completion_tokens)
        assert 0 < line["first_token_s"] <= line["seconds"]
    assert lines[-1]["id"].startswith(request_id)
    assert SECRET not in text
    assert json.dumps(SECRET)[1:-1] not in text
    assert "sk-free" not in text
