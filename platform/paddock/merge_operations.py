"""What an adapter does to one tensor, and how a tensor of the merged model is computed.

An output tensor is a tensor of the base and the operations on it, in the order of the adapters. It is computed
through all of them and rounded once, some rows at a time, so that its size does not matter. The formulas are PEFT's
own (`LoraLayer.merge`, `DoraLinearVariant`, `TrainableTokensLayer.merge`); W is laid out as on disk, (out, in) for a
linear layer and (rows, features) for an embedding.

Sums are float64: where a base weight and its updates nearly cancel, a float32 sum is several units in float16's last
place off. On a 7B model that costs a tenth of the merge's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paddock.errors import ModelError
from paddock.weights import TensorInfo, Weights

# Elements that are computed at a time: what the caches of a core hold.
_PIECE = 2**18

Apply = Callable[[torch.Tensor, int], None]
"""Changes some rows of W, which begin at a given row, in place."""


@dataclass(frozen=True)
class Replace:
    """W := the adapter's tensor (`modules_to_save`, trained biases, a grown embedding)."""

    adapter: int
    """Position in the list of sources: 0 is the base, so adapters count from 1."""
    tensor: str

    def open(self, sources: Sequence[Weights]) -> Apply:
        source = sources[self.adapter]

        def apply(weight: torch.Tensor, start: int) -> None:
            weight.copy_(source.rows(self.tensor, start, start + len(weight)))

        return apply

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

    @property
    def whole(self) -> bool:
        """Whether a row of the result depends on all rows of W: the lengths are those of its columns."""
        return self.transposed and self.magnitude is not None

    def open(self, sources: Sequence[Weights]) -> Apply:
        source = sources[self.adapter]
        left, right = source.read(self.lora_B).double(), source.read(self.lora_A).double()
        if self.transposed:
            left, right = right.T.contiguous(), left.T.contiguous()
        magnitude = None if self.magnitude is None else source.read(self.magnitude).double().flatten()

        def apply(weight: torch.Tensor, start: int) -> None:
            rows = slice(start, start + len(weight))
            weight.addmm_(left[rows], right, alpha=self.scaling)
            if magnitude is not None:
                out = 1 if self.transposed else 0
                length = torch.linalg.vector_norm(weight, dim=1 - out, keepdim=True)
                wanted = magnitude if self.transposed else magnitude[rows]
                weight.mul_(wanted.reshape(length.shape) / length)

        return apply

    def __str__(self) -> str:
        kind = "LoRA" if self.magnitude is None else "DoRA"
        return f"{kind} of adapter {self.adapter}, scaling {self.scaling:g}"


@dataclass(frozen=True)
class AddBias:
    """b := b + scaling * the bias of lora_B (`lora_bias`)."""

    adapter: int
    tensor: str
    scaling: float

    def open(self, sources: Sequence[Weights]) -> Apply:
        bias = sources[self.adapter].read(self.tensor).double() * self.scaling

        def apply(weight: torch.Tensor, start: int) -> None:
            weight.add_(bias[start : start + len(weight)])

        return apply

    def __str__(self) -> str:
        return f"lora_B bias of adapter {self.adapter}, scaling {self.scaling:g}"


