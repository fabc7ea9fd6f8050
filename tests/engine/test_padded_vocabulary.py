"""A base whose embedding has more rows than its tokenizer has tokens, as bases padded to a round number have."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paddock.config import ServeConfig
from paddock.engine import Engine
from paddock.prompts import load_template


@pytest.mark.slow
def test_likeliest_tokens_may_be_padding(base_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    llama = AutoModelForCausalLM.from_pretrained(base_model)
    known = len(tokenizer)
    llama.resize_token_embeddings(known + 16)
    with torch.no_grad():
        head = llama.get_output_embeddings().weight
        head[known:] = 4 * head[:16]  # whatever is likely or most unlikely, some of these rows are among the likeliest
    llama.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")

    async def asked() -> list[httpx.Response]:
        config = ServeConfig(model=str(tmp_path / "padded"), engine={"max_model_len": 256})
        engine = Engine(config, load_template("promptcblue"))
        transport = httpx.ASGITransport(app=await engine.openai_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=120) as client:
            body = {"model": "padded", "prompt": "发热", "max_tokens": 8, "temperature": 0}
            beside = {**body, "max_tokens": 200, "ignore_eos": True}
            told = {**body, "logprobs": 5}, {**body, "prompt_logprobs": 5}
            bodies = [beside, *told, {**body, "prompt": [1, known + 3]}]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        await engine.shutdown()
        return answers

    answers = asyncio.run(asked())
    assert [answer.status_code for answer in answers] == [200] * 4
    likeliest = answers[1].json()["choices"][0]["logprobs"]["top_logprobs"]
    assert any("" in tokens for tokens in likeliest)
