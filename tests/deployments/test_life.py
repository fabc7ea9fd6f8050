"""Replicas that come, go, hang and are changed, with the real engine."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve

from paddock.config import ServeConfig
from paddock.errors import ResourceError
from paddock.service import start

pytestmark = pytest.mark.slow
LONG = {"model": "base", "prompt": "咳嗽", "max_tokens": 480, "ignore_eos": True}


def running(name: str) -> int:
    app = serve.status().applications[name]
    return app.deployments["LLM"].replica_states.get("RUNNING", 0)


def until(what: Callable[[], bool], seconds: float) -> float:
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < seconds, serve.status()
        time.sleep(0.5)
    return time.monotonic() - begun


def processes(port: int, cluster: Any, name: str) -> list[psutil.Process]:
    details = httpx.get(f"{cluster.dashboard}/api/serve/applications/").json()["applications"][name]
    return [psutil.Process(r["pid"]) for r in details["deployments"]["LLM"]["replicas"] if r["state"] == "RUNNING"]


@pytest.fixture
def config(assets: Path) -> ServeConfig:
    return ServeConfig(
        model=str(assets / "base"),
        engine={"dtype": "float32", "max_model_len": 512},
        autoscaling={"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": 4},
        ray_actor_options={"num_cpus": 0.1},
        health_check_timeout_s=10,
    )


@pytest.fixture
def url(http_port: int) -> Iterator[str]:
    yield f"http://127.0.0.1:{http_port}/life"
    serve.delete("life")


def test_replicas_follow_the_load_from_none_and_back_and_no_request_is_cut(url: str, config: ServeConfig) -> None:
    scaling = {"min_replicas": 0, "initial_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 4}
    scaling |= {"upscale_delay_s": 2, "downscale_delay_s": 4, "metrics_interval_s": 1, "look_back_period_s": 4}
    start(config.model_copy(update={"autoscaling": scaling}), "life", route_prefix="/life")
    until(lambda: running("life") == 0, 60)

    stop, statuses = threading.Event(), list[int]()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(httpx.post(f"{url}/v1/completions", json=LONG, timeout=300).status_code)

    with ThreadPoolExecutor(12) as pool:
        for _ in range(12):
            pool.submit(ask)
        until(lambda: running("life") >= 1, 150)
        until(lambda: running("life") == 2, 150)
        time.sleep(5)
        stop.set()
    # Long answers that one replica is still at when there is too little for two: it goes when it is done.
    with ThreadPoolExecutor(2) as pool:
        last = [pool.submit(httpx.post, f"{url}/v1/completions", json=LONG, timeout=300) for _ in range(2)]
        until(lambda: running("life") <= 1, 120)
        assert [answer.result().status_code for answer in last] == [200, 200]
    until(lambda: running("life") == 0, 120)
    assert set(statuses) == {200}


def test_a_hung_engine_is_noticed_and_replaced(url: str, config: ServeConfig, http_port: int, ray_cluster: Any) -> None:
    start(config, "life", route_prefix="/life")
    (replica,) = processes(http_port, ray_cluster, "life")
    (engine,) = [child for child in replica.children() if "EngineCore" in " ".join(child.cmdline())]
    engine.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    # It waits for a replica that works, and is answered by it.
    answer = httpx.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 3}, timeout=200)
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - begun > 10
    assert not engine.is_running()
    assert processes(http_port, ray_cluster, "life") != [replica]


def test_a_change_that_leaves_nobody_to_answer_is_refused(
    url: str, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(config, "life", route_prefix="/life")
    from deployments import replicas

    real = serve.status()
    real.applications["life"].status = "DEPLOYING"
    monkeypatch.setattr(serve, "status", lambda: real)
    bundles = [{"CPU": 0.1}]
    replicas.require_room_for_change(config, bundles)
    changed = config.model_copy(update={"engine": {**config.engine, "max_model_len": 256}})
    replicas.require_room_for_change(changed, bundles)
    with pytest.raises(ResourceError, match=r"no room for 1 more beside the 1 of 'life'.*allow_downtime=true"):
        replicas.require_room_for_change(changed, [{"CPU": 2}])
    scaled = config.model_copy(update={"autoscaling": {"min_replicas": 2, "max_replicas": 2}})
    replicas.require_room_for_change(scaled, [{"CPU": 2}])
    allowed = changed.model_copy(update={"allow_downtime": True})
    replicas.require_room_for_change(allowed, [{"CPU": 2}])
