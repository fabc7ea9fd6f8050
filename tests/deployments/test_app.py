"""`serve run deployments:app ...` and `serve.yaml`, up to the point where something starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

import deployments
from deployments import replicas
from paddock.config import ServeConfig, build
from paddock.errors import ConfigError, PaddockError


def options(app: Any) -> Any:
    return app._bound_deployment


@pytest.mark.usefixtures("ray_cluster")
def test_a_command_line_becomes_the_deployment(assets: Path) -> None:
    deployment = options(
        deployments.app(
            {
                "model": str(assets / "base"),
                "engine.max_model_len": "512",
                "autoscaling.max_replicas": "3",
                "autoscaling.target_ongoing_requests": "9",
                "max_ongoing_requests": "7",
                "max_queued_requests": "11",
                "ray_actor_options.num_cpus": "0.5",
            }
        )
    )
    config, template, keys, limits = deployment.init_args
    assert (keys, limits) == ((), None)
    assert deployment._deployment_config.backpressure_config.status_code == 429
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 600
    assert config.engine == {"max_model_len": 512}
    assert "{input}" in template.text
    assert deployment.name == "LLM"
    assert deployment.max_ongoing_requests == 7
    assert deployment.max_queued_requests == 11
    assert deployment.ray_actor_options["num_cpus"] == 0.5
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3
    assert deployment._deployment_config.autoscaling_config.target_ongoing_requests == 9


@pytest.mark.usefixtures("ray_cluster")
def test_a_tree_is_taken_as_well(assets: Path) -> None:
    config = ServeConfig(model=str(assets / "base"), engine={"max_model_len": 256})
    assert options(deployments.app(config.model_dump())).init_args[0] == replicas.arguments(config)


@pytest.mark.usefixtures("ray_cluster")
def test_a_replica_that_no_node_can_hold_is_refused(assets: Path) -> None:
    with pytest.raises(PaddockError, match=r"a replica needs 1 x 100 CPU, .* the cluster has 1 node of 2 CPU"):
        deployments.app({"model": str(assets / "base"), "ray_actor_options.num_cpus": "100"})
    with pytest.raises(PaddockError, match=r"a replica needs 1 x 1 CPU \+ 1 GPU"):
        deployments.app({"model": str(assets / "base"), "ray_actor_options.num_gpus": "1"})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modle": "x"}, "modle: unknown key; did you mean 'model'"),
        ({"model": "/nowhere"}, "no such directory"),
        ({"prompt.template": "nope"}, "prompt.template: 'nope' is neither"),
        ({"engine.max_model_length": "9"}, "did you mean 'max_model_len'"),
        ({"autoscaling.max_replica": "9"}, "autoscaling.max_replica: .*did you mean 'max_replicas'"),
        ({"autoscaling.max_replicas": "0"}, "autoscaling: max_replicas: .*found 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(assets: Path, args: dict[str, str], message: str) -> None:
    with pytest.raises(deployments.AppError, match=message) as caught:
        deployments.app({"model": str(assets / "base"), **args})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_serve_run_tells_it_so(root: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("serve"), "run", "deployments:app", "modle=x"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root / 'platform'}:{root}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "Error: modle: unknown key; did you mean 'model'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_shipped_yaml_is_what_serve_and_the_config_take(root: Path) -> None:
    tree = yaml.safe_load((root / "deployments" / "serve.yaml").read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(tree)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = tree["applications"]
    config = build(ServeConfig, application["args"])
    deployments.autoscaling(config.autoscaling)
    application["args"]["modle"] = "x"
    with pytest.raises(ConfigError, match="modle"):
        build(ServeConfig, application["args"])
