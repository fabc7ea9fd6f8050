"""Our attention of decoding on CUDA. Needs neither the session's fixtures nor Ray: `pytest --noconftest` will do."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from paddock.benchmark.random_llama import LlamaBenchmarkConfig, write_model, write_weights
from paddock.config import ServeConfig
from paddock.engine import Engine
from paddock.prompts import load_template

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

BLOCK_SIZE = 16
LENGTHS = [0, 1, 2, 15, 16, 17, 33, 300, 1000]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_it_is_exact_attention_over_the_pages(dtype: torch.dtype, size: int, layout: str) -> None:
    from paddock.engine.decode_attention import decode

    torch.manual_seed(0)
    heads, most = 3, -(-max(LENGTHS) // BLOCK_SIZE)
    blocks = len(LENGTHS) * most
    shape = (blocks, BLOCK_SIZE, heads, 2 * size) if layout == "NHD" else (blocks, heads, BLOCK_SIZE, 2 * size)
    cache = torch.randn(shape, device="cuda").to(dtype)
    cache = cache.transpose(1, 2) if layout == "NHD" else cache
    query = torch.randn(len(LENGTHS), heads, size, device="cuda").to(dtype)
    table = torch.randperm(blocks, device="cuda", dtype=torch.int32).view(len(LENGTHS), most)
    output = torch.full(query.shape, torch.nan, device="cuda", dtype=torch.bfloat16)
    scales = [torch.tensor(number, device="cuda") for number in (0.5, 0.25, 2.0)]
    decode(query, cache, table, torch.tensor(LENGTHS, device="cuda", dtype=torch.int32), output, 0.3, tuple(scales))
    for sequence, length in enumerate(LENGTHS):
        tokens = cache[table[sequence].long()].float().transpose(1, 2).reshape(-1, heads, 2 * size)[:length]
        keys, values = tokens.transpose(0, 1).split(size, -1)
        scores = 0.3 * 0.5 * 0.25 * (query[sequence].float()[:, None] * keys).sum(-1)
        exact = 2.0 * (scores.softmax(-1)[..., None] * values).sum(1)
        torch.testing.assert_close(output[sequence].float(), exact, rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_an_engine_answers_as_with_flash_attention_base_and_adapter(cache: str, tmp_path: Path) -> None:
    dtype = "float16" if cache == "auto" else "bfloat16"  # FlashAttention has no FP8 for float16
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaBenchmarkConfig(vocab_size=4096, **shape)
    write_model(tmp_path / "llama", config)
    write_weights(str(tmp_path / "llama"))
    adapter = tmp_path / "adapter"
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), lora).save_pretrained(adapter)
    # More than FlashAttention is left with; of several lengths, so that some decode while others are read.
    prompts = [[1, *range(300 + 7 * i, 300 + 17 * i + 20)] for i in range(48)]

    async def answers(**engine: Any) -> list[list[int]]:
        few = {"max_model_len": 1024, "max_num_seqs": 64, "max_cudagraph_capture_size": 64, "max_lora_rank": 8}
        arguments = {"gpu_memory_utilization": 0.2, "dtype": dtype, "enable_lora": True, **few, **engine}
        served = Engine(ServeConfig(model=str(tmp_path / "llama"), engine=arguments), load_template("promptcblue"))
        sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
        adapters = itertools.cycle([None, str(adapter)])
        asked = (served.generate(ids, sampling, f"r{i}", adapter=next(adapters)) for i, ids in enumerate(prompts))
        found = [answer.token_ids for answer in await asyncio.gather(*asked)]
        await served.shutdown()
        return found

    plain = asyncio.run(answers(kv_cache_dtype=cache))
    ours = asyncio.run(answers(kv_cache_dtype=cache, attention_backend="CUSTOM"))
    same = [a == b for one, other in zip(plain, ours, strict=True) for a, b in zip(one[:4], other[:4], strict=True)]
    assert sum(same) / len(same) > (0.97 if cache == "auto" else 0.8)
