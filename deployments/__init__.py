"""What Serve runs: `serve run deployments:app model=DIR [key.sub=value ...]`, keys of `paddock.config.ServeConfig`.

A mistake in them is one line and exit code 2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import ray
import torch
from pydantic import ValidationError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

import paddock
from deployments import keys
from deployments.limits import Limits
from deployments.llm import LLM
from paddock import cluster
from paddock.config import ServeConfig, build, load, nearest
from paddock.engine import check_engine_args, check_model
from paddock.errors import ConfigError, PaddockError
from paddock.prompts import load_template


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
        autoscaling_config=autoscaling(config.autoscaling),
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=config.access.retry_after_s),
        ray_actor_options=actor_options(config),
        # A replica that did not start with this config and model will not do so the next time either.
        max_constructor_retry_count=1,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=60,
    ).bind(config, template, known, limits.bind() if asked else None)


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


def actor_options(config: ServeConfig) -> dict[str, Any]:
    """What Ray reserves for a replica: the configured, and the GPUs of its engine where there are any.

    Raises ResourceError where the running cluster has no room for one replica and cannot make it.
    """
    options = {**config.ray_actor_options, "runtime_env": _runtime_env(config.ray_actor_options)}
    gpus = int(config.engine.get("tensor_parallel_size", 1)) * int(config.engine.get("pipeline_parallel_size", 1))
    joined = not ray.is_initialized()
    try:
        if joined:
            # Only to ask: `serve run` connects by itself afterwards, with its own options.
            ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
        if "num_gpus" not in options and cluster.has_gpus():
            options["num_gpus"] = gpus
        cluster.require([{"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0)}], "a replica")
    except ConnectionError:
        joined = False  # No cluster yet; `serve run` starts one on this machine.
        if "num_gpus" not in options and torch.cuda.device_count():
            options["num_gpus"] = gpus
    finally:
        if joined:
            ray.shutdown()
    return options


def _runtime_env(options: Mapping[str, Any]) -> dict[str, Any]:
    """The configured runtime env, in which a replica finds these packages wherever Ray itself was started."""
    runtime_env = dict(options.get("runtime_env", {}))
    roots = [str(Path(file).resolve().parents[1]) for file in (str(paddock.__file__), __file__)]
    path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**runtime_env, "env_vars": {"PYTHONPATH": path, **runtime_env.get("env_vars", {})}}
