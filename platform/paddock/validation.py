"""Generation scores of a run's checkpoints: their answers to the dev rows, scored as the benchmark does.

    RUN/scores/checkpoint-800.json           score, its interval, score_by_task
    RUN/scores/checkpoint-800-1a2b3c4d/      the answers (of a run at a URI: on the node that asked for them)

Ray Train scores a checkpoint beside the workers, one after the other, on resources of their own: the training does not
wait. What was not scored when it ended, because something died, is scored then. Scores count while rows, engine and
sampling are what they were taken with.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray.train

from paddock import checkpoint, cluster, manifest, storage
from paddock.config import PredictConfig, TrainConfig, build
from paddock.data import Row, content_hash, write_records
from paddock.dataset import load_rows
from paddock.errors import ConfigError, OutputError
from paddock.scoring import profile_of

_POINTER = "checkpoint.txt"
# How long the upload of a checkpoint may take.
_UPLOAD_S = 1800.0


def check(config: TrainConfig, dev: list[Row]) -> None:
    """Raise ConfigError or DataError where the dev rows cannot be scored."""
    if not config.train.predict_with_generate:
        if config.train.best_by == "score":
            raise ConfigError("train.keep_best: score needs train.predict_with_generate=true")
        return
    if not dev:
        raise ConfigError(
            "train.predict_with_generate: needs dev rows; give data.dev or data.validation_split_percentage"
        )
    if config.data.format != "promptcblue":
        raise ConfigError(
            f"train.predict_with_generate: only the benchmark's rows can be scored, data.format is {config.data.format}"
        )
    twice = [name for name, count in Counter(row.sample_id for row in dev).items() if count > 1]
    if twice:
        raise ConfigError(
            f"train.predict_with_generate: two dev rows have the sample_id {twice[0]!r}; give them others"
        )
    profile_of(dev)
    foreign = sorted(config.validation.resources.keys() - {"CPU", "GPU"})
    if foreign:
        raise ConfigError(f"validation.resources.{foreign[0]}: an engine takes CPU and GPU only; leave it out")


def key(config: TrainConfig, dev: list[Row]) -> str:
    """What scores depend on beside the checkpoint: two of another key are not to be compared."""
    asked = config.validation.model_dump(mode="json", exclude={"resources"})
    return manifest.config_hash({"validation": asked, "dev": content_hash(dev)})[:8]


def resources(config: TrainConfig, gpus: bool) -> dict[str, float]:
    """What Ray reserves for the engine that answers; nothing where none does."""
    if not config.train.predict_with_generate:
        return {}
    cards = float(config.validation.engine.get("tensor_parallel_size", 1))
    return {"CPU": 1.0, **({"GPU": cards} if gpus else {}), **config.validation.resources}


def ray_config(config: TrainConfig, stop_flag: str) -> ray.train.ValidationConfig | None:
    """What Ray Train does with a checkpoint that it is told of (see `report`)."""
    if not config.train.predict_with_generate:
        return None
    return ray.train.ValidationConfig(
        fn=partial(_score_pointer, config=config, stop_flag=stop_flag),
        # The engine inside reserves its own; the progress bar is for a person who waits for it.
        ray_remote_kwargs={
            "num_cpus": 0,
            "runtime_env": {"env_vars": {"TQDM_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}},
        },
    )


def report(run: str, step: int, *, saved: bool) -> None:
    """Tell Ray Train of the progress. Called by every worker; `saved` by the one that wrote a checkpoint to score."""
    if not saved:
        ray.train.report({"step": step})
        return
    # The checkpoint is ours and stands already: Ray is given its address.
    with TemporaryDirectory() as pointer:
        Path(pointer, _POINTER).write_text(str(step), encoding="utf-8")
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(pointer), validation=True)


def _score_pointer(pointer: ray.train.Checkpoint, *, config: TrainConfig, stop_flag: str) -> dict[str, Any]:
    if cluster.Watch(stop_flag).stops():
        return {}  # scored when the run goes on
    with pointer.as_directory() as directory:
        step = int(Path(directory, _POINTER).read_text(encoding="utf-8"))
    written = storage.join(checkpoint.path(config.output_dir, step), manifest.NAME)
    deadline = time.monotonic() + _UPLOAD_S
    while not storage.exists(written):
        if cluster.Watch(stop_flag).stops():
            return {}
        if time.monotonic() > deadline:
            raise OutputError(f"{written}: not there after {_UPLOAD_S:g} s; was the upload refused?")
        time.sleep(1)
    return score(config, step)


def score_missing(config: TrainConfig) -> None:
    """Score the checkpoints that are there and have no score yet."""
    if config.train.predict_with_generate:
        for step in checkpoint.steps(config.output_dir):
            try:
                score(config, step)
            except OutputError as error:
                print(f"warning: {error}; it has no score", flush=True)


def score(config: TrainConfig, step: int) -> dict[str, Any]:
    """Let a checkpoint answer the dev rows; returns, and leaves beside the run, what its answers are worth."""
    from paddock.sweep import score_adapter  # training workers, which import this module, need none of it

    run, dev = config.output_dir, load_rows(config).dev
    now = key(config, dev)
    found = checkpoint.read_score(run, step)
    if found is not None and found["key"] == now:
        return found
    place = storage.workplace(run) / checkpoint.SCORES / f"checkpoint-{step}-{now}"
    gold = place.with_name(f"dev-{now}.json")
    gold.parent.mkdir(parents=True, exist_ok=True)
    write_records(gold, [row.as_record() for row in dev])
    asked = config.validation
    room = resources(config, cluster.has_gpus())
    predict = build(
        PredictConfig,
        {
            "output_dir": str(place),
            "model": config.model.model_dump(),
            "prompt": config.prompt.model_dump(),
            "data": {"test": str(gold)},
            "adapter": str(checkpoint.path(run, step)),
            "engine": "local",
            "predict": {"sampling": asked.sampling.model_dump()},
            "serve": {
                "engine": asked.engine,
                "ray_actor_options": {"num_cpus": room["CPU"], "num_gpus": room.get("GPU", 0)},
            },
        },
    )
    scored = score_adapter(predict, str(gold))
    record = {"step": step, "key": now, **{name: scored[name] for name in ("score", "interval")}}
    record["score_by_task"] = {name: task["score"] for name, task in scored["tasks"].items()}
    storage.write_text(checkpoint.score_file(run, step), json.dumps(record, ensure_ascii=False, indent=2) + "\n")
    print(f"{checkpoint.path(run, step)}: score {record['score']:.2f} on the dev rows", flush=True)
    return record
