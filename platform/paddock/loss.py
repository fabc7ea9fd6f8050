"""The model with its loss as one module: what a training step runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from paddock.packing import IGNORE


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
        # Without a mask and without a cache transformers reads the rows' borders off position_ids.
        hidden = causal_lm.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        next_tokens = labels[:, 1:]
        counts = next_tokens != IGNORE
        logits = causal_lm.lm_head(hidden[:, :-1][counts])
        return cross_entropy(logits.float(), next_tokens[counts], reduction="sum")
