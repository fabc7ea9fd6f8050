"""Where HAProxy sends requests for adapters: the configuration that this Serve writes, before replicas of a test."""

from __future__ import annotations

import csv
import json
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from paddock.ingress import haproxy
from paddock.ingress.answers import ADAPTER
from paddock.ingress.haproxy import binary, close, prefer_holders
from paddock.ports import free_port

OBSERVES = "observe_error_limit" in HAProxyConfig.__dataclass_fields__  # from Ray 2.60 on
NAMES = [f"adapter-{number}" for number in range(12)]


class Replica(ThreadingHTTPServer):
    """Answers with its name, and tells where an adapter answered: any but `base` and `none`, which is not there."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, name: str) -> None:
        self.name, self.free = name, threading.Event()
        self.free.set()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def die(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Replica

    def do_GET(self) -> None:
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        model = json.loads(body)["model"].removeprefix("base:")
        self.server.free.wait()
        headers = {} if model in ("base", "none") else {ADAPTER: quote(model, safe="")}
        self._answer(404 if model == "none" else 200, headers)

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        body = self.server.name.encode()
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    started = [Replica(f"replica-{number}") for number in range(4)]
    yield started
    for replica in started:
        replica.free.set()
        replica.die()


def written(place: Path, port: int, backends: list[BackendConfig]) -> str:
    """What Serve writes."""
    settings: dict[str, Any] = {
        "socket_path": f"{place}/admin.sock",
        "server_state_file": f"{place}/server-state",
        "server_state_base": str(place),
        "metrics_socket_path": f"{place}/metrics.sock",
        "retry_on": "conn-failure empty-response",
        "retries": 6,
        "nbthread": 2,
        "bufsize": 65536,
        "http_options": HTTPOptions(host="127.0.0.1", port=port),
    }
    if OBSERVES:
        settings |= {"observe_mark_down_enabled": True, "observe_error_limit": 1}
    configs = {backend.name: backend for backend in backends}
    HAProxyApi(HAProxyConfig(**settings), configs, f"{place}/haproxy.cfg")._generate_config_file_internal()
    return (place / "haproxy.cfg").read_text(encoding="utf-8")


def backend(servers: dict[str, int], name: str = "http-app", **settings: Any) -> BackendConfig:
    listed = [ServerConfig(server, "127.0.0.1", port) for server, port in servers.items()]
    fallback = ServerConfig("fallback", "127.0.0.1", 9)
    return BackendConfig(name, "/", app_name="app", servers=listed, fallback_server=fallback, **settings)


class Ingress:
    """HAProxy, started anew whenever its replicas change, as Serve does."""

    def __init__(self, place: Path) -> None:
        self.place, self.port = place, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    def before(self, replicas: list[Replica]) -> None:
        self.end()
        ports = {replica.name: replica.server_address[1] for replica in replicas}
        text = prefer_holders(close(written(self.place, self.port, [backend(ports)]), 20_000))
        (self.place / "haproxy.cfg").write_text(text, encoding="utf-8")
        self.process = subprocess.Popen(
            [str(binary()), "-db", "-f", self.place / "haproxy.cfg"], stderr=subprocess.DEVNULL
        )
        for _ in range(100):
            try:
                self.client.get("/-/routes")
                return
            except httpx.ConnectError:
                time.sleep(0.05)

    def ask(self, model: str, **more: Any) -> str:
        """Who answered. Whoever asks next finds HAProxy knowing that this request is over."""
        body = {"prompt": "咳嗽", "model": model, **more}
        answered = self.client.post("/v1/completions", json=body).text
        while self.count("scur"):
            time.sleep(0.001)
        return answered

    def count(self, what: str) -> int:
        """Of HAProxy's statistics: `scur` requests are with replicas now, `wredis` were not taken by one."""
        with socket.socket(socket.AF_UNIX) as admin, admin.makefile("r") as answer:
            admin.connect(f"{self.place}/admin.sock")
            admin.sendall(b"show stat\n")
            return sum(int(row[what]) for row in csv.DictReader(answer) if row["svname"].startswith("replica"))

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def ingress(tmp_path: Path) -> Iterator[Ingress]:
    started = Ingress(tmp_path)
    yield started
    started.end()


