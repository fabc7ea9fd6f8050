"""vLLM's FlashAttention, with a kernel of our own for decoding where each head has keys and values of its own.

FlashAttention computes tiles of 64 and more queries. A sequence that decodes has one query a head; where several heads
share keys and values (GQA) these fill a tile, in LLaMA 7B and 13B they do not, and the padding costs more than
reading the cache: a step takes as long with an FP8 cache as with a bf16 one of twice the bytes. Here a program takes
one head of one sequence and reads its keys and values once, without a tile.

`attention_backend: CUSTOM` among vLLM's engine arguments chooses it (worker.py registers it). Prefill, mixed batches,
few sequences and whatever else the kernel does not know stay FlashAttention's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

# The quickest over 1 - 256 sequences of 352 - 4,096 tokens on an H200, in FP8 and bf16.
_ROWS, _WARPS, _STAGES = 16, 2, 3
# Below this FlashAttention, which splits a long sequence, keeps more of the card busy.
_FEWEST_SEQUENCES = 16
_SIZES = (64, 128, 256)


class DecodeAttentionBackend(FlashAttentionBackend):  # type: ignore[misc]
    """What vLLM's registry knows as CUSTOM."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return DecodeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return DecodeAttentionMetadataBuilder


class DecodeAttentionMetadataBuilder(FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """FlashAttention's, of whose CUDA graphs none is captured for decoding and then replayed for a mixed batch."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH


class DecodeAttentionImpl(FlashAttentionImpl):  # type: ignore[misc]
    """FlashAttention's, whose `forward` takes our kernel for batches that only decode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.known = (
            self.num_queries_per_kv == 1
            and self.head_size in _SIZES
            and self.attn_type == AttentionType.DECODER
            and self.sliding_window == (-1, -1)
            and not self.logits_soft_cap
            and self.alibi_slopes is None
            and self.sinks is None
            and self.dcp_world_size == 1
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> Any:
        if (
            not self.known
            or attn_metadata is None
            or attn_metadata.max_query_len > 1
            or attn_metadata.use_cascade
            or attn_metadata.num_actual_tokens < _FEWEST_SEQUENCES
            or kv_cache.shape[-1] != 2 * self.head_size  # another vLLM may lay it out differently
            or layer._k_scale.numel() > 1
        ):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if is_quantized_kv_cache(self.kv_cache_dtype):
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        scales = (layer._q_scale, layer._k_scale, layer._v_scale)
        count = attn_metadata.num_actual_tokens
        tables, lengths = attn_metadata.block_table, attn_metadata.seq_lens
        decode(query[:count], kv_cache, tables, lengths, output[:count], self.scale, scales)
        return output


def decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Attention of one query a sequence over its paged keys and values, into `output`.

    query, output     (sequences, heads, D)
    kv_cache          (blocks, heads, block size, 2 D): keys, and behind each its value
    block_table       (sequences, most blocks of one), `int32`
    seq_lens          (sequences,), `int32`, in tokens; where 0, the output is 0
    scale             of the product of query and key
    scales            what an FP8 query, key and value are multiplied by, one number each
    """
    sequences, heads, size = query.shape
    _decode[(heads, sequences)](
        query,
        kv_cache,
        block_table,
        seq_lens,
        output,
        *scales,
        scale * 1.4426950408889634,  # log2(e): 2 ** x is what the card computes
        *query.stride()[:2],
        *kv_cache.stride()[:3],
        block_table.stride(0),
        *output.stride()[:2],
        block_size=kv_cache.shape[2],
        size=size,
        row_count=_ROWS,
        stages=_STAGES,
        num_warps=_WARPS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    query_ptr,
    cache_ptr,
    table_ptr,
    lengths_ptr,
    output_ptr,
    query_scale_ptr,
    key_scale_ptr,
    value_scale_ptr,
    scale,
    query_token,
    query_head,
    cache_block,
    cache_head,
    cache_token,
    table_sequence,
    output_token,
    output_head,
    block_size: tl.constexpr,
    size: tl.constexpr,
    row_count: tl.constexpr,
    stages: tl.constexpr,
):
    """A softmax a row: row r has the tokens r, r + row_count, ...; the rows meet at the end, not in each round."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths_ptr + sequence)
    rows, dims = tl.arange(0, row_count), tl.arange(0, size)
    query = tl.load(query_ptr + sequence * query_token + head * query_head + dims).to(tl.float32)
    query *= scale * tl.load(query_scale_ptr) * tl.load(key_scale_ptr)
    top = tl.full([row_count], -1e30, tl.float32)
    total = tl.zeros([row_count], tl.float32)
    answer = tl.zeros([row_count, size], tl.float32)
    for start in tl.range(0, length, row_count, num_stages=stages):
        tokens = start + rows
        known = tokens < length
        blocks = tl.load(table_ptr + sequence * table_sequence + tokens // block_size, mask=known, other=0)
        places = blocks.to(tl.int64) * cache_block + head * cache_head + (tokens % block_size) * cache_token
        places = cache_ptr + places[:, None] + dims[None, :]
        keys = tl.load(places, mask=known[:, None], other=0.0)
        values = tl.load(places + size, mask=known[:, None], other=0.0)
        scores = tl.sum(keys.to(tl.float32) * query[None, :], 1)
        highest = tl.maximum(top, tl.where(known, scores, -1e30))
        weights = tl.where(known, tl.exp2(scores - highest), 0.0)
        shrink = tl.exp2(top - highest)
        total = total * shrink + weights
        answer = answer * shrink[:, None] + weights[:, None] * values.to(tl.float32)
        top = highest
    part = tl.exp2(top - tl.max(top, 0))
    total = tl.maximum(tl.sum(total * part, 0), 1e-30)
    answer = tl.sum(answer * part[:, None], 0) / total * tl.load(value_scale_ptr)
    tl.store(output_ptr + sequence * output_token + head * output_head + dims, answer.to(output_ptr.dtype.element_ty))
