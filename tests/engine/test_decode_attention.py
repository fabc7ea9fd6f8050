"""Which batches our attention of decoding takes. Needs Triton, as on a GPU's machine, but no card."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from paddock.engine import decode_attention

BATCH = {"max_query_len": 1, "use_cascade": False, "num_actual_tokens": 16, "block_table": None, "seq_lens": None}


@pytest.mark.parametrize(
    ("batch", "known", "taken"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"max_query_len": 2}, True, False),
        ({"use_cascade": True}, True, False),
        ({"num_actual_tokens": 15}, True, False),
        (None, True, False),
    ],
)
def test_decoding_is_ours_and_the_rest_flash_attention_s(
    monkeypatch: pytest.MonkeyPatch, batch: dict[str, Any] | None, known: bool, taken: bool
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(decode_attention, "decode", lambda *_: asked.append("ours"))
    monkeypatch.setattr(decode_attention.FlashAttentionImpl, "forward", lambda *_: asked.append("FlashAttention's"))
    attention = object.__new__(decode_attention.DecodeAttentionImpl)
    attention.known, attention.head_size, attention.scale, attention.kv_cache_dtype = known, 64, 1.0, "auto"
    one = torch.ones(1)
    layer = SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)
    query, cache = torch.zeros(16, 2, 64), torch.zeros(3, 2, 16, 128)
    metadata = None if batch is None else SimpleNamespace(**{**BATCH, **batch})
    attention.forward(layer, query, query, query, cache, metadata, query)
    assert asked == ["ours" if taken else "FlashAttention's"]