def test_an_adapter_stays_with_a_replica_and_the_base_goes_everywhere(
    ingress: Ingress, replicas: list[Replica]
) -> None:
    ingress.before(replicas)
    homes = {}
    for name in [*NAMES, "肺炎 a/b", "x" * 300]:
        ingress.ask(name)  # wherever there is least to do
        homes[name] = ingress.ask(name)
        assert {ingress.ask(name) for _ in range(6)} == {homes[name]}
        ingress.ask(f"base:{name}", stream=True)
        assert ingress.ask(f"base:{name}", prompt="x" * 20_000) == homes[name]
    assert len(set(homes.values())) == 4
    for model in ("base", "none"):
        assert set(Counter(ingress.ask(model) for _ in range(8)).values()) == {2}


def test_a_body_that_names_no_adapter_is_as_before(ingress: Ingress, replicas: list[Replica]) -> None:
    ingress.before(replicas)
    ingress.ask("one")
    for content in (b"", b"[]", b'{"model": 3}', b'{"model": ["one"]}', b'{"model": ', b"\xff"):
        # The replicas of this test cut such a connection; nobody else does.
        assert ingress.client.post("/v1/completions", content=content).status_code == 503
    assert ingress.client.get("/v1/models").status_code == 200


def test_where_the_holder_is_dead_another_answers_and_it_is_asked_no_more(
    ingress: Ingress, replicas: list[Replica]
) -> None:
    ingress.before(replicas)
    ingress.ask("one")
    home = ingress.ask("one")
    (holder,) = (replica for replica in replicas if replica.name == home)
    others = [replica for replica in replicas if replica is not holder]
    holder.die()
    after = [ingress.ask("one") for _ in range(6)]
    assert set(after) <= {replica.name for replica in others}
    assert len(set(after[1:])) == 1
    if OBSERVES:
        assert ingress.count("wredis") == 1


def test_few_adapters_move_when_a_replica_goes_or_comes(ingress: Ingress, replicas: list[Replica]) -> None:
    ingress.before(replicas)
    both = [ingress.ask(name) and ingress.ask(name) for name in NAMES]
    ingress.before([replicas[2], replicas[0], replicas[3]])
    fewer = [ingress.ask(name) and ingress.ask(name) for name in NAMES]
    for now, then in zip(fewer, both, strict=True):
        assert then in (now, "replica-1")


def test_a_hot_adapter_spills_over_to_the_neighbour(ingress: Ingress, replicas: list[Replica]) -> None:
    ingress.before(replicas)
    ingress.ask("one")
    for replica in replicas:
        replica.free.clear()
    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(ingress.ask, "one") for _ in range(40)]
        time.sleep(1)
        for replica in replicas:
            replica.free.set()
        answers = Counter(future.result() for future in asked)
    assert len(answers) >= 3
    assert max(answers.values()) <= 16  # 1.5 times a fourth, and one


def test_what_is_not_as_expected_stays(tmp_path: Path) -> None:
    two = {"one": 1, "two": 2}
    for others in (
        [],
        [backend({"one": 1})],
        [backend(two, protocol=RequestProtocol.GRPC)],
        [backend(two, ingress_request_router_servers=[ServerConfig("r", "127.0.0.1", 3, "x")])],
    ):
        if others and others[0].ingress_request_router_servers:
            for server in others[0].servers:
                server.replica_id = server.name
        text = close(written(tmp_path, 1, others), 20_000)
        assert prefer_holders(text) == text
    text = close(written(tmp_path, 1, [backend(two)]), 20_000)
    assert prefer_holders(text) != text
    for damaged in (text.replace("use_backend", "use_backend "), text.replace("frontend http_", "frontend https_")):
        assert prefer_holders(damaged) == damaged


@pytest.mark.parametrize(("knows", "prefers"), [("true", True), ("false", False)])
def test_a_haproxy_that_knows_none_of_it_starts_without(
    knows: str, prefers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(tmp_path, 1, [backend({"one": 1, "two": 2})])
    started: list[str] = []
    monkeypatch.setattr(haproxy, "binary", lambda: shutil.which(knows))
    monkeypatch.setattr(haproxy.os, "execv", lambda file, arguments: started.extend(arguments))
    monkeypatch.setattr(haproxy.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    haproxy.main(["-f", str(tmp_path / "haproxy.cfg")])
    assert started[1:] == ["-f", str(tmp_path / "haproxy.cfg")]
    closed = close(text, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    found = (tmp_path / "haproxy.cfg").read_text(encoding="utf-8")
    assert found == (prefer_holders(closed) if prefers else closed)
