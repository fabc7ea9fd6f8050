"""Adapters that vLLM serves on a base unmerged: which can be, and what its engine needs for them.

vLLM adds low-rank updates to the linear layers of the decoder. What else an adapter may hold (whole layers, new
rows of a vocabulary, DoRA's magnitudes, biases) it refuses or, in some versions, forgets: such an adapter is merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paddock import storage
from paddock.errors import ModelError
from paddock.lora import load_tokenizer
from paddock.merge_adapter import count_tokens, open_lora

# vLLM's own steps of max_lora_rank.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def why_not(adapter: str | Path, model: str | Path) -> str | None:
    """Why an adapter cannot be served unmerged on a model, or None where it can.

    Raises ModelError where it is no LoRA adapter, OutputError where it is one of ours and damaged.
    """
    opened = open_lora(storage.fetch(adapter))
    config = opened.config
    if config.modules_to_save:
        return f"it trains {', '.join(sorted(config.modules_to_save))} whole"
    if config.trainable_token_indices:
        return "it trains rows of the vocabulary"
    if config.use_dora:
        return "it is a DoRA adapter"
    if config.bias != "none" or config.lora_bias:
        return "it trains biases"
    if config.rank_pattern or config.alpha_pattern:
        return "its layers have ranks of their own"
    if max(config.r, 1) > _RANKS[-1]:
        return f"its rank is {config.r}, vLLM's most is {_RANKS[-1]}"
    other = next((n for n in opened.weights.infos if not n.endswith(("lora_A.weight", "lora_B.weight"))), None)
    if other is not None:
        return f"it holds {other}"
    tokens, known = count_tokens(opened.directory), len(load_tokenizer(model))
    if tokens is not None and tokens > known:
        return f"its vocabulary grew to {tokens} tokens, the model knows {known}"
    return None


def check(adapter: str | Path, model: str | Path) -> None:
    """Raise ModelError where an adapter cannot be served unmerged."""
    reason = why_not(adapter, model)
    if reason is not None:
        raise ModelError(f"{adapter}: cannot be served unmerged: {reason}; merge it (jobs.merge) first")


def engine_args(adapters: Sequence[str | Path], *, by_turns: bool = False) -> dict[str, Any]:
    """vLLM's engine arguments for serving them all from one base; `by_turns` where no batch holds two of them."""
    if not adapters:
        return {}
    most = max(open_lora(storage.fetch(adapter)).config.r for adapter in adapters)
    return {
        "enable_lora": True,
        "max_lora_rank": next(rank for rank in _RANKS if rank >= most),
        # One place more than adapters: on CPU vLLM gives a row without an adapter what is in the last place
        # (https://github.com/vllm-project/vllm/pull/48421), which so stays empty.
        "max_loras": 1 if by_turns else len(adapters) + 1,
        "max_cpu_loras": len(adapters) + 1,
    }
