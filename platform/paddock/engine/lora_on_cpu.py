"""Keeps an adapter away from the base's requests in vLLM's engine on a CPU.

Up to 0.32 vLLM's CPU kernels read the index -1, which means "no adapter", as the last one of the list: a request for
the base that shares a batch with an adapter's is answered by the adapter (https://github.com/vllm-project/vllm/pull/48421;
those for CUDA are right). Imported where vLLM computes (worker.py), it mends that.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

_bgmv_shrink = lora_ops.bgmv_shrink


def bgmv_shrink(
    inputs: torch.Tensor, lora_a: torch.Tensor, output: torch.Tensor, indices: torch.Tensor, scaling: float = 1.0
) -> Any:
    """vLLM's (n, in) x A -> (n, r), and 0 where there is no adapter; what is made of 0 afterwards is 0."""
    _bgmv_shrink(inputs, lora_a, output, indices, scaling)
    output[indices[: output.shape[0]] < 0] = 0


# Prefill goes through the first name, decoding through the second.
lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink
