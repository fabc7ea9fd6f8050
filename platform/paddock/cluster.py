"""Joining Ray, and asking it for room before anything starts.

Ray waits for ever, in silence, for resources that no node has. So every job adds up what it will need and
compares that with what the cluster has, or what its autoscaler can add.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import ray
from ray._private.state import state as ray_state

from paddock.errors import ResourceError


def connect() -> bool:
    """Join the cluster of `RAY_ADDRESS`, of this submitted job or of this machine; else start a local Ray.

    Returns whether this call started it, so that its caller stops what it started.
    """
    if ray.is_initialized():
        return False
    # Usage statistics are the user's to send, and a laptop without a network waits for them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Ray Train's controller looks after its workers every 2 s by default; so long takes each report.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Its patched print shows every line of a worker twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    ray.init(logging_level=logging.WARNING, log_to_driver=True)
    # Their progress is told by ours.
    for name in ("ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return not _joined()


def disconnect(started: bool) -> None:
    """Stop the local Ray that `connect` started; leave a cluster that it joined."""
    if started:
        from ray import serve

        # Where there was a service, its client's threads would start another Ray to report to.
        serve.shutdown()
        ray.shutdown()


def require(bundles: Sequence[Mapping[str, float]], what: str) -> None:
    """Raise ResourceError where the cluster neither has nor can grow to all bundles at once.

    bundles: resources by Ray's names (`{"CPU": 1, "GPU": 1}`), one entry a process.
    """
    wanted: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            wanted[name] = wanted.get(name, 0) + amount
    has = {name: float(amount) for name, amount in ray.cluster_resources().items()}
    can_grow_to = ray_state.get_max_resources_from_cluster_config() or {}
    for name, amount in wanted.items():
        most = max(has.get(name, 0.0), float(can_grow_to.get(name, 0)))
        # Ray counts in ten-thousandths; sums of fractions are compared as coarsely.
        if amount > most + 1e-4:
            limit = "has or can grow to" if can_grow_to else "has"
            raise ResourceError(
                f"{what} needs {amount:g} {name}, the cluster {limit} {most:g}; ask for less (scaling.num_workers,"
                " resources_per_worker, serve.ray_actor_options) or add nodes"
            )
    free = ray.available_resources()
    awaited = [f"{amount:g} {name}" for name, amount in wanted.items() if amount > free.get(name, 0) + 1e-4]
    if awaited:
        print(f"{what}: waiting for {', '.join(awaited)} to be free or added by the autoscaler", flush=True)


def has_gpus() -> bool:
    """Whether the cluster has, or can grow to, a GPU."""
    can_grow_to = ray_state.get_max_resources_from_cluster_config() or {}
    return bool(ray.cluster_resources().get("GPU", 0) > 0 or can_grow_to.get("GPU", 0) > 0)


def _joined() -> bool:
    """Whether this driver's Ray was there before it: only a Ray of its own dies with its driver."""
    node = ray._private.worker._global_node
    return bool(node is None or not node.is_head())
