"""What Serve runs: `serve run deployments:app model=DIR [key.sub=value ...]`, keys of `paddock.config.ServeConfig`.

A mistake in them is one line and exit code 2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click
import ray
import torch
from pydantic import ValidationError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions

from deployments import keys, replicas
from deployments.limits import Limits
from deployments.llm import LLM
from paddock import cluster, ingress, service
from paddock.config import ServeConfig, build, load, nearest
from paddock.engine import check_engine_args, check_model
from paddock.errors import ConfigError, PaddockError
from paddock.prompts import load_template

_HOST = "127.0.0.1"


class AppError(PaddockError, click.ClickException):
    """A user's mistake, as `serve run` knows how to tell it: a line, and exit code 2."""

    exit_code = PaddockError.exit_code  # type: ignore[misc]


def app(args: Mapping[str, Any]) -> Application:
    """The application for a command line (a dict of texts, keys dotted) or a YAML's `args` (a tree).

    Raises AppError for whatever is wrong with them, before anything starts.
    """
    try:
        if all(isinstance(value, str) for value in args.values()):
            config = load(ServeConfig, None, [f"{key}={value}" for key, value in args.items()])
        else:
            config = build(ServeConfig, dict(args))
        return application(config)
    except PaddockError as error:
        raise AppError(str(error)) from None


def application(config: ServeConfig) -> Application:
    """The application that serves `config`. Raises a PaddockError for what can be seen to be wrong by now."""
    check_model(config.model)
    template = load_template(config.prompt.template)
    if config.engine:
        check_engine_args(config.engine)
    known = keys.from_environment()
    asked = keys.KeyRing(known, config.access.keys).required
    limits: Any = Limits
    deployment: Any = LLM
    return deployment.options(
        **placed(config),
        **({"max_surge_percent": 0 if config.allow_downtime else replicas.SURGE_PERCENT} if replicas.CAN_SURGE else {}),
        autoscaling_config=autoscaling(config.autoscaling),
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=config.access.retry_after_s),
        # A replica that did not start with this config and model will not do so the next time either.
        max_constructor_retry_count=1,
        health_check_period_s=5,
        health_check_timeout_s=config.health_check_timeout_s + 5,  # the engine is given up before its replica is
        # A replica that is to go finishes what it has begun.
        graceful_shutdown_timeout_s=config.access.request_timeout_s,
    ).bind(replicas.arguments(config), template, known, limits.bind() if asked else None)


def autoscaling(values: Mapping[str, Any]) -> AutoscalingConfig:
    """Serve's AutoscalingConfig, which by itself drops a key that it does not know."""
    known = list(AutoscalingConfig.model_fields)
    for key in values:
        if key not in known:
            raise ConfigError(f"serve.autoscaling.{key}: Serve has no such setting{nearest(key, known)}")
    try:
        return AutoscalingConfig(**values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})" for e in error.errors())
        raise ConfigError(f"serve.autoscaling: {wrong}") from None


def placed(config: ServeConfig) -> dict[str, Any]:
    """What a replica takes, on the running cluster or on the one that `serve run` is about to start on this machine.

    In the first case Serve is started too, behind the configured ingress, where it does not run yet; in the second its
    environment is prepared. Raises ResourceError where the cluster has no room for a replica and cannot make it.
    """
    joined = not ray.is_initialized()
    try:
        if joined:
            if os.environ.get("RAY_ADDRESS") == "local":
                raise ConnectionError  # Ray would start a cluster here, too
            # Only for this: `serve run` connects by itself afterwards, with its own options.
            ray.init(address="auto", namespace="serve", logging_level="ERROR", log_to_driver=False)
        options = replicas.options(config, cluster.has_gpus())
        bundles = [replicas.bundle(options["ray_actor_options"])]
        cluster.require(bundles, "a replica")
        replicas.require_room_for_change(config, bundles)
        if joined:
            service.start_serve(config.ingress, {"host": _HOST})
    except ConnectionError:
        joined = False
        options = replicas.options(config, bool(torch.cuda.device_count()))
        host = HTTPOptions().host or ""
        if host != _HOST and os.environ.get("RAY_SERVE_DEFAULT_HTTP_HOST") != host:
            raise ConfigError(
                f"{ingress.ENABLED}=1 makes Serve listen on {host}: unset it (HAProxy stands before the replicas anyway"
                " where it can), or say so with RAY_SERVE_DEFAULT_HTTP_HOST"
            ) from None
        variables, line = ingress.environment(config.ingress, host, several_nodes=False)
        os.environ.update(variables)
        print(line, flush=True)
    finally:
        if joined:
            ray.shutdown()
    return options
