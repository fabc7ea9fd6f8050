"""Joining Ray, and the arithmetic of what fits where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from paddock import cluster
from paddock.errors import ResourceError

GPU = {"CPU": 1.0, "GPU": 1.0}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A cluster as Ray describes it: `small(node, ...)`, and `bootstrap` as `ray up` leaves it on the head."""

    def make(*nodes: dict[str, float], bootstrap: dict[str, Any] | None = None) -> None:
        alive = [{"Alive": True, "Resources": node} for node in nodes]
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 99.0}}])
        monkeypatch.setattr(cluster.ray, "available_resources", lambda: {"CPU": 99.0, "GPU": 99.0})
        monkeypatch.setattr(cluster.ray_state, "get_cluster_config", lambda: None)
        file = tmp_path / "bootstrap.yaml"
        if bootstrap is not None:
            file.write_text(yaml.safe_dump(bootstrap))
        monkeypatch.setattr(cluster, "_BOOTSTRAP_CONFIG", str(file))

    return make


@pytest.mark.parametrize(
    ("nodes", "bundles"),
    [
        ([{"CPU": 2.0}], [{"CPU": 1.0}] * 2),
        ([{"CPU": 2.0}], [{"CPU": 0.1}] * 20),  # sums of tenths
        ([{"CPU": 2.0, "GPU": 1.0}], [{"CPU": 0.5, "GPU": 0.5}] * 2),
        ([{"CPU": 3.0}, {"CPU": 1.0}], [{"CPU": 1.0}, {"CPU": 3.0}]),
    ],
)
def test_what_fits_is_not_refused(small: Any, nodes: Any, bundles: Any) -> None:
    small(*nodes)
    cluster.require(bundles, "training")


def test_too_much_in_all_is_refused_with_what_there_is(small: Any) -> None:
    small({"CPU": 2.0, "memory": 1e9, "node:10.0.0.1": 1.0})
    with pytest.raises(ResourceError) as told:
        cluster.require([{"CPU": 1.0}] * 3, "training")
    assert str(told.value).startswith(
        "training needs 3 x 1 CPU, each on one node; the cluster has 1 node of 2 CPU, so 1 of 3 would wait for ever"
    )


def test_a_bundle_does_not_span_nodes(small: Any) -> None:
    small({"CPU": 2.0}, {"CPU": 2.0})
    with pytest.raises(ResourceError, match="needs 1 x 3 CPU, each on one node"):
        cluster.require([{"CPU": 3.0}], "a replica")


def test_the_shipped_cluster_yaml_counts_as_what_it_can_grow_to(small: Any, root: Path) -> None:
    shipped = yaml.safe_load((root / "cluster.yaml").read_text(encoding="utf-8"))
    small({"node:__internal_head__": 1.0}, bootstrap=shipped)
    assert cluster.has_gpus()
    cluster.require([GPU] * 4, "training")
    with pytest.raises(ResourceError, match=r"can grow to .*4 nodes of 8 CPU \+ 1 GPU, so 1 of 5 would"):
        cluster.require([GPU] * 5, "training")
    with pytest.raises(ResourceError, match="each on one node"):
        cluster.require([{"CPU": 1.0, "GPU": 2.0}], "a replica")


def test_without_an_autoscaler_there_are_no_gpus_to_come(small: Any) -> None:
    small({"CPU": 2.0})
    assert not cluster.has_gpus()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:8265", "is where jobs are submitted"),
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("nonsense", "no Ray cluster answers there"),
    ],
)
def test_an_address_that_is_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str, says: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(ResourceError, match=says) as told:
        cluster.connect()
    assert "\n" not in str(told.value)


def test_a_running_job_hears_what_the_cluster_asks_of_it(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = cluster.Watch("a-flag")
    assert not watch.stops()
    assert not watch.preempts()
    cluster.ask_to_stop("a-flag")
    assert watch.stops()
    assert not cluster.Watch("another-flag").stops()
    draining = {"node": 0}
    monkeypatch.setattr(cluster.ray_state, "get_draining_nodes", lambda: draining)
    monkeypatch.setattr(cluster.Watch, "_EVERY_S", 0.0)
    assert [watch.preempts(), watch.preempts()] == [True, False]  # once a node
    draining["second"] = 0
    assert watch.preempts()


def test_what_an_autoscaler_can_add_is_room_only_beside_what_is_used(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(most: int) -> None:
        types = {"head": {"resources": {"CPU": 4}}, "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": most}}
        small(bootstrap={"max_workers": most, "head_node_type": "head", "available_node_types": types})
        worker = {"NodeID": "w", "Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [worker])
        monkeypatch.setattr(cluster.ray_state, "available_resources_per_node", lambda: {"w": {"CPU": 7.0}})

    busy(1)
    assert not cluster.has_room([GPU])
    assert cluster.has_room([{"CPU": 1.0}])
    busy(2)
    assert cluster.has_room([GPU])
    assert not cluster.has_room([GPU, GPU])


@pytest.mark.parametrize(
    ("address", "initialized", "there"),
    [
        ("", False, False),
        ("local", False, False),
        ("10.0.0.1:6379", False, True),
        ("auto", False, True),
        ("local", True, True),
    ],
)
def test_a_ray_of_ones_own_is_no_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, initialized: bool, there: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: initialized)
    monkeypatch.setattr("ray._private.utils.get_ray_address_file", lambda _: str(tmp_path / "none"))
    assert cluster.is_there() is there
    (tmp_path / "none").write_text("10.0.0.1:6379")  # as `ray start` on this machine leaves it
    assert cluster.is_there() is (there or address == "")
