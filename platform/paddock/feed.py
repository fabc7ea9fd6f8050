"""Batches on their way to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

Batch = dict[str, torch.Tensor]


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches, one by one, on a device; a GPU's next one is made and copied while it works on the last."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    source = iter(batches)

    def load() -> tuple[Batch, torch.cuda.Event] | None:
        batch = next(source, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            moved = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
            return moved, stream.record_event()

    with ThreadPoolExecutor(1, "feed") as thread:
        ahead = thread.submit(load)
        while (loaded := ahead.result()) is not None:
            ahead = thread.submit(load)
            batch, copied = loaded
            working = torch.cuda.current_stream(device)
            working.wait_event(copied)
            for tensor in batch.values():
                tensor.record_stream(working)
            yield batch
