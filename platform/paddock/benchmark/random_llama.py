"""A LLaMA of random weights, and transformers' own `generate` with it: what vLLM is compared with."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import chain, islice, product
from pathlib import Path

import torch
from safetensors.torch import save_file

from paddock.benchmark import BenchmarkConfig
from paddock.demo.model import generation_config, llama_config
from paddock.demo.tokenizer import base_pieces, chinese_pieces, sentencepiece_model, tokenizer_config

_LOGIT_STD = 4.0
_CONTROL_AND_BYTES = 3 + 256

Asked = Sequence[tuple[list[int], int]]
"""Prompt ids, and the number of tokens to answer."""


class LlamaBenchmarkConfig(BenchmarkConfig):
    """A benchmark of LLaMA-7B with the vocabulary of Chinese-LLaMA-Alpaca, or of something smaller."""

    hidden_size: int = 4096
    """The model's width."""
    intermediate_size: int = 11_008
    """The width of its feed-forward layers."""
    num_hidden_layers: int = 32
    """Its depth."""
    num_attention_heads: int = 32
    """Its heads."""
    vocab_size: int = 49_954
    """Rows of its embedding."""

    @property
    def weight_bytes(self) -> int:
        """In bfloat16, norms left out."""
        layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        return 2 * (2 * self.vocab_size * self.hidden_size + self.num_hidden_layers * layer)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in bfloat16."""
        return 2 * 2 * self.num_hidden_layers * self.hidden_size


def write_model(directory: Path, config: LlamaBenchmarkConfig) -> None:
    """A model directory without weights: vLLM draws its own (`load_format=dummy`), and so does `hf_generate`."""
    directory.mkdir()
    shape = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = config.num_attention_heads
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": config.hidden_size // heads}
    shape |= {"dtype": "bfloat16", "max_position_embeddings": 4096}
    files = {
        "config.json": {**llama_config(config.vocab_size), **shape},
        "generation_config.json": generation_config(),
        "tokenizer_config.json": tokenizer_config(),
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    (directory / "tokenizer.model").write_bytes(sentencepiece_model(_pieces(config.vocab_size - _CONTROL_AND_BYTES)))
    save_file({"placeholder": torch.zeros(1)}, directory / "model.safetensors")


def _pieces(count: int) -> list[str]:
    """So many, that every token which the model may draw has a text: words and characters, then pairs of those."""
    characters = chinese_pieces([])
    pairs = map("".join, product((piece for piece in characters if len(piece) == 1), repeat=2))
    return list(dict.fromkeys(chain(base_pieces(), characters, islice(pairs, count))))[:count]


def write_weights(directory: str) -> None:
    """Give it random weights that answer a small change as a trained model's do: by a small one.

    Layers add to a token's embedding instead of replacing it: embeddings of variance 1, and what is added scaled by
    1 / sqrt(2 layers), as GPT-2 begins. With transformers' initial weights, embeddings fifty times smaller, rounding to
    bfloat16 alone changes the likeliest token at every fifth position. The head makes logits of standard deviation 4: a
    token's entropy then is about ln(vocabulary) - 4^2 / 2, 3 nats, as a trained model's; vLLM's dummy weights make all
    tokens equally likely.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad():
        llama = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        llama.model.embed_tokens.weight.normal_()
        llama.lm_head.weight.normal_(std=_LOGIT_STD / config.hidden_size**0.5)
        for layer in llama.model.layers:
            for added in (layer.self_attn.o_proj, layer.mlp.down_proj):
                added.weight /= (2 * config.num_hidden_layers) ** 0.5
    save_file(llama.state_dict(), Path(directory) / "model.safetensors")


def hf_generate(model: str, batches: Sequence[Asked]) -> tuple[float, list[float]]:
    """Seconds to load, and to answer each batch at once; the weights are random ones of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    begun = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        llama = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16).eval()
    loaded = time.time() - begun

    def answer(batch: Asked) -> float:
        begun = time.time()
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(batch):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        count = max(count for _, count in batch)
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            llama.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.time() - begun

    for size in {len(batch) for batch in batches}:  # kernels are chosen with the first call
        answer([([1] * 16, 2)] * size)
    return loaded, [answer(batch) for batch in batches]
