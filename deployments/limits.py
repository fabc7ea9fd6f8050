"""Requests and tokens a minute by key, counted in one place for all replicas of the service.

A bucket holds a minute's worth and fills evenly (https://en.wikipedia.org/wiki/Token_bucket). A request takes one
at its start; its tokens are known only at its end, so they may leave the bucket below zero, and the next request
waits until that is made up for: over time a caller gets what the limit says.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray import serve

from deployments.keys import ApiKey


class Buckets:
    """The buckets of all keys."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._levels: dict[tuple[str, str], tuple[float, float]] = {}

    def admit(self, key: ApiKey) -> float:
        """Start a request: 0, or how many seconds it is too early, in which case nothing is taken."""
        requests, tokens = self._level(key, "requests"), self._level(key, "tokens")
        wait = 0.0
        if key.requests_per_minute and requests < 1:
            wait = (1 - requests) * 60 / key.requests_per_minute
        if key.tokens_per_minute and tokens < 1:
            wait = max(wait, (1 - tokens) * 60 / key.tokens_per_minute)
        if not wait:
            self._set(key, "requests", requests - 1)
        return wait

    def spend(self, key: ApiKey, tokens: int) -> None:
        """Tokens of a request that `admit` let in."""
        self._set(key, "tokens", self._level(key, "tokens") - tokens)

    def _level(self, key: ApiKey, kind: str) -> float:
        limit = (key.requests_per_minute if kind == "requests" else key.tokens_per_minute) or 0
        level, at = self._levels.get((key.name, kind), (float(limit), 0.0))
        return min(float(limit), level + (self._clock() - at) * limit / 60)

    def _set(self, key: ApiKey, kind: str, level: float) -> None:
        self._levels[key.name, kind] = (level, self._clock())


@serve.deployment(name="Limits", num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class Limits:
    """The buckets, behind a handle. Serve keeps one; where it is started anew all buckets are full."""

    def __init__(self) -> None:
        self._buckets = Buckets()

    async def admit(self, key: ApiKey) -> float:
        return self._buckets.admit(key)

    async def spend(self, key: ApiKey, tokens: int) -> None:
        self._buckets.spend(key, tokens)
