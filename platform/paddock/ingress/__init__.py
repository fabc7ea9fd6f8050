"""How requests reach the replicas: Serve's HAProxy, closed to the outside, or Serve's own proxy; and what both answer.

    proxy.py      what Serve itself says, in the shape that clients expect; another try where a replica died
    tries.py      how often that is done, whoever does it
    holders.py    which replicas Serve's own proxy prefers: those that hold the adapter
    haproxy       what Serve starts as its HAProxy: haproxy.py, which closes the configuration that Serve wrote and lets
                  it prefer them too, then it
    answers.py    the shape of an error, and the header that names an adapter

A connection that nobody takes costs nothing, and is tried as often as it takes until a replica is there. A request that
was begun where the replica, or its engine, then died may be what killed it: it is begun twice at most (`tries.MOST`),
in Serve's own proxy, by HAProxy and by both one after the other, and then answered with 503 and Retry-After.

Serve reads all of it from environment variables, which the process of its controller has to have. They are set where
Serve is started by `serve run deployments:app` or a job; for a cluster that is only deployed to:

    eval "$(python -m paddock.ingress [HOST])" && ray start --head
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import paddock
from paddock.ingress import tries
from paddock.ports import free_port

ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
_LAUNCHER = Path(__file__).with_name("haproxy")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EVERYWHERE = ("0.0.0.0", "::", "")
_NODE_ID, _LONGEST_SOCKET = 56, 97  # characters: of a Ray node's id, of a socket's path in HAProxy


def environment(wanted: str, host: str, several_nodes: bool) -> tuple[dict[str, str], str]:
    """The variables that Serve's controller is to be started with, and the line that says what they bring about.

    wanted: `auto` or `serve` (`serve.ingress`). host: where it will listen. several_nodes: whether the
    cluster has more than one node, or may get them.
    """
    variables = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "paddock.ingress.proxy:middlewares",
        "PYTHONPATH": python_path(),
        # One that no longer answers Serve will not finish its requests either, and keeps its successor's place.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    }
    why_not = "serve.ingress=serve" if wanted == "serve" else _why_not_haproxy(host, several_nodes)
    if why_not is not None:
        return {**variables, ENABLED: "0", tries.PLACE: ""}, f"ingress: Serve's own proxy ({why_not})"
    return {**variables, **_haproxy_environment()}, "ingress: HAProxy"


def python_path() -> str:
    """This process's PYTHONPATH, with these packages in it: for processes of a Ray that was started elsewhere."""
    package = Path(str(paddock.__file__)).resolve().parents[1]
    roots, rest = [str(package), str(package.parent)], os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([*roots, *(part for part in rest if part and part not in roots)])


def _why_not_haproxy(host: str, several_nodes: bool) -> str | None:
    """Why HAProxy cannot stand before the replicas, or not without opening what should be closed."""
    if several_nodes and host not in _EVERYWHERE:
        # HAProxy goes to the replicas' own ports, which listen where it does itself.
        return f"HAProxy cannot reach replicas on other nodes while they listen on {host} only"
    if not os.access(_LAUNCHER, os.X_OK):
        return f"{_LAUNCHER} is not executable"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "haproxy.cfg")
        file.write_text(_PROBE.format(place=f"{_private_directory()}/{'0' * _NODE_ID}"), encoding="utf-8")
        try:
            tried = subprocess.run(
                [_LAUNCHER, "-c", "-f", file],
                env={**os.environ, **_launcher_environment()},
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"HAProxy does not run here: {error}"
    said = " ".join(tried.stderr.split())[-200:]
    return None if tried.returncode == 0 else f"HAProxy does not run here: {said}"


_PROBE = """global
    stats socket {place}/metrics.sock mode 666 level admin expose-fd listeners
    maxconn 4096
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
    errorfile 503 /dev/null
frontend http_frontend
    bind 127.0.0.1:1
"""


def _haproxy_environment() -> dict[str, str]:
    place = _private_directory()
    return {
        ENABLED: "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_LAUNCHER),
        **_launcher_environment(),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{place}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{place}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": place,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{place}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{place}/metrics.sock",
        # A request whose replica dies before it has said anything goes to another; asked twice, a model says the same
        # or draws anew. It is kept for that if it fits into a buffer. This counts refused connections too, of which
        # there are several while the only replica is replaced; the replicas count how often a request was begun.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "6",
        tries.PLACE: os.environ.get(tries.PLACE) or f"{place}/tries",
        # One refused connection tells that a replica is gone; the next try then goes elsewhere.
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(64 * 1024),
        # Serve's own proxy stands behind, for when there is no replica; two services on a machine need two ports.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": os.environ.get("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT") or str(free_port()),
        # A replica that goes stays reachable for so long; HAProxy knows of it within a second.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    }


def _launcher_environment() -> dict[str, str]:
    return {"PADDOCK_PYTHON": sys.executable}


def _private_directory() -> str:
    """A directory that only this user may enter: who may write to the socket in it commands HAProxy.

    Its name is short: Serve adds its node's id, and HAProxy takes socket paths of 97 characters.
    """
    name = f"paddock-{os.getuid()}"
    fits = len(f"{tempfile.gettempdir()}/{name}/{'0' * _NODE_ID}/metrics.sock") <= _LONGEST_SOCKET
    place = Path(tempfile.gettempdir() if fits else "/tmp", name)  # its owner is looked at
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        place = Path(tempfile.mkdtemp(prefix="p-", dir=place.parent))
    return str(place)
