"""What an adapter does to one tensor, and how a tensor of the merged model is computed.

An output tensor is a tensor of the base and the operations on it, in the order of the adapters. It is
computed in float32 through all of them and rounded once. The formulas are PEFT's own (`LoraLayer.merge`,
`DoraLinearVariant`, `TrainableTokensLayer.merge`); W is laid out as on disk, (out, in) for a linear layer
and (rows, features) for an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paddock.errors import ModelError
from paddock.weights import TensorInfo, Weights, write_shard


@dataclass(frozen=True)
class Replace:
    """W := the adapter's tensor (`modules_to_save`, trained biases, a grown embedding)."""

    adapter: int
    """Position in the list of sources: 0 is the base, so adapters count from 1."""
    tensor: str

    def apply(self, weight: torch.Tensor, sources: Sequence[Weights]) -> torch.Tensor:
        return _float(sources[self.adapter].read(self.tensor))

    def __str__(self) -> str:
        return f"replaced by adapter {self.adapter}"


@dataclass(frozen=True)
class AddLora:
    """W := W + scaling * B A; with a DoRA magnitude m, each row is then scaled to the length m."""

    adapter: int
    lora_A: str  # noqa: N815 (PEFT's name)
    """(r, in)"""
    lora_B: str  # noqa: N815
    """(out, r)"""
    scaling: float
    transposed: bool
    """W is (in, out): an embedding, or a layer that PEFT calls fan_in_fan_out."""
    magnitude: str | None = None
    """(out,)"""

    def apply(self, weight: torch.Tensor, sources: Sequence[Weights]) -> torch.Tensor:
        source = sources[self.adapter]
        left, right = _float(source.read(self.lora_B)), _float(source.read(self.lora_A))
        if self.transposed:
            left, right = right.T, left.T
        weight = weight.addmm_(left, right, alpha=self.scaling)
        if self.magnitude is None:
            return weight
        out = 1 if self.transposed else 0
        length = torch.linalg.vector_norm(weight, dim=1 - out, keepdim=True)
        magnitude = _float(source.read(self.magnitude)).reshape(length.shape)
        return weight.mul_(magnitude / length)

    def __str__(self) -> str:
        kind = "LoRA" if self.magnitude is None else "DoRA"
        return f"{kind} of adapter {self.adapter}, scaling {self.scaling:g}"


@dataclass(frozen=True)
class AddBias:
    """b := b + scaling * the bias of lora_B (`lora_bias`)."""

    adapter: int
    tensor: str
    scaling: float

    def apply(self, weight: torch.Tensor, sources: Sequence[Weights]) -> torch.Tensor:
        return weight.add_(_float(sources[self.adapter].read(self.tensor)), alpha=self.scaling)

    def __str__(self) -> str:
        return f"lora_B bias of adapter {self.adapter}, scaling {self.scaling:g}"


@dataclass(frozen=True)
class ReplaceRows:
    """W[rows] := the adapter's rows (`trainable_token_indices`)."""

    adapter: int
    tensor: str
    rows: tuple[int, ...]

    def apply(self, weight: torch.Tensor, sources: Sequence[Weights]) -> torch.Tensor:
        rows = torch.tensor(self.rows)
        return weight.index_copy_(0, rows, _float(sources[self.adapter].read(self.tensor)))

    def __str__(self) -> str:
        return f"{len(self.rows)} rows replaced by adapter {self.adapter}"


Operation = Replace | AddLora | AddBias | ReplaceRows


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the merged model."""

    name: str
    source: str
    """The base's tensor it begins as; a head that stops being tied begins as the embedding."""
    info: TensorInfo
    operations: tuple[Operation, ...] = ()

    def __str__(self) -> str:
        shape = "x".join(map(str, self.info.shape))
        begins = "" if self.source == self.name else f" <- {self.source}"
        then = "".join(f"; {operation}" for operation in self.operations)
        return f"{self.name} {shape} {str(self.info.dtype).removeprefix('torch.')}{begins}{then}"


@dataclass(frozen=True)
class Computed:
    """A merged tensor, and how far it is from the base's."""

    tensor: torch.Tensor
    delta_norm: float | None
    """The Frobenius norm of merged - base over the rows that both have; None where nothing was done."""


def compute(output: OutputTensor, sources: Sequence[Weights]) -> Computed:
    """One tensor of the merged model from the base (`sources[0]`) and the adapters.

    Needs twice the tensor in float32, and the tensor once in its own type.
    """
    base = sources[0].read(output.source)
    if not output.operations:
        return Computed(base.to(output.info.dtype), None)
    # What stands before a replacement cannot be seen in the result.
    replaced = [i for i, operation in enumerate(output.operations) if isinstance(operation, Replace)]
    operations = output.operations[replaced[-1] :] if replaced else output.operations
    weight = base if replaced else _float(base)
    for operation in operations:
        weight = operation.apply(weight, sources)
    merged = weight.to(output.info.dtype)
    return Computed(merged, _distance(merged, base))


def write_merged_shard(file: Path, outputs: Sequence[OutputTensor], sources: Sequence[Weights]) -> dict[str, float]:
    """Compute and write one shard; return the norm of what was added to each tensor (see `Computed`)."""
    by_name = {output.name: output for output in outputs}
    norms: dict[str, float] = {}

    def tensor_of(name: str) -> torch.Tensor:
        computed = compute(by_name[name], sources)
        if computed.delta_norm is not None:
            norms[name] = float(f"{computed.delta_norm:.6g}")
            if not torch.isfinite(computed.tensor).all():
                raise ModelError(f"tensor {name}: the merge makes infinite or undefined values; is an adapter damaged?")
        return computed.tensor

    write_shard(file, {name: output.info for name, output in by_name.items()}, tensor_of)
    return norms


def _distance(merged: torch.Tensor, base: torch.Tensor) -> float:
    rows, squares = min(len(merged), len(base)), 0.0
    for start in range(0, rows, 4096):  # a block at a time: the tensor may be large
        piece = slice(start, min(start + 4096, rows))
        squares += torch.linalg.vector_norm(merged[piece].float() - base[piece].float()).item() ** 2
    return math.sqrt(squares)


def _float(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 copy that may be written to: what was read is the file itself."""
    return tensor.to(torch.float32, copy=True)
