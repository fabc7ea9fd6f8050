"""The room that replicas take, beside what is there already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import deployments
from deployments import replicas
from paddock import cluster
from paddock.config import ServeConfig
from paddock.errors import ResourceError


def config(**changes: Any) -> ServeConfig:
    return ServeConfig(model="/m", **changes)


def test_a_replica_finds_these_packages_wherever_ray_was_started(root: Path) -> None:
    runtime_env = replicas.runtime_env({"runtime_env": {"pip": ["x"], "env_vars": {"A": "1"}}})
    assert runtime_env["pip"] == ["x"]
    assert runtime_env["env_vars"]["A"] == "1"
    assert runtime_env["env_vars"]["PADDOCK_WATCHES_CLIENTS"] == "1"
    apart = {"env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1"}}
    assert replicas.runtime_env({"runtime_env": apart})["env_vars"]["PADDOCK_WATCHES_CLIENTS"] == ""
    assert runtime_env["env_vars"]["PYTHONPATH"].split(os.pathsep)[:2] == [str(root / "platform"), str(root)]


@pytest.mark.parametrize(
    ("engine", "options", "bundle"),
    [
        ({}, {}, {"CPU": 1, "GPU": 1}),
        ({}, {"num_cpus": 0.5, "num_gpus": 0}, {"CPU": 0.5}),
        ({"tensor_parallel_size": 2}, {}, {"CPU": 1, "GPU": 2}),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, {"num_cpus": 4}, {"CPU": 4, "GPU": 4}),
        ({"tensor_parallel_size": 2}, {"num_gpus": 1, "resources": {"fast": 1}}, {"CPU": 1, "GPU": 1, "fast": 1}),
    ],
)
def test_a_replica_takes_the_gpus_of_its_engine(
    engine: dict[str, Any], options: dict[str, Any], bundle: dict[str, float]
) -> None:
    said = replicas.options(config(engine=engine, ray_actor_options=options), has_gpus=True)
    assert replicas.bundle(said["ray_actor_options"]) == bundle
    group = {"placement_group_bundles": [bundle], "placement_group_strategy": "STRICT_PACK"}
    assert {k: v for k, v in said.items() if k != "ray_actor_options"} == (group if bundle.get("GPU", 0) > 1 else {})
    # And Serve takes it.
    deployment: Any = deployments.LLM
    assert deployment.options(**said)._replica_config.placement_group_bundles == said.get("placement_group_bundles")


def test_a_replica_takes_no_gpus_where_there_are_none() -> None:
    said = replicas.options(config(engine={"tensor_parallel_size": 2}), has_gpus=False)
    assert replicas.bundle(said["ray_actor_options"]) == {"CPU": 1}
    assert "placement_group_bundles" not in said


@pytest.mark.usefixtures("ray_cluster")
def test_gpus_that_no_node_has_together_are_refused_at_once() -> None:
    said = replicas.options(config(engine={"tensor_parallel_size": 4}), has_gpus=True)
    with pytest.raises(ResourceError, match=r"a replica needs 1 x 1 CPU \+ 4 GPU, each on one node; the cluster has 1"):
        cluster.require([replicas.bundle(said["ray_actor_options"])], "a replica")


def test_what_changes_while_replicas_serve_does_not_restart_them() -> None:
    changed = config(
        autoscaling={"min_replicas": 3, "max_replicas": 4},
        max_ongoing_requests=3,
        max_queued_requests=3,
        allow_downtime=True,
        ingress="serve",
    )
    assert replicas.arguments(changed) == replicas.arguments(config())
    for other in (config(engine={"max_model_len": 9}), config(adapters="/a"), config(served_model_name="x")):
        assert replicas.arguments(other) != replicas.arguments(config())


@pytest.mark.usefixtures("ray_cluster")
def test_room_is_what_is_free_and_not_what_there_is() -> None:
    assert cluster.has_room([{"CPU": 0.25}])
    assert not cluster.has_room([{"CPU": 1}] * 3)
    assert not cluster.has_room([{"CPU": 0.1, "GPU": 1}])
