"""An engine's processes end with the replica that started them, however that ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

_REPLICA = """
import asyncio, sys
from paddock.config import ServeConfig
from paddock.engine import Engine
from paddock.prompts import load_template

async def main():
    engine = Engine(ServeConfig(model=sys.argv[1], engine={"max_model_len": 256}), load_template("promptcblue"))
    print("ready", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_an_engine_does_not_outlive_a_replica_that_is_killed(base_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "replica.py"
    script.write_text(_REPLICA)
    with subprocess.Popen([sys.executable, script, base_model], stdout=subprocess.PIPE, text=True) as replica:
        assert replica.stdout is not None
        assert any(line == "ready\n" for line in replica.stdout)
        engines = psutil.Process(replica.pid).children(recursive=True)
        assert any("EngineCore" in " ".join(process.cmdline()) for process in engines)
        replica.kill()
        begun = time.monotonic()
        _, alive = psutil.wait_procs(engines, timeout=10)
        for process in alive:
            process.kill()
    assert not alive, f"still there after {time.monotonic() - begun:.0f} s: {alive}"
