"""How a training step is executed: what makes it fast, and leaves what it computes the same but for rounding.

    model = training_module(lora.attach(lora.load_base(...), ...), config.train, device)
    optimizer = adamw(parameters, config.train)

In order: onto the device (in 4 bits where asked for), attention inside rows alone, the frozen base in FP8 where asked
for, LoRA as two small products beside the base's, a head that the tensor cores like, recomputation, each layer compiled
where it stands (no parameter changes its name), and the base in shards where asked for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners import lora as peft_lora
from torch import nn
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from paddock import float8, four_bit, sharding
from paddock.attention import VARLEN
from paddock.config import TrainPart
from paddock.errors import ConfigError
from paddock.loss import SupervisedLoss

# What `gradient_checkpointing: selective` keeps: the results of the large products.
_KEPT = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_mm.default]
# The same for compiled layers, whose compiler chooses: the share of a layer's activations that is kept.
_KEPT_SHARE = 0.5


def training_module(model: Any, recipe: TrainPart, device: torch.device) -> SupervisedLoss:
    """A PEFT model on its device, ready to train. Raises ConfigError for what the device cannot do."""
    causal_lm = model.get_base_model()
    if recipe.load_in_4bit:
        four_bit.quantise(causal_lm.model.layers, recipe, device)
    if not recipe.fsdp:  # else each card only ever gets its share
        model = model.to(device)
    causal_lm.set_attn_implementation(_attention(causal_lm, recipe, device))
    for module in list(model.modules()):
        if type(module) is not peft_lora.Linear:
            continue
        if recipe.fp8:
            _to_float8(module, device)
        if _is_plain(module):
            module.__class__ = PlainLora
    if device.type == "cuda" and type(causal_lm.lm_head) is nn.Linear:
        _align(causal_lm.lm_head)
    compiled = recipe.torch_compile if recipe.torch_compile is not None else device.type == "cuda"
    if recipe.gradient_checkpointing:
        _recompute(causal_lm, recipe, compiled)
    if compiled:
        for layer in causal_lm.model.layers:
            # Not `layer.compile()`: what hooks do (sharding) is no part of it.
            layer.forward = torch.compile(layer.forward)
    module = SupervisedLoss(model)
    if recipe.fsdp:
        sharding.shard(module, causal_lm.model.layers, device)
    return module


def adamw(parameters: list[nn.Parameter], recipe: TrainPart) -> torch.optim.AdamW:
    """The optimizer; on a GPU its step is one kernel."""
    fused = parameters[0].is_cuda or None
    return torch.optim.AdamW(
        parameters,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )


class PlainLora(peft_lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA of a linear layer for one adapter without variant; computes the same, with less traffic.

    The scale goes into the small matrix B instead of over the whole output, and dropout and both matrices work in the
    dtype of the layer's input, which PEFT would cast to float32 first.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        small = linear(self.lora_dropout[name](x), a.to(x.dtype))
        return self.base_layer(x) + linear(small, (b * self.scaling[name]).to(x.dtype))  # type: ignore[no-any-return]


class AlignedHead(nn.Linear):
    """A frozen head of any number of words as a product with a multiple of 64; the words beyond are cut off again.

    The fast kernels want rows of 16 bytes: 49,954 words, unaligned, take four times as long.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight)[..., : self.out_features]


def _align(head: nn.Linear) -> None:
    missing = -head.out_features % 64
    if missing and head.bias is None and not head.weight.requires_grad:
        head.__class__ = AlignedHead
        # An embedding that is tied to it gets rows that no token asks for.
        head.weight.data = pad(head.weight.data, (0, 0, 0, missing))


def _is_plain(module: Any) -> bool:
    adapters = list(module.lora_A)
    return (
        len(adapters) == 1
        and module.active_adapters == adapters
        and not module.lora_variant
        and isinstance(module.lora_dropout[adapters[0]], (nn.Identity, nn.Dropout))
        and module.lora_B[adapters[0]].bias is None
    )


def _attention(causal_lm: Any, recipe: TrainPart, device: torch.device) -> str:
    flash = device.type == "cuda" and causal_lm.dtype in (torch.bfloat16, torch.float16)
    chosen = recipe.attn_implementation or ("varlen" if flash else "sdpa")
    if chosen == "varlen" and device.type == "cuda" and not flash:
        raise ConfigError(
            f"train.attn_implementation: varlen on a GPU needs 16-bit weights, these are {causal_lm.dtype};"
            " give model.dtype=bfloat16, or sdpa"
        )
    return VARLEN if chosen == "varlen" else chosen


def _to_float8(module: Any, device: torch.device) -> None:
    if not float8.supported(device):
        raise ConfigError(
            "train.fp8: needs a GPU of compute capability 9.0 or later (H100, H200); give train.fp8=false"
        )
    if module.lora_variant or type(module.base_layer) is not nn.Linear:
        raise ConfigError("train.fp8: plain LoRA on a 16-bit base only (no DoRA, no quantised base); give false")
    if module.base_layer.weight.dtype != torch.bfloat16:
        raise ConfigError("train.fp8: needs a base in bfloat16; give model.dtype=bfloat16")
    module.base_layer = float8.Float8Linear(module.base_layer)


def _recompute(causal_lm: Any, recipe: TrainPart, compiled: bool) -> None:
    options: dict[str, Any] = {"use_reentrant": False}
    if recipe.gradient_checkpointing == "selective":
        if compiled:
            torch._functorch.config.activation_memory_budget = _KEPT_SHARE
            return
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
