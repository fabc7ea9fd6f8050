"""A frozen base in 4 bits (QLoRA): a quarter of the memory, at the price of a product's rate.

The linear layers of the decoder are quantised by bitsandbytes, one after the other on their way to the GPU, in blocks
of 64 weights. Embedding, norms and head keep their type: the loss and each norm are computed in float32 anyway, so
PEFT's `prepare_model_for_kbit_training`, which copies them to float32, would change nothing but the memory.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from paddock.config import TrainPart
from paddock.errors import ConfigError


def check(on_gpu: bool) -> None:
    """Raise ConfigError where there is no GPU for it, or no bitsandbytes."""
    if not on_gpu:
        raise ConfigError("train.load_in_4bit: needs a CUDA GPU for each worker; give train.load_in_4bit=false")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.load_in_4bit: needs bitsandbytes, which is not installed; pip install 'paddock[qlora]'"
        )


def quantise(layers: nn.ModuleList, recipe: TrainPart, device: torch.device) -> None:
    """Replace the frozen linear layers in `layers` by quantised ones on a GPU. Raises ConfigError as `check` does."""
    check(device.type == "cuda")
    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not child.weight.requires_grad:
                setattr(parent, name, _quantised(child, recipe, device))


def _quantised(linear: nn.Linear, recipe: TrainPart, device: torch.device) -> Any:
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype, device="meta"
    )
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=recipe.bnb_4bit_use_double_quant,
        quant_type=recipe.bnb_4bit_quant_type,
        module=made,
    )
    made.bias = linear.bias
    return made.to(device)
