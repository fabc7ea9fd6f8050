"""Joining Ray, and asking it for room before anything starts.

Ray waits for ever, in silence, for resources that no node has. So every job adds up what it will need and
compares that with what the cluster has, or what its autoscaler can add.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private.services import get_ray_address_from_environment
from ray._private.state import state as ray_state
from ray.experimental import internal_kv

from paddock.errors import ResourceError

Resources = Mapping[str, float]
_BOOTSTRAP_CONFIG = "~/ray_bootstrap_config.yaml"
# Ray counts in ten-thousandths; sums of fractions are compared as coarsely.
_GRAIN = 1e-4
_MANY = 1000


def connect() -> bool:
    """Join the cluster of `RAY_ADDRESS`, of this submitted job or of this machine; else start a local Ray.

    Returns whether this call started it, so that its caller stops what it started. Raises ResourceError where
    `RAY_ADDRESS` names no cluster to join.
    """
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise ResourceError(
            f"RAY_ADDRESS={address} is where jobs are submitted; run this with `ray job submit ... -- python -m ...`,"
            " or unset RAY_ADDRESS to run it on this machine"
        )
    # Usage statistics are the user's to send, and a laptop without a network waits for them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Ray Train's controller looks after its workers every 2 s by default; so long takes each report.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Its patched print shows every line of a worker twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    try:
        _knock(address)
        ray.init(logging_level=logging.WARNING, log_to_driver=True)
    except (OSError, ValueError) as error:
        if not address:
            raise
        raise ResourceError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({' '.join(str(error).split())[:200]}); start one"
            " with `ray start --head`, or unset RAY_ADDRESS to run on this machine"
        ) from None
    # Their progress is told by ours.
    for name in ("ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return not _joined()


def is_there() -> bool:
    """Whether there is a cluster that `connect` would join; else it would start a Ray of this machine's own."""
    try:
        return ray.is_initialized() or get_ray_address_from_environment(None, None) not in (None, "local")
    except ConnectionError:  # RAY_ADDRESS=auto, and there is none: `connect` says so
        return True


def disconnect(started: bool) -> None:
    """Stop the local Ray that `connect` started; leave a cluster that it joined."""
    if started:
        if "ray.serve" in sys.modules:
            # Where there was a service, its client's threads would start another Ray to report to.
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            sys.modules["ray.serve"].shutdown()
        ray.shutdown()


def require(bundles: Sequence[Resources], what: str) -> None:
    """Raise ResourceError where the cluster neither has nor can grow to nodes that hold all bundles at once.

    bundles: resources by Ray's names (`{"CPU": 1, "GPU": 1}`), one entry a process. A bundle never spans nodes.
    """
    has, can_have = _nodes(), _nodes_when_grown()
    unplaced = min((_unplaced(bundles, nodes) for nodes in (has, can_have)), key=len)
    if unplaced:
        limit = "has or can grow to" if can_have else "has"
        nodes = Counter(map(_words, can_have or has))
        found = ", ".join(f"{n} node{'s' * (n > 1)} of {node}" for node, n in nodes.items()) or "no nodes"
        wanted = ", ".join(f"{n} x {bundle}" for bundle, n in Counter(map(_words, bundles)).items())
        raise ResourceError(
            f"{what} needs {wanted}, each on one node; the cluster {limit} {found}, so {len(unplaced)} of"
            f" {len(bundles)} would wait for ever: ask for less (scaling.num_workers, resources_per_worker,"
            " serve.ray_actor_options) or add nodes"
        )
    free = ray.available_resources()
    awaited = [f"{v:g} {k}" for k, v in _total(bundles).items() if v > free.get(k, 0) + _GRAIN]
    if awaited:
        print(f"{what}: waiting for {', '.join(awaited)} to be free or added by the autoscaler", flush=True)


def has_room(bundles: Sequence[Resources]) -> bool:
    """Whether all bundles fit at once into what is free now, or into what an autoscaler can add."""
    free = ray_state.available_resources_per_node()
    # A grown cluster begins empty: what is in use takes its place first.
    used = [
        {name: node["Resources"].get(name, 0.0) - free[node["NodeID"]].get(name, 0.0) for name in ("CPU", "GPU")}
        for node in ray.nodes()
        if node["NodeID"] in free
    ]
    return not _unplaced(bundles, list(free.values())) or not _unplaced([*used, *bundles], _nodes_when_grown())


