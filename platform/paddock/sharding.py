"""A base that does not fit one card, in shards over the workers' cards (FSDP2).

Only what is frozen is sharded: each layer's weights are gathered before it runs and freed after it, forward and
backward. What is trained stays whole on every worker, so that a step's sum, the optimizer, checkpoints and resuming are
those of any other run, and so are the numbers.

A card holds 1 / workers of the base, two layers and the embedding, head and norm in whole, what is trained, and
the activations. The base's files are memory-mapped: while it is loaded, a card holds one whole layer beyond its
shards, and the host one copy of the base for all its workers, in the page cache (of their own where model.dtype is
another than the files').
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(root: nn.Module, layers: nn.ModuleList, device: torch.device) -> None:
    """Put a model on the CPU onto the workers' devices: the frozen parameters in shards, the rest as it is.

    root: what is called; layers: its parts that are gathered one at a time. One worker alone holds everything.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        trained = {parameter for parameter in root.parameters() if parameter.requires_grad}
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=trained)
        # By default a root stays whole between passes, until rank 0 alone saves it and waits for the others for ever.
        fully_shard(root, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    root.to(device)


def turns(model: nn.Module, count: int, rank: int, world: int) -> list[tuple[int, int]]:
    """Which of `count` forward passes a worker makes: (index, 1), or (index, 0) for one whose result must not count.

    Workers that gather a sharded model's layers from each other all make the same number of passes.
    """
    even = -count % world if isinstance(model, FSDPModule) else 0
    return [(index % count, int(index < count)) for index in range(rank, count + even, world)]
