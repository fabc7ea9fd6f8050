"""Find or start the Serve application that answers with a model.

An application is named as Serve names it, `module:attribute`, so that what predicts does not depend on
what serves.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray._common.utils import import_attr
from ray.serve.schema import ApplicationStatus

from paddock import cluster, ingress, manifest
from paddock.config import ServeConfig
from paddock.errors import ResourceError, ServiceError
from paddock.prompts import load_template

IMPORT_PATH = "deployments:app"
TEMPORARY = "predict-"
"""How the name of an application begins that goes with the run that started it."""
# How much and how fast, not what; and what is compared as the engine resolved it.
_SAME_ANSWERS = {
    *("dtype", "max_model_len", "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens"),
    *("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "load_format"),
    *("enforce_eager", "enable_prefix_caching", "enable_chunked_prefill", "disable_log_stats", "max_loras"),
}


@contextmanager
def running(config: ServeConfig, name: str) -> Iterator[str]:
    """The name of an application that serves this very model: a running one, or one started for the time as `name`.

    A name that begins with TEMPORARY and is unique to the caller keeps two of them from stopping each other's
    application; one that a killed caller left behind is started afresh, and stopped in the end.
    """
    found = find(config)
    if found is not None:
        print(f"using the running service {found!r}", flush=True)
        yield found
        return
    start(config, name, route_prefix=None)
    try:
        yield name
    finally:
        serve.delete(name)


def find(config: ServeConfig) -> str | None:
    """A running application that answers as `config` would: same model content, prompt and engine; or None."""
    wanted = {"model_hash": manifest.fingerprint(config.model), "prompt": load_template(config.prompt.template).text}
    for name in ("dtype", "max_model_len"):
        if name in config.engine:
            wanted[name] = config.engine[name]
    for name, app in serve.status().applications.items():
        if name.startswith(TEMPORARY):
            continue  # it goes when the run that it belongs to ends
        if app.status == ApplicationStatus.RUNNING and "LLM" in app.deployments:
            about = serve.get_app_handle(name).describe.remote().result(timeout_s=300)
            if wanted.items() <= about.items() and _telling(about["engine"]) == _telling(config.engine):
                return str(name)
    return None


def _telling(engine: Mapping[str, Any]) -> dict[str, Any]:
    """The engine arguments that can change an answer and are not compared by what they came to."""
    return {name: value for name, value in engine.items() if name not in _SAME_ANSWERS}


def application(config: ServeConfig) -> Any:
    """The Serve application of a configuration. Raises a PaddockError where it is wrong or finds no room."""
    return import_attr(IMPORT_PATH)(config.model_dump())


def start_serve(wanted: str, http_options: Mapping[str, Any], *, routed: bool = True, **options: Any) -> None:
    """Start Serve, where it does not run yet, behind an ingress (a configuration's `serve.ingress`), and say which.

    options: `serve.start`'s. Without a route nobody comes in over HTTP, and Serve's own proxy does. Raises
    ResourceError where another listens already.
    """
    if not serve.status().proxies:
        host, port = str(http_options.get("host", "127.0.0.1")), int(http_options.get("port", 8000))
        if routed:
            _require_port(host, port)
        several = cluster.has_several_nodes()
        variables, line = ingress.environment(wanted if routed else "serve", host, several)
        options["controller_options"] = {"runtime_env": {"env_vars": variables}}
        if routed:
            print(line, flush=True)
    serve.start(http_options=dict(http_options), **options)


def _require_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ResourceError(
            f"{host}:{port}: cannot listen there ({error.strerror}); end what does, or give another port"
        ) from None


def start(
    config: ServeConfig,
    name: str = "default",
    *,
    route_prefix: str | None = "/",
    http_options: dict[str, Any] | None = None,
) -> None:
    """Start an application and wait until its first replica answers.

    Raises a PaddockError where the configuration is wrong or the cluster has no room for a replica, and
    ServiceError where it does not come up within `startup_timeout_s`.
    """
    app = application(config)
    # A line a request is for `serve run`; here a progress bar tells the same.
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    http_options = http_options or {"host": "127.0.0.1"}
    start_serve(config.ingress, http_options, routed=route_prefix is not None, logging_config=quiet)
    target = serve.RunTarget(app, name=name, route_prefix=route_prefix, logging_config=quiet)
    serve.run_many([target], wait_for_applications_running=False)
    begun = time.monotonic()
    while True:
        status = serve.status().applications[name]
        if status.status == ApplicationStatus.RUNNING:
            return
        late = time.monotonic() - begun > config.startup_timeout_s
        if status.status == ApplicationStatus.DEPLOY_FAILED or late:
            why = f"not ready after {config.startup_timeout_s:g} s" if late else "failed to start"
            serve.delete(name)
            # The replica's traceback ends in its error's own line.
            messages = [d.message for d in status.deployments.values() if d.message] or [status.message]
            told = messages[0].strip().splitlines()[-1]
            raise ServiceError(f"the service for {config.model} {why}: {told}")
        time.sleep(0.5)
