"""Attention in packed blocks: each row sees itself alone.

`sdpa` (any device): transformers makes a block-diagonal mask of `position_ids`, over all pairs of tokens.
`varlen` (what a GPU takes): the rows' borders go to the kernel of `torch.nn.attention.varlen`, which does
not look at pairs of tokens from two rows at all. On the CPU each row is attended to by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

VARLEN = "paddock_varlen"


def row_borders(position_ids: torch.Tensor) -> dict[str, Any]:
    """What `varlen` needs to know of a block of shape (1, tokens), by the names that transformers uses.

    A row begins where a position is 0. The longest row is rounded up to a power of two, so that compiled
    layers see few values of it.
    """
    flat = position_ids.flatten()
    starts = (flat == 0).nonzero().flatten()
    borders = torch.cat([starts, starts.new_tensor([len(flat)])]).to(torch.int32)
    longest = 1 << int(flat.max()).bit_length()
    # The number of rows differs from block to block: one compiled layer for all.
    torch._dynamo.maybe_mark_dynamic(borders, 0)
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: (1, heads, tokens, head size) in, (1, tokens, heads, head size) out."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.is_cuda:
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        borders, longest = cu_seq_lens_q, max_length_q
        attended = varlen_attn(
            query, key, value, borders, borders, longest, longest, scale=scaling, window_size=(-1, 0)
        )
        assert isinstance(attended, torch.Tensor)
        return attended[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    each = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in rows]
    return torch.cat(each, dim=2).transpose(1, 2), None


# transformers makes no mask for an implementation that it has no mask function for.
AttentionInterface.register(VARLEN, varlen_attention)
