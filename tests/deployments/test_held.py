"""Which adapters a replica holds, as its answers and Serve's controller have it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client

from paddock.ingress.answers import ADAPTER
from paddock.service import start
from tests.deployments.test_public import make_adapter


@pytest.fixture(scope="module")
def url(service: Any, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service of three adapters, of which an engine holds two."""
    adapters = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("one", "two", "肺炎")):
        make_adapter(base_model, adapters / name, number)
    engine = {"dtype": "float32", "max_model_len": 512, "max_loras": 1, "max_cpu_loras": 2}
    start(service.config.model_copy(update={"adapters": str(adapters), "engine": engine}), "held", route_prefix="/held")
    yield f"{service.url}/held"
    serve.delete("held")


def told() -> set[str]:
    """What the controller knows, and tells Serve's proxies and handles."""
    running = ray.get(_get_global_client()._controller._all_running_replicas.remote())
    (replica,) = (infos[0] for of, infos in running.items() if (of.app_name, of.name) == ("held", "LLM"))
    return set(replica.multiplexed_model_ids)


def becomes(expected: set[str]) -> bool:
    deadline = time.monotonic() + 20
    while (found := told()) != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    return found == expected


@pytest.mark.slow
def test_an_answer_says_which_adapter_gave_it_and_serve_is_told_who_holds_it(url: str) -> None:
    def ask(model: str, path: str = "/v1/completions", **more: Any) -> httpx.Response:
        asked = {"input": "x"} if path == "/generate" else {"prompt": "x", "max_tokens": 2, **more}
        return httpx.post(f"{url}{path}", json={"model": model, **asked}, timeout=60)

    assert told() == set()
    assert ADAPTER not in ask("base").headers
    assert ADAPTER not in ask("none").headers
    assert ask("one").headers[ADAPTER] == "one"
    assert ask("one", stream=True).headers[ADAPTER] == "one"
    assert becomes({"one"})
    assert ask("one", max_tokens=-1).status_code == 400
    assert ADAPTER not in ask("one", max_tokens=-1).headers
    assert ask("base:肺炎", "/generate").headers[ADAPTER] == "%E8%82%BA%E7%82%8E"
    assert becomes({"one", "肺炎"})
    ask("one")
    assert ask("two").headers[ADAPTER] == "two"
    assert becomes({"one", "two"})  # the one that was not asked for the longest had to go
