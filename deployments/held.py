"""Tells Serve which adapters a replica holds, as `serve.multiplexed` tells its models: requests for them prefer it.

A request says which it is for in a header that only Serve's own proxy sets (`paddock.ingress.holders`), or by handle as
`multiplexed_model_id`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ray import serve
from ray.serve._private.common import ReplicaID, RequestRoutingInfo
from ray.serve.context import _get_global_client

logger = logging.getLogger("ray.serve")

PERIOD_S = 1.0  # as Serve's own


class Held:
    """Tells what a replica holds whenever that is other than it was."""

    def __init__(self, held: Callable[[], list[str]]) -> None:
        self._held, self._told = held, set[str]()
        self._replica: ReplicaID = serve.get_replica_context().replica_id

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            names = set(self._held())
            if names != self._told:
                try:
                    await asyncio.to_thread(self._tell, sorted(names))
                    self._told = names
                except Exception as error:  # the service goes on without
                    logger.warning("Serve was not told which adapters this replica holds: %s", error)
            await asyncio.sleep(PERIOD_S)

    def _tell(self, names: list[str]) -> None:
        info = RequestRoutingInfo(replica_id=self._replica, multiplexed_model_ids=names)
        _get_global_client().record_request_routing_info(info)