def has_gpus() -> bool:
    """Whether the cluster has, or can grow to, a GPU."""
    return any(node.get("GPU", 0) > 0 for node in (*_nodes(), *_nodes_when_grown()))


def has_several_nodes() -> bool:
    """Whether the cluster has, or can grow to, more than one node."""
    return max(len(_nodes()), len(_nodes_when_grown())) > 1


def _nodes() -> list[Resources]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _nodes_when_grown() -> list[Resources]:
    """Every node of the cluster at its largest, or none where no autoscaler tells.

    `ray up` leaves its configuration on the head, where the drivers of submitted jobs run; other autoscalers may
    tell Ray, node group by node group.
    """
    file = Path(_BOOTSTRAP_CONFIG).expanduser()
    if file.is_file():
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        types: dict[str, Any] = config.get("available_node_types", {})
        head = config.get("head_node_type")
        heads = [types[head].get("resources", {})] if head in types else []
        workers = [
            (kind.get("resources", {}), kind.get("max_workers", config["max_workers"]))
            for name, kind in types.items()
            if name != head
        ]
        return [*heads, *(node for node, count in workers for _ in range(min(count, config["max_workers"])))]
    groups = getattr(ray_state.get_cluster_config(), "node_group_configs", ())
    # -1: as many as are wanted.
    return [
        dict(group.resources) for group in groups for _ in range(group.max_count if group.max_count >= 0 else _MANY)
    ]


def _unplaced(bundles: Sequence[Resources], nodes: Sequence[Resources]) -> list[Resources]:
    """The bundles that find no room, the largest placed first, each on the first node that holds it."""
    room = [dict(node) for node in nodes]
    left = []
    for bundle in sorted(bundles, key=lambda b: sorted(b.values()), reverse=True):
        node = next((n for n in room if all(n.get(k, 0) + _GRAIN >= v for k, v in bundle.items())), None)
        if node is None:
            left.append(bundle)
        else:
            for name, amount in bundle.items():
                node[name] = node.get(name, 0) - amount
    return left


def _total(bundles: Sequence[Resources]) -> Counter[str]:
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)  # type: ignore[arg-type]  # a Counter of floats
    return total


def _words(resources: Resources) -> str:
    """What a person calls resources: CPUs, GPUs and what has a name of its own."""
    kept = {k: v for k, v in resources.items() if v and not k.startswith(("node:", "accelerator_type:"))}
    kept = {k: v for k, v in kept.items() if k not in ("memory", "object_store_memory")}
    return " + ".join(f"{v:g} {k}" for k, v in kept.items()) or "no CPU"


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray would try for a minute, then end the process."""
    host, colon, port = address.rpartition(":")
    if colon and "://" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _joined() -> bool:
    """Whether this driver's Ray was there before it: only a Ray of its own dies with its driver."""
    node = ray._private.worker._global_node
    return bool(node is None or not node.is_head())


def ask_to_stop(flag: str) -> None:
    """Ask a running job to save and end; `flag` is the name it watches."""
    internal_kv._internal_kv_put(flag, b"1")


class Watch:
    """What the cluster asks of a running job; each question is a call to the cluster's head, under a millisecond."""

    _EVERY_S = 2.0

    def __init__(self, flag: str) -> None:
        self.flag = flag
        self._draining: set[str] = set()
        self._looked = float("-inf")

    def stops(self) -> bool:
        """Whether `ask_to_stop` was called."""
        return bool(internal_kv._internal_kv_exists(self.flag))

    def preempts(self) -> bool:
        """Whether a node is about to be taken away that was not when this was asked before."""
        if time.monotonic() - self._looked < self._EVERY_S:
            return False
        self._looked = time.monotonic()
        draining = set(ray_state.get_draining_nodes())
        new = draining - self._draining
        self._draining = draining
        return bool(new)
