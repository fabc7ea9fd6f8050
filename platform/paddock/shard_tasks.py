"""All shards of a model, several at a time, as many as memory allows, with progress.

On a cluster each is one Ray task. Where there is none, threads of this process do the same: what they call lets go of
Python's lock, and a Ray of one's own takes longer to start than half a 7B model to write.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from paddock import cluster
from paddock.config_parts import ShardPart
from paddock.errors import ModelError, OutputError
from paddock.shards import Shard, Source, Written, kept, progress, write_shard
from paddock.weights import TensorInfo

# Measured, anonymous and shared memory: a Ray worker with torch, and a driver that has planned a merge with PEFT.
_WORKER, _DRIVER = 0.4 * 2**30, 0.7 * 2**30
# Below this much output a second worker is not worth its start.
_SHARE = 2**30
_TELL_EVERY_S = 5.0


def write_shards(
    source: Source,
    plan: Mapping[str, Sequence[str]],
    infos: Mapping[str, TensorInfo],
    directory: Path,
    notes: Path,
    how: ShardPart,
    *,
    what: str,
    here: bool = False,
) -> dict[str, Written]:
    """Write the shards of `plan` (file name -> tensor names) into a directory; return what is there now.

    notes: where finished shards are noted, so that a run that was killed keeps them. here: the paths are this node's
    own. Raises OutputError where the disk is full, ModelError where an input cannot be read any more, and what
    `source` raises; the others that are being written end first.
    """
    notes.mkdir(exist_ok=True)
    shards = [
        Shard(directory / file, notes / file, {name: infos[name] for name in names}) for file, names in plan.items()
    ]
    with ThreadPoolExecutor(2) as pool:
        found = {shard.file.name: done for shard, done in zip(shards, pool.map(kept, shards), strict=True) if done}
    if found:
        print(f"{what}: {len(found)} of {len(shards)} shards of a run that was cut short are kept", flush=True)
    missing = [shard for shard in shards if shard.file.name not in found]
    telling = _Progress(what, missing)
    with _workers(source, missing, how, here) as (start, at_a_time):
        waiting: dict[Future[Written], Shard] = {}
        queue = iter(missing)
        try:
            while True:
                while len(waiting) < at_a_time and (shard := next(queue, None)):
                    waiting[start(shard)] = shard
                if not waiting:
                    break
                done, _ = wait(waiting, timeout=_TELL_EVERY_S, return_when=FIRST_COMPLETED)
                for future in done:
                    found[waiting[future].file.name] = future.result()
                    del waiting[future]
                telling.tell()
        except Exception as error:
            # The directory that the others write into may go only when they have ended.
            wait(waiting)
            raise _explained(error) from error.__cause__
    telling.tell(last=True)
    return {file: found[file] for file in plan}


def at_a_time(how: ShardPart, shards: Sequence[Shard], source: Source) -> int:
    """How many shards are written at a time: what is asked for, else what `memory_gib` has room for."""
    if how.num_workers is not None:
        wanted = how.num_workers
    else:
        largest = max((source.memory(name) for shard in shards for name in shard.infos), default=0)
        room = int((how.memory_gib * 2**30 - _DRIVER) / (_WORKER + largest))
        wanted = min(room, sum(shard.bytes for shard in shards) // _SHARE)
    return max(1, min(wanted, len(shards)))


@contextmanager
def _workers(source: Source, shards: list[Shard], how: ShardPart, here: bool) -> Iterator[tuple[Any, int]]:
    """How a shard's writing is started, and how many at a time."""
    number = at_a_time(how, shards, source)
    if number == 1 or (how.num_workers is None and not cluster.is_there()):
        number = min(number, len(os.sched_getaffinity(0)))
        threads = torch.get_num_threads()
        try:
            # Pieces are small: what several threads wait for each other is more than what they save.
            with ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield lambda shard: pool.submit(write_shard, shard, source), number
        finally:
            torch.set_num_threads(threads)
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    started = cluster.connect()
    try:
        cluster.require([{"CPU": 1}], "writing shards")
        shared = ray.put(source)
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": 0}
        if here:
            node = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(**options)(write_shard)
        yield lambda shard: task.remote(shard, shared).future(), number
    finally:
        cluster.disconnect(started)


def _explained(error: Exception) -> Exception:
    """The error of a worker as one line, where a user can do something about it."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    if isinstance(error, ray.exceptions.RayError):
        return ModelError(
            f"a worker that wrote a shard died ({' '.join(str(error).split())[:200]}); was an input cut while it was"
            " read, or memory short? lower memory_gib or num_workers"
        )
    if isinstance(error, FileNotFoundError):
        return ModelError(f"{error.filename}: is gone while it was read; get the input again")
    if isinstance(error, OSError):
        return OutputError(f"{error.filename or 'output_dir'}: cannot be written ({error.strerror}); is the disk full?")
    return error


class _Progress:
    """Lines for the person who waits: bytes, tensors, speed, the time that is left."""

    def __init__(self, what: str, shards: Sequence[Shard]) -> None:
        self.what, self.shards, self.started = what, shards, time.monotonic()
        self.bytes, self.tensors = sum(shard.bytes for shard in shards), sum(len(shard.infos) for shard in shards)
        self.told = self.started

    def tell(self, *, last: bool = False) -> None:
        """A line, if the last one was long ago. What is on disk counts, whoever wrote it."""
        now = time.monotonic()
        if not self.shards or (not last and now - self.told < _TELL_EVERY_S):
            return
        self.told, seconds = now, max(now - self.started, 1e-3)
        found = [progress(shard) for shard in self.shards]
        size, tensors = sum(size for size, _ in found), sum(tensors for _, tensors in found)
        rate = size / seconds
        left = f"{(self.bytes - size) / rate:,.0f} s left" if rate and not last else f"{seconds:.1f} s"
        print(
            f"{self.what}: {size / 2**20:,.1f} of {self.bytes / 2**20:,.1f} MiB, {tensors} of {self.tensors} tensors,"
            f" {rate / 2**20:,.0f} MiB/s, {left}",
            flush=True,
        )
