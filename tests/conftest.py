"""One tiny model and one Ray for the whole session; nothing reaches for a network."""

from __future__ import annotations

import os

# Before anything imports Ray, torch or transformers.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.pop("RAY_ADDRESS", None)

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from paddock.cluster import disconnect
from paddock.config import MergeConfig, ServeConfig
from paddock.demo import make_assets
from paddock.merge import merge
from paddock.ports import free_port
from paddock.service import start, start_serve

ROOT = Path(__file__).parent.parent
# What a shell starts in the background ignores Ctrl-C, and so would all that tests start, and send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Jobs are submitted as `python -m jobs.x`, to a cluster whose `python` is this one.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
DEMO_CONFIG = ROOT / "jobs" / "configs" / "demo.yaml"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default: base/, base_meta/, adapters/, data/."""
    directory = tmp_path_factory.mktemp("assets")
    make_assets(directory)
    return directory


@pytest.fixture(scope="session")
def base_model(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base: the tiny LLaMA with both adapters merged in."""
    adapters = tuple(str(assets / "adapters" / name) for name in ("zh-llama", "zh-alpaca"))
    place = tmp_path_factory.mktemp("models") / "base"
    return merge(MergeConfig(base_model=str(assets / "base"), lora_model=adapters, output_dir=str(place)))


@dataclass(frozen=True)
class Cluster:
    """The session's Ray, started as `ray start --head` does, so that jobs can be submitted to it."""

    address: str
    dashboard: str


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    """One Ray for all tests: two CPUs, a dashboard for `ray job submit`, this repository importable."""
    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}},
    )
    yield Cluster(context.address_info["address"], f"http://{context.dashboard_url}")
    disconnect(started=True)


@dataclass(frozen=True)
class Service:
    """The session's service: vLLM on Serve with the demo's base, in float32."""

    url: str
    app_name: str
    config: ServeConfig


@pytest.fixture(scope="session")
def http_port(ray_cluster: Cluster) -> int:
    """The port of the session's Serve, behind the ingress that a user would get; PADDOCK_TEST_INGRESS takes another."""
    port = free_port()
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    start_serve(
        os.environ.get("PADDOCK_TEST_INGRESS", "auto"), {"host": "127.0.0.1", "port": port}, logging_config=quiet
    )
    return port


@pytest.fixture(scope="session")
def service(http_port: int, base_model: Path) -> Service:
    """One service for all tests that ask it something; it goes with the cluster."""
    config = ServeConfig(
        model=str(base_model),
        engine={"dtype": "float32", "max_model_len": 512},
        autoscaling={"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": 64},
        ray_actor_options={"num_cpus": 0.5},
    )
    start(config, "default")
    return Service(f"http://127.0.0.1:{http_port}", "default", config)


@pytest.fixture
def demo_tree() -> dict[str, Any]:
    """jobs/configs/demo.yaml as plain values."""
    tree: dict[str, Any] = yaml.safe_load(DEMO_CONFIG.read_text(encoding="utf-8"))
    return tree


@pytest.fixture
def train_tree(demo_tree: dict[str, Any], base_model: Path, assets: Path, tmp_path: Path) -> dict[str, Any]:
    """jobs/configs/demo.yaml on the session's model, four steps of short blocks."""
    demo_tree |= {"output_dir": str(tmp_path / "run"), "model": {"path": str(base_model)}, "demo_assets": None}
    demo_tree["data"] = {"train": str(assets / "data" / "train.json"), "dev": str(assets / "data" / "dev.json")}
    demo_tree["lora"] = {"r": 2, "lora_dropout": 0.1, "modules_to_save": ["lm_head"]}
    demo_tree["train"] |= {"max_seq_length": 512, "max_steps": 4, "save_steps": 2, "eval_steps": 4, "logging_steps": 1}
    demo_tree["scaling"]["resources_per_worker"] = {"CPU": 0.25}
    return demo_tree


def run_job(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", **env},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="session")
def job() -> Any:
    """`job("jobs.train", "key=value")`: a job in a process of its own."""
    return run_job


@pytest.fixture
def copy_of(tmp_path: Path) -> Any:
    """A directory's copy, to damage."""

    def copy(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / f"copy-of-{directory.name}"))

    return copy
