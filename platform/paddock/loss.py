"""The model with its loss as one module: what a training step runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from paddock.attention import VARLEN, row_borders
from paddock.packing import IGNORE

# Supervised tokens whose logits exist at a time: of 50,000 words, 800 MB in float32.
CHUNK = 4096
# Blocks in a row are filled up to a multiple of this, so that compiled layers see few sizes.
_MULTIPLE = 256


class SupervisedLoss(nn.Module):
    """A causal LM whose forward is the summed cross-entropy of the supervised tokens.

    The head only sees the positions whose next token counts: of a packed block, a small part.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """All of shape (blocks, tokens), int64; returns a float32 scalar."""
        causal_lm = self.model.get_base_model()
        shape, borders = labels.shape, {}
        if causal_lm.config._attn_implementation == VARLEN:
            # Blocks one after the other are one block: each row's positions restart at 0, those of the filling too.
            filling = torch.arange(-labels.numel() % _MULTIPLE, device=labels.device)
            position_ids = torch.cat([position_ids.flatten(), filling])[None]
            input_ids = pad(input_ids.flatten(), (0, len(filling)))[None]
            borders = row_borders(position_ids)
        # The adapter is kept in float32 and multiplied in the base's bfloat16.
        half = causal_lm.dtype == torch.bfloat16
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=half):
            # Without a mask and without a cache transformers reads the rows' borders off position_ids.
            hidden = causal_lm.model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, **borders
            ).last_hidden_state
            hidden = hidden.flatten(0, 1)[: labels.numel()].view(*shape, -1)
            next_tokens = labels[:, 1:]
            counts = next_tokens != IGNORE
            return summed_cross_entropy(causal_lm.lm_head, hidden[:, :-1][counts], next_tokens[counts])


def summed_cross_entropy(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of head(hidden), of shape (tokens, words), summed over the tokens, in float32.

    Logits of many tokens are made chunk by chunk, and again in the backward pass, instead of being kept.
    """
    if len(hidden) <= CHUNK:
        return _cross_entropy(head, hidden, targets)
    parts = zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
    return torch.stack([checkpoint(_cross_entropy, head, h, t, use_reentrant=False) for h, t in parts]).sum()


def _cross_entropy(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="sum")
