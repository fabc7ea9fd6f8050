"""Frozen linear layers in 8-bit floating point: twice the matrix rate of bfloat16 on Hopper and later.

The weight is rounded once, to e4m3 with a scale for each output (for the forward product) and once more with a
scale for each input (for the gradient of the input); the other factor is rounded at each product, with a scale
for each token. Sums are in float32, results in bfloat16. What is trained stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

E4M3 = torch.float8_e4m3fn
_MAX = torch.finfo(E4M3).max


def round_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (rows, n) as e4m3 and the float32 scales (rows, 1) to multiply it with."""
    scale = matrix.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / _MAX
    return (matrix.float() / scale).clamp(-_MAX, _MAX).to(E4M3), scale


def supported(device: torch.device) -> bool:
    """Whether a device multiplies e4m3 with a scale for each row."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def product(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """x @ weight.T of shapes (tokens, n) and (m, n), in x's dtype; weight and weight_scale as of `round_rows`."""
    rounded, scale = round_rows(x)
    if x.is_cuda:
        return torch._scaled_mm(
            rounded, weight.t(), scale_a=scale, scale_b=weight_scale.t(), out_dtype=x.dtype, use_fast_accum=True
        )
    return ((rounded.float() * scale) @ (weight.float() * weight_scale).t()).to(x.dtype)


class _Product(torch.autograd.Function):
    """The product with a frozen weight; its gradient is a product in e4m3 too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        weight, scale, turned, turned_scale = weights
        ctx.save_for_backward(turned, turned_scale)
        return product(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        turned, turned_scale = ctx.saved_tensors
        return product(gradients[0], turned, turned_scale), None, None, None, None


class Float8Linear(nn.Module):
    """A frozen `nn.Linear` in e4m3; made on the device that it shall stay on."""

    weight: torch.Tensor
    scale: torch.Tensor
    turned: torch.Tensor
    turned_scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        with torch.no_grad():
            for name, matrix in (("weight", linear.weight), ("turned", linear.weight.t())):
                rounded, scale = round_rows(matrix.contiguous())
                self.register_buffer(name, rounded, persistent=False)
                self.register_buffer("scale" if name == "weight" else "turned_scale", scale, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As nn.Linear: (..., in_features) -> (..., out_features)."""
        flat = x.reshape(-1, self.in_features)
        out: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            flat, self.weight, self.scale, self.turned, self.turned_scale
        )
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], self.out_features)
