"""The sums of one optimizer step: its gradients, its loss, and what a worker was asked meanwhile.

A step's micro-batches are added up in float64, on each worker and over the workers, and rounded once. So
their sum does not depend on how many workers they are dealt out to, nor in which order these add: one
worker, two and four learn the same, to the bit but for the rarest of roundings. LoRA's gradients are
small, so that one exchange a step costs less than DistributedDataParallel's hooks would save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Step:
    """What a step came to, on every worker alike."""

    loss: float
    """The mean over the step's supervised tokens."""
    grad_norm: float
    """The gradient's norm before it was clipped."""
    stop: bool
    """Whether a worker was asked to save and end."""
    save: bool
    """Whether a worker was asked to save."""


class StepSum:
    """Adds up micro-batches; `finish` leaves the step's gradient in the parameters' `grad`."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        # Behind the gradients: the loss, and how many workers were asked to stop and to save.
        self.sums = torch.zeros(sum(sizes) + 3, dtype=torch.float64, device=parameters[0].device)
        *flat, self.loss, self.stops, self.saves = torch.split(self.sums, [*sizes, 1, 1, 1])
        self.gradients = [part.view_as(p) for part, p in zip(flat, parameters, strict=True)]

    def add(self, loss: torch.Tensor) -> None:
        """Run a micro-batch's backward and add its loss, a scalar, and its gradients."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.loss += loss.detach()
        for total, parameter in zip(self.gradients, self.parameters, strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad = None

    def finish(self, max_grad_norm: float, *, stop: bool = False, save: bool = False) -> Step:
        """Sum over the workers and clip. A loss or norm that is not finite is the caller's to refuse."""
        self.stops += float(stop)
        self.saves += float(save)
        sum_over_workers(self.sums)
        for total, parameter in zip(self.gradients, self.parameters, strict=True):
            parameter.grad = total.to(parameter.dtype)
        norm = nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        step = Step(self.loss.item(), norm.item(), self.stops.item() > 0, self.saves.item() > 0)
        self.sums.zero_()
        return step


def sum_over_workers(values: torch.Tensor) -> None:
    """Replace values by their sums over all workers."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if values.is_cuda and dist.get_backend() == "gloo":  # workers that share a card
        total = values.cpu()
        dist.all_reduce(total)
        values.copy_(total)
    else:
        dist.all_reduce(values)


def from_rank_0(value: int) -> int:
    """Rank 0's value, on every worker."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    told = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(told, src=0)
    return int(told.item())
