"""The room that replicas take, and the room that a change of what they serve takes beside them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.deployment import Deployment
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ApplicationStatus

from paddock import cluster, ingress
from paddock.config import ServeConfig
from paddock.errors import ResourceError
from paddock.ingress.proxy import WATCHES

# How many replicas beyond those that serve may start at a time while what is served is changed: one in four, and one.
SURGE_PERCENT = 25
CAN_SURGE = "max_surge_percent" in inspect.signature(Deployment.options).parameters  # from Ray 2.60 on
# What Serve changes in running replicas, or what is none of theirs.
_CHANGED_ALIVE = (
    *("autoscaling", "max_ongoing_requests", "max_queued_requests", "allow_downtime", "ingress", "startup_timeout_s"),
)


def arguments(config: ServeConfig) -> ServeConfig:
    """What a replica is made from: one that has another is restarted."""
    fields = ServeConfig.model_fields
    defaults = {name: fields[name].get_default(call_default_factory=True) for name in _CHANGED_ALIVE}
    return config.model_copy(update=defaults)


def options(config: ServeConfig, has_gpus: bool) -> dict[str, Any]:
    """What Serve is told of a replica's resources: `ray_actor_options`, and a placement group where it takes several
    GPUs, all on one node, where vLLM's own processes share them."""
    given = config.ray_actor_options
    actor = {**given, "runtime_env": runtime_env(given)}
    gpus = int(config.engine.get("tensor_parallel_size", 1)) * int(config.engine.get("pipeline_parallel_size", 1))
    if "num_gpus" not in actor and has_gpus:
        actor["num_gpus"] = gpus
    said: dict[str, Any] = {"ray_actor_options": actor}
    if actor.get("num_gpus", 0) > 1:
        said |= {"placement_group_bundles": [bundle(actor)], "placement_group_strategy": "STRICT_PACK"}
    return said


def bundle(actor: Mapping[str, Any]) -> dict[str, float]:
    """What an actor with these options takes of a node."""
    asked = {"CPU": actor.get("num_cpus", 1), "GPU": actor.get("num_gpus", 0), **actor.get("resources", {})}
    return {name: float(amount) for name, amount in asked.items() if amount}


def runtime_env(options: Mapping[str, Any]) -> dict[str, Any]:
    """The configured runtime env, in which a replica finds these packages wherever Ray itself was started.

    Serve is told to run the replica's code on its own event loop: with one each, two threads hand every streamed token
    over and wait for Python's lock, which took 1.4 times the processor time, and more of the clock.
    """
    given = dict(options.get("runtime_env", {}))
    ours = {
        "PYTHONPATH": ingress.python_path(),
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        WATCHES: "1",
    }
    variables = {**ours, **given.get("env_vars", {})}
    if variables["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] != "0":
        variables[WATCHES] = ""  # what the server hears then belongs to another thread
    return {**given, "env_vars": variables}


def require_room_for_change(config: ServeConfig, bundles: Sequence[Mapping[str, float]]) -> None:
    """Raise ResourceError where what is being deployed would leave nobody to answer for a time.

    Asked while Serve deploys: the application that it changes is the one that is DEPLOYING and has replicas already.
    """
    if config.allow_downtime or not ray.is_initialized():
        return
    for name, app in serve.status().applications.items():
        replicas = app.deployments["LLM"].replica_states.get("RUNNING", 0) if "LLM" in app.deployments else 0
        if app.status != ApplicationStatus.DEPLOYING or not replicas:
            continue
        try:
            about = serve.get_app_handle(name).describe.remote().result(timeout_s=60)
        except (TimeoutError, RayError, BackPressureError) as error:
            raise ResourceError(
                f"{name!r} does not say what it serves ({type(error).__name__}), so this may cut requests;"
                " try again when it has less to do, or give serve.allow_downtime=true"
            ) from None
        if about.get("arguments") == arguments(config).model_dump(mode="json"):
            continue
        more = math.ceil(replicas * SURGE_PERCENT / 100)
        if not CAN_SURGE and replicas == 1:
            why = "this Ray stops the only replica before its successor starts"
        elif CAN_SURGE and not cluster.has_room([*bundles] * more):
            why = f"there is no room for {more} more beside the {replicas} of {name!r}"
        else:
            continue
        raise ResourceError(
            f"a change of what is served restarts its replicas, and {why}: nobody would answer for a time. Add nodes,"
            " ask for less (serve.ray_actor_options), or allow it with serve.allow_downtime=true"
        )
