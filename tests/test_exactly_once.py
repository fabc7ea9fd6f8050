"""kill -9 of driver, feeder and replica while a test set is predicted: no row is lost, doubled or out of order."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.util.state import list_actors

from paddock import predict
from paddock.config import PredictConfig, build
from paddock.data import read_rows, write_records
from paddock.ledger import Ledger

ROWS = 120
FILES = ("test_predictions.json", "results.json", "submission.zip", "quarantine.jsonl")
ACTORS = {"feeder": "Feeder", "replica": "ServeReplica:default:LLM"}


@pytest.fixture(scope="module")
def tree(service: Any, assets: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of some seconds."""
    place = tmp_path_factory.mktemp("rows")
    rows = read_rows(assets / "data" / "test.json")
    write_records(place / "test.json", [replace(r, sample_id=f"r{i}").as_record() for i, r in enumerate(rows[:ROWS])])
    return {
        "model": {"path": str(base_model), "dtype": "float32"},
        "data": {"test": str(place / "test.json")},
        "predict": {"sampling": {"max_tokens": 24, "min_tokens": 20}, "max_in_flight": 4},
    }


@pytest.fixture(scope="module")
def uninterrupted(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return _files(predict.predict(build(PredictConfig, {**tree, "output_dir": str(tmp_path_factory.mktemp("out"))})))


def _files(output: str | Path) -> dict[str, bytes]:
    return {name: Path(output, name).read_bytes() for name in FILES}


def _computed(output: Path) -> Counter[int]:
    """How often each row stands in the ledger."""
    shards = sorted((output / "shards").glob("[0-9]*.parquet"))
    return Counter(i for file in shards for i in pq.read_table(file)["row_index"].to_pylist())


class Driver:
    """`python -m jobs.predict`, on the session's Ray, whose workers take the package from here."""

    def __init__(self, tree: dict[str, Any], output: Path, cluster: Any, root: Path) -> None:
        self.output, self.log = output, output.with_suffix(".log")
        words = [f"output_dir={output}", f"data.test={tree['data']['test']}"]
        words += [f"{part}={tree[part]}".replace("'", "") for part in ("model", "predict")]
        python_path = f"{root / 'platform'}:{root}"
        code = (
            "import ray, runpy, sys;"
            f"ray.init({cluster.address!r}, log_to_driver=False,"
            f" runtime_env={{'env_vars': {{'PYTHONPATH': {python_path!r}}}}});"
            f"sys.argv[1:] = {words!r};"
            "runpy.run_module('jobs.predict', run_name='__main__')"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=root,
            env={**os.environ, "PYTHONPATH": python_path},
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def at_work(self) -> None:
        """Wait until the first answers of this driver are in the ledger, and a little longer."""
        before = len(list(self.output.glob("shards/[0-9]*.parquet")))
        while len(list(self.output.glob("shards/[0-9]*.parquet"))) == before and self.process.poll() is None:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 1))

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> None:
        assert self.process.wait(300) == 0, self.log.read_text()[-3000:]


def _kill_actor(name: str, cluster: Any, driver: Driver) -> bool:
    """Kill the actor, which may just be on its way to replace one that was killed, while its driver needs it."""
    while driver.process.poll() is None:
        for actor in list_actors(cluster.address, limit=1000):
            if name in actor.class_name and actor.state == "ALIVE":
                os.kill(actor.pid, signal.SIGKILL)
                return True
        time.sleep(0.5)
    return False


def _interrupted(victims: Sequence[str], tree: dict[str, Any], output: Path, cluster: Any, root: Path) -> list[str]:
    """Predict, and kill one after the other; returns who was killed while there was work left."""
    killed = []
    driver = Driver(tree, output, cluster, root)
    for victim in victims:
        driver.at_work()
        if driver.process.poll() is not None:
            break
        if victim == "driver":
            driver.kill()
            config = build(PredictConfig, {**tree, "output_dir": str(output)})
            if not Ledger(output, predict.ledger_key(config, predict.read_test(config))).pending(ROWS):
                break
            driver = Driver(tree, output, cluster, root)
        elif not _kill_actor(ACTORS[victim], cluster, driver):
            break
        killed.append(victim)
    driver.finish()
    return killed


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("victims", "runs"),
    [
        pytest.param(("driver", "feeder", "replica"), 1, id="one-of-each"),
        *(pytest.param((name,) * 4, 3, marks=pytest.mark.slow, id=name) for name in ("driver", *ACTORS)),
    ],
)
def test_whoever_is_killed_the_files_are_the_same(
    victims: Sequence[str],
    runs: int,
    tree: dict[str, Any],
    uninterrupted: dict[str, bytes],
    ray_cluster: Any,
    root: Path,
    tmp_path: Path,
) -> None:
    killed = []
    for run in range(runs):
        killed += _interrupted(victims, tree, tmp_path / f"out-{run}", ray_cluster, root)
        assert _computed(tmp_path / f"out-{run}") == Counter(range(ROWS))
        assert _files(tmp_path / f"out-{run}") == uninterrupted
    assert set(killed) == set(victims)