@dataclass(frozen=True)
class ReplaceRows:
    """W[rows] := the adapter's rows (`trainable_token_indices`)."""

    adapter: int
    tensor: str
    rows: tuple[int, ...]

    def open(self, sources: Sequence[Weights]) -> Apply:
        values, rows = sources[self.adapter].read(self.tensor), torch.tensor(self.rows)

        def apply(weight: torch.Tensor, start: int) -> None:
            here = (rows >= start) & (rows < start + len(weight))
            weight[rows[here] - start] = values[here].double()

        return apply

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

    @property
    def live(self) -> tuple[Operation, ...]:
        """The operations that the result shows: nothing before a replacement does."""
        replaced = [i for i, operation in enumerate(self.operations) if isinstance(operation, Replace)]
        return self.operations[replaced[-1] :] if replaced else self.operations

    @property
    def rows_at_a_time(self) -> int:
        rows = self.info.shape[0] if self.info.shape else 1
        if any(isinstance(operation, AddLora) and operation.whole for operation in self.live):
            return max(rows, 1)
        return max(1, _PIECE * rows // max(math.prod(self.info.shape), 1))

    def __str__(self) -> str:
        shape = "x".join(map(str, self.info.shape))
        begins = "" if self.source == self.name else f" <- {self.source}"
        then = "".join(f"; {operation}" for operation in self.operations)
        return f"{self.name} {shape} {str(self.info.dtype).removeprefix('torch.')}{begins}{then}"


@dataclass(frozen=True)
class MergedModel:
    """The tensors of a merged model (a `paddock.shards.Source`)."""

    outputs: dict[str, OutputTensor]
    sources: tuple[Weights, ...]
    """The base's weights, then each adapter's."""

    def pieces(self, name: str, said: dict[str, Any]) -> Iterator[torch.Tensor]:
        """One merged tensor. Of a changed one `said` is the Frobenius norm of merged - base over the rows that both
        have. Raises ModelError where it is not finite."""
        output, base = self.outputs[name], self.sources[0]
        rows, step = (output.info.shape[0] if output.info.shape else 1), output.rows_at_a_time
        if not output.operations:
            if not output.info.shape:
                yield base.read(output.source).to(output.info.dtype)
                return
            for start in range(0, rows, step):
                yield base.rows(output.source, start, min(start + step, rows)).to(output.info.dtype)
            return
        applies = [operation.open(self.sources) for operation in output.live]
        from_base = not isinstance(output.live[0], Replace)
        shape = (min(step, rows), *output.info.shape[1:])
        # Used again for each piece: fresh memory costs more than what is computed in it.
        exact, found = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=output.info.dtype)
        single, added = torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.float32)
        base_rows, squares = base.infos[output.source].shape[0], 0.0
        for start in range(0, rows, step):
            size = min(step, rows - start)
            before = base.rows(output.source, start, min(start + size, base_rows)) if start < base_rows else None
            if before is not None and before.dtype.itemsize == 2:
                # The same values: from 16 bits to 64 torch is five times as slow as from 32.
                before = single[: len(before)].copy_(before)
            weight, merged = exact[:size], found[:size]
            if from_base and before is not None:
                weight.copy_(before)
            for apply in applies:
                apply(weight, start)
            merged.copy_(weight)
            difference = added[:size].copy_(merged)
            if before is not None:
                difference[: len(before)].sub_(before)
            norm = torch.linalg.vector_norm(difference).item()
            if not math.isfinite(norm) and not merged.isfinite().all():
                raise ModelError(f"tensor {name}: the merge makes infinite or undefined values; is an adapter damaged?")
            if before is not None:
                if len(before) < size:  # of the rows that both have
                    norm = torch.linalg.vector_norm(difference[: len(before)]).item()
                squares += norm**2
            yield merged
        said[name] = float(f"{math.sqrt(squares):.6g}")

    def memory(self, name: str) -> int:
        """The bytes that one tensor takes while it is computed."""
        output = self.outputs[name]
        rows = max(1, output.info.shape[0] if output.info.shape else 1)
        elements = math.prod(output.info.shape) * min(1.0, output.rows_at_a_time / rows)
        factors = sum(8 * _elements(operation, self.sources) for operation in output.live)
        return int(elements * (8 + 4 + 4 + 2 * output.info.dtype.itemsize)) + factors


def _elements(operation: Operation, sources: Sequence[Weights]) -> int:
    """The number of an operation's own values that are in memory as a whole."""
    infos = sources[operation.adapter].infos
    if isinstance(operation, AddLora):
        return math.prod(infos[operation.lora_A].shape) + math.prod(infos[operation.lora_B].shape)
    return 0 if isinstance(operation, Replace) else math.prod(infos[operation.tensor].shape)
