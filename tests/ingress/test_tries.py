"""A request that kills whoever works on it, and what it takes with it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
from ray import serve

from paddock import ingress
from paddock.ingress import tries
from paddock.ingress.tries import HEADER, Tries
from paddock.ports import free_port

# What Serve starts of a replica where HAProxy stands before it, with an engine that one request ends.
REPLICA = """
import os, sys, uvicorn
from starlette.responses import PlainTextResponse
from paddock.ingress import tries
from paddock.ingress.proxy import Proxied

async def app(scope, receive, send):
    if (await receive())["body"] == b"poison":
        os._exit(1)
    await PlainTextResponse(str(scope[tries.SCOPE]))(scope, receive, send)

uvicorn.run(Proxied(app), host="127.0.0.1", port=int(sys.argv[1]), log_level="critical", lifespan="off")
"""
CONFIG = """global
    stats socket {admin} mode 666 level admin expose-fd listeners
    maxconn 100
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
    option redispatch 1
    retry-on {retry_on}
    retries {retries}
    errorfile 502 /dev/null
    errorfile 503 /dev/null
    balance roundrobin
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
{servers}
"""
SERVER = "    server s{0} 127.0.0.1:{0} check observe layer4 error-limit 1 on-error mark-down"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tries.PLACE, str(tmp_path / "tries"))
    return tmp_path / "tries"


def test_a_request_is_counted_wherever_it_is_begun_until_it_is_answered(place: Path) -> None:
    request, another = {HEADER: str(uuid.uuid4())}, {HEADER: str(uuid.uuid4())}
    assert Tries(request).begin() == 1
    assert Tries(another).begin() == 1
    last = Tries(request)
    assert [last.begin(), last.begin()] == [2, 3]
    assert place.stat().st_mode & 0o077 == 0
    last.end()
    assert [file.name for file in place.iterdir()] == [another[HEADER]]
    assert Tries(request).begin() == 1


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "x" * 36, f"{uuid.uuid4()}/"])
def test_a_name_that_is_not_haproxys_names_no_file(place: Path, name: str) -> None:
    assert [Tries({HEADER: name}).begin() for _ in range(2)] == [1, 1]
    assert not place.exists() or not list(place.iterdir())


def test_without_haproxy_the_header_is_only_a_clients(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tries.PLACE)
    assert [Tries({HEADER: str(uuid.uuid4())}).begin() for _ in range(2)] == [1, 1]
    assert not place.exists()


def test_a_disk_that_takes_nothing_stops_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(tries.PLACE, str(tmp_path / "file"))
    request = Tries({HEADER: str(uuid.uuid4())})
    assert [request.begin(), request.begin()] == [1, 2]
    request.end()


def test_what_nobody_came_back_for_goes_and_nothing_else(place: Path) -> None:
    old, new, foreign = place / str(uuid.uuid4()), place / str(uuid.uuid4()), place / "somebody's"
    place.mkdir()
    for file in (old, new, foreign):
        file.touch()
    for file in (old, foreign):
        os.utime(file, (1, 1))
    Tries({HEADER: str(uuid.uuid4())})
    assert set(place.iterdir()) == {new, foreign}


def test_it_goes_on_counting_where_the_directory_was_tidied_away(place: Path) -> None:
    Tries({HEADER: str(uuid.uuid4())}).begin()
    shutil.rmtree(place)
    request = {HEADER: str(uuid.uuid4())}
    assert [Tries(request).begin() for _ in range(2)] == [1, 2]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_for(*ports: int) -> None:
    begun = time.monotonic()
    for port in ports:
        while not listens(port):
            assert time.monotonic() - begun < 60
            time.sleep(0.1)


@pytest.fixture
def replicas(place: Path) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    started = {
        port: subprocess.Popen([sys.executable, "-c", REPLICA, str(port)]) for port in (free_port() for _ in range(4))
    }
    wait_for(*started)
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def test_a_request_that_kills_is_begun_twice_and_no_more(
    replicas: dict[int, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    variables, port = ingress._haproxy_environment(), free_port()
    file, admin = tmp_path / "haproxy.cfg", Path(ingress._private_directory(), f"test-{port}.sock")
    text = CONFIG.format(
        admin=admin,
        port=port,
        servers="\n".join(map(SERVER.format, replicas)),
        retry_on=variables["RAY_SERVE_HAPROXY_RETRY_ON"],
        retries=variables["RAY_SERVE_HAPROXY_RETRIES"],
    )
    file.write_text(text, encoding="utf-8")
    with subprocess.Popen(
        [Path(ingress.__file__).with_name("haproxy"), "-db", "-f", file],
        env={**os.environ, **ingress._launcher_environment()},
        stderr=subprocess.DEVNULL,
    ) as proxy:
        try:
            wait_for(port)
            url = f"http://127.0.0.1:{port}/generate"
            told = httpx.post(url, content=b"poison", headers={HEADER: "mine"}, timeout=30)
            assert (told.status_code, told.headers["retry-after"]) == (503, "1")
            assert told.json()["error"] == "each replica that worked on the request was lost; try again"
            time.sleep(1)  # processes end after their connections
            assert sum(process.poll() is not None for process in replicas.values()) == tries.MOST
            # Connections that nobody takes do not count.
            assert {httpx.post(url, content=b"x", timeout=30).text for _ in range(8)} == {"1"}
        finally:
            proxy.kill()
            admin.unlink(missing_ok=True)


@pytest.fixture
def mortal(http_port: int, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A service of three replicas, and the file in which they tell that they have begun."""
    http, begun = FastAPI(), tmp_path / "begun"

    @serve.deployment(name="Mortal", num_replicas=3, ray_actor_options={"num_cpus": 0})
    @serve.ingress(http)
    class Mortal:
        @http.post("/poison")
        async def poison(self, request: Request, lives: int) -> int:
            number: int = request.scope["paddock.try"]
            with begun.open("a") as file:
                file.write(f"{number}\n")
            if number <= lives:
                os._exit(1)
            return number

    serve.run(Mortal.bind(), name="mortal", route_prefix="/mortal")
    url = f"http://127.0.0.1:{http_port}/mortal/poison"
    while httpx.post(f"{url}?lives=0", timeout=30).status_code != 200:
        time.sleep(0.5)
    begun.unlink()
    yield url, begun
    serve.delete("mortal")


def test_serves_own_replicas_are_told_which_try_it_is(mortal: tuple[str, Path]) -> None:
    url, begun = mortal
    told = httpx.post(f"{url}?lives=1", timeout=60)
    assert (told.status_code, told.text) == (200, "2")
    assert begun.read_text().split() == ["1", "2"]
    begun.unlink()
    told = httpx.post(f"{url}?lives=9", timeout=60)
    assert (told.status_code, told.headers["retry-after"]) == (503, "1")
    assert begun.read_text().split() == ["1", "2"]
