"""The embedded default: a tiny LLaMA, tokenizers, adapters and rows, made from a seed.

    base/                  Hugging Face directory (float32)
    base_meta/             the same weights in Meta's layout
    adapters/zh-llama/     PEFT adapter with a grown vocabulary, as Chinese-LLaMA's
    adapters/zh-alpaca/    on top of it, one more token, as Chinese-Alpaca's
    data/                  train.json, dev.json, test.json: rows of all sixteen tasks

The same seed gives the same bytes in any directory on any x86-64 machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from paddock.data import write_records
from paddock.demo import model, rows, tokenizer


def make_assets(directory: Path, seed: int = 0) -> None:
    """Write the demo's ingredients into `directory`, which is made if missing."""
    splits = rows.make_rows(seed)
    data = _folder(directory, "data")
    for split, members in splits.items():
        write_records(data / f"{split}.json", [row.as_record() for row in members])

    pieces = tokenizer.base_pieces()
    grown = [*pieces, *tokenizer.chinese_pieces(rows.frequent_phrases(splits["train"]))]
    special = len(tokenizer.CONTROL) + 256
    weights = model.base_weights(seed, special + len(pieces))
    _write_base(_folder(directory, "base"), weights, pieces)
    _write_meta(_folder(directory, "base_meta"), weights, pieces)

    embedding = weights["model.embed_tokens.weight"]
    for stream, (name, pad) in enumerate((("zh-llama", False), ("zh-alpaca", True)), start=1):
        adapter = _folder(directory, "adapters", name)
        embedding, head = model.grown_rows(seed, 2 * stream, embedding, special + len(grown) + pad)
        adapter_weights = model.adapter_weights(seed, 2 * stream + 1, embedding, head)
        (adapter / "adapter_model.safetensors").write_bytes(save(adapter_weights, {"format": "pt"}))
        _write_json(adapter / "adapter_config.json", model.adapter_config())
        _write_tokenizer(adapter, grown, pad=pad)


def _write_base(directory: Path, weights: model.Weights, pieces: list[str]) -> None:
    (directory / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    _write_json(directory / "config.json", model.llama_config(len(weights["lm_head.weight"])))
    _write_json(directory / "generation_config.json", model.generation_config())
    _write_tokenizer(directory, pieces)


def _write_meta(directory: Path, weights: model.Weights, pieces: list[str]) -> None:
    torch.save(model.meta_weights(weights), directory / "consolidated.00.pth")
    _write_json(directory / "params.json", model.meta_params(len(weights["lm_head.weight"])))
    (directory / "tokenizer.model").write_bytes(tokenizer.sentencepiece_model(pieces))


def _write_tokenizer(directory: Path, pieces: list[str], *, pad: bool = False) -> None:
    (directory / "tokenizer.model").write_bytes(tokenizer.sentencepiece_model(pieces, pad=pad))
    _write_json(directory / "tokenizer_config.json", tokenizer.tokenizer_config(pad=pad))
    _write_json(directory / "special_tokens_map.json", tokenizer.special_tokens_map(pad=pad))


def _folder(directory: Path, *parts: str) -> Path:
    folder = directory.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
