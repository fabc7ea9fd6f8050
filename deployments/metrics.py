"""vLLM's metrics in Ray's scrape, beside Serve's: one Prometheus target a node, whatever replicas it holds.

vLLM keeps them in its process (`/metrics` answers with those of one replica). They are copied from there every few
seconds, so that a token costs no call to Ray. Names are those of vLLM's own logger for Ray: `vllm:x` becomes
`ray_vllm_x`, with the labels `Application`, `Deployment` and `ReplicaId`. All are gauges to Ray, of the same values:
`rate` and `histogram_quantile` read counters and buckets as ever.
"""

from __future__ import annotations

import asyncio
import logging

from prometheus_client import REGISTRY, CollectorRegistry
from ray import serve
from ray.util.metrics import Gauge

logger = logging.getLogger("ray.serve")

PERIOD_S = 5.0
_PREFIX = "vllm:"


class RayExport:
    """Copies what a registry has of vLLM into Ray's metrics."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._gauges: dict[str, Gauge] = {}
        context = serve.get_replica_context()
        self._tags = {"Application": context.app_name, "Deployment": context.deployment}
        self._tags["ReplicaId"] = context.replica_id.unique_id

    def copy(self) -> None:
        for metric in self._registry.collect():
            for sample in metric.samples if metric.name.startswith(_PREFIX) else ():
                if not sample.name.endswith("_created"):
                    tags = {**sample.labels, **self._tags}
                    self._gauge(sample.name, metric.documentation, tuple(tags)).set(sample.value, tags=tags)

    def _gauge(self, name: str, documentation: str, tag_keys: tuple[str, ...]) -> Gauge:
        if name not in self._gauges:
            name_for_ray = name.replace(":", "_")
            self._gauges[name] = Gauge(name_for_ray, description=documentation, tag_keys=tag_keys)
        return self._gauges[name]

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.copy)
            except Exception:  # the service goes on without
                logger.exception("metrics were not exported")
            await asyncio.sleep(PERIOD_S)
