"""HAProxy's configuration as Serve writes it, and as HAProxy gets it."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from paddock import ingress
from paddock.ingress.haproxy import close
from paddock.ingress.tries import HEADER, PLACE
from paddock.ports import free_port

# With a value for each variable.
WRITTEN = re.sub(r"{{[^}]*}}", "9", HAPROXY_CONFIG_TEMPLATE.replace("{{ config.maxconn }}", "4096"))


def test_the_template_of_this_ray_is_closed() -> None:
    text = close(WRITTEN, 1024)
    assert "mode 600 level admin" in text
    assert not re.search(r"mode 666|stats enable|bind \*|bind :|prometheus", text)
    assert re.findall(r"^\s*maxconn (\d+)", text, flags=re.M) == ["308"]
    assert "option http-buffer-request" in text
    assert re.search(rf"frontend http_frontend\n *bind 9:9\n *http-request set-header {HEADER} %\[uuid\]\n", text)
    assert re.findall(r"errorfile (\d+) (\S+)", text)[0] == ("502", str(Path(ingress.__file__).with_name("503.http")))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("stats socket", "stats  socket"),
        lambda text: text.replace("listen stats", "listen statistics"),
        lambda text: text.replace("frontend prometheus", "frontend prometheus2"),
        lambda text: text.replace("frontend http_frontend\n", "frontend http_frontend\n    mode http\n"),
    ],
)
def test_a_configuration_that_is_not_as_expected_is_not_started(damage: Any) -> None:
    with pytest.raises(ValueError, match="Serve's configuration"):
        close(damage(WRITTEN), 20_000)


def test_too_few_descriptors_are_told() -> None:
    with pytest.raises(ValueError, match="ulimit"):
        close(WRITTEN, 64)


@pytest.mark.parametrize("descriptors", [256, 1024, 20_000])
def test_it_starts_under_any_sensible_limit(descriptors: int) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    launcher = Path(ingress.__file__).with_name("haproxy")
    port = free_port()
    place = Path(ingress._private_directory())
    file = place / f"test-{port}.cfg"
    file.write_text(ingress._PROBE.format(place=place).replace("127.0.0.1:1", f"127.0.0.1:{port}"), encoding="utf-8")
    command = [launcher, "-db", "-f", file]
    with subprocess.Popen(command, preexec_fn=limited, stderr=subprocess.PIPE) as process:  # noqa: PLW1509
        try:
            for _ in range(100):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                try:
                    process.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
                raise AssertionError(process.stderr.read() if process.stderr else "")
            assert psutil.Process(process.pid).name() == "haproxy"
        finally:
            process.kill()
            file.unlink()


def test_where_haproxy_cannot_stand_serves_own_proxy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    variables, line = ingress.environment("auto", "127.0.0.1", several_nodes=True)
    assert (variables[ingress.ENABLED], variables[PLACE]) == ("0", "")
    assert line == (
        "ingress: Serve's own proxy (HAProxy cannot reach replicas on other nodes while they listen on 127.0.0.1 only)"
    )
    assert ingress.environment("auto", "0.0.0.0", several_nodes=True)[1] == "ingress: HAProxy"
    assert ingress.environment("serve", "127.0.0.1", several_nodes=False)[0][ingress.ENABLED] == "0"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(ingress, "_LAUNCHER", Path("/bin/false"))
    assert ingress.environment("auto", "127.0.0.1", several_nodes=False)[1] == (
        "ingress: Serve's own proxy (HAProxy does not run here: )"
    )


@pytest.mark.usefixtures("service")
def test_nothing_of_it_is_open_but_the_service(http_port: int) -> None:
    """From outside: which ports the processes of this service listen on, and who may write to their sockets."""
    managers = [p for p in psutil.process_iter() if p.name() == "haproxy" and f":{http_port}\n" in _config_of(p)]
    assert managers, "HAProxy runs on this machine, and should stand before the service"
    for process in managers:
        listening = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert {tuple(address) for address in listening} <= {("127.0.0.1", http_port)}
        place = Path(_config_file(process)).parent.parent
        assert place.stat().st_mode & 0o077 == 0
    outside = next((a.address for n in psutil.net_if_addrs().values() for a in n if _is_outside(a)), None)
    ports = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    serving = {http_port, *(port for port in ports if 30_000 <= port < 30_100), 8404, 9101}
    for port in serving if outside else ():
        with socket.socket() as client:
            client.settimeout(2)
            assert client.connect_ex((outside, port)) != 0, f"{outside}:{port} is open"


def _is_outside(address: Any) -> bool:
    return address.family == socket.AF_INET and not address.address.startswith("127.")


def _config_file(process: psutil.Process) -> str:
    command = process.cmdline()
    return command[command.index("-f") + 1]


def _config_of(process: psutil.Process) -> str:
    try:
        return Path(_config_file(process)).read_text(encoding="utf-8")
    except (OSError, psutil.Error, ValueError):
        return ""


def test_a_shell_reads_the_environment_of_a_ray_that_is_started_by_hand(root: Path) -> None:
    script = f'eval "$({sys.executable} -m paddock.ingress)" && env'
    done = subprocess.run(
        ["sh", "-c", script], env={"PYTHONPATH": "platform"}, cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stderr == "ingress: HAProxy\n"
    assert "RAY_SERVE_ENABLE_HA_PROXY=1\n" in done.stdout
    assert f"PYTHONPATH={root / 'platform'}:{root}" in done.stdout
