"""What vLLM imports in each process that computes, as its `worker_extension_cls`.

There it makes our attention (decode_attention.py) known to vLLM, and it ends the process when the replica has: killed
outright, a replica cannot stop its engine, which would keep the card's memory from the successor. vLLM itself looks the
other way only, from the engine to its workers and back.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from contextlib import suppress

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from paddock.engine import REPLICA


class WorkerExtension:
    """Adds nothing: that vLLM imports its module is what matters."""


def end_with(pid: int) -> None:
    """Kill this process as soon as another one has ended (Linux 5.3 and later)."""
    with suppress(ProcessLookupError):  # it has already
        ended = select.poll()
        ended.register(os.pidfd_open(pid), select.POLLIN)
        ended.poll()
    os.kill(os.getpid(), signal.SIGKILL)


register_backend(AttentionBackendEnum.CUSTOM, "paddock.engine.decode_attention.DecodeAttentionBackend")
if REPLICA in os.environ and hasattr(os, "pidfd_open"):
    threading.Thread(target=end_with, args=(int(os.environ[REPLICA]),), daemon=True, name="end-with-replica").start()
if current_platform.is_cpu():
    from paddock.engine import lora_on_cpu as lora_on_cpu  # noqa: PLC0414 (it mends vLLM)
