"""Clients that others wrote, unchanged: LangChain's ChatOpenAI, and schemathesis on the served OpenAPI document."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest


def test_langchain_s_chat_model_works(service: Any) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    chat = langchain_openai.ChatOpenAI(
        model="base", base_url=f"{service.url}/v1", api_key="none", temperature=0, max_completion_tokens=12
    )
    said = chat.invoke("发热三天，咳嗽")
    assert said.content
    assert said.usage_metadata["output_tokens"] <= 12
    streamed = "".join(chunk.content for chunk in chat.stream("发热三天，咳嗽"))
    assert streamed == said.content
    assert [answer.content for answer in chat.batch(["发热三天，咳嗽"] * 2)] == [said.content] * 2


def test_the_document_describes_every_open_route_and_refers_to_nothing_else(service: Any) -> None:
    document = httpx.get(f"{service.url}/openapi.json", timeout=60).json()
    assert set(document["paths"]) == {
        *("/generate", "/is_ready", "/v1/models", "/v1/completions", "/v1/chat/completions"),
        *("/tokenize", "/detokenize", "/health", "/version", "/metrics"),
    }
    for path in ("/generate", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema, path
    generate = document["components"]["schemas"]["GenerateRequest"]
    assert set(generate["properties"]) == {"instruction", "input", "parameters", "model"}
    assert "temperature" in document["components"]["schemas"]["Parameters"]["properties"]


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(service: Any, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    document = [f"{service.url}/openapi.json", "--url", service.url]
    checks = ["--checks", "not_a_server_error", "--max-examples", "50", "--request-timeout", "60"]
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", *document, *checks, "--no-color"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "9 passed" in done.stdout or "10 passed" in done.stdout


def test_a_conversation_in_another_models_format_is_a_400(service: Any) -> None:
    harmony = [{"author": {"role": "user"}, "content": content} for content in ([{"type": "text", "text": "x"}], [])]
    for path in ("/v1/chat/completions", "/tokenize"):
        for messages in (harmony[:1], harmony[1:], harmony):
            answer = httpx.post(f"{service.url}{path}", json={"messages": messages}, timeout=60)
            assert answer.status_code == 400, answer.text
            assert "messages: each is" in answer.json()["error"]["message"]
