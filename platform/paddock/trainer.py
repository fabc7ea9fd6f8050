"""A training run around its loop: what is refused before it, what identifies it, and Ray Train.

RUN/run.json         what the run is: written when it starts, compared when it goes on
RUN/packed/          its rows, tokenised and packed
RUN/checkpoint-N/    see paddock.checkpoint
RUN/metrics.jsonl    see paddock.journal
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from paddock import (
    __version__,
    checkpoint,
    cluster,
    dataset,
    four_bit,
    journal,
    lora,
    manifest,
    storage,
    validation,
)
from paddock.config import TrainConfig
from paddock.dataset import Rows, load_rows, pack_rows
from paddock.errors import ConfigError, OutputError, PaddockError, ResourceError
from paddock.prompts import load_template
from paddock.train import Attempt, train_worker

RECORD = "run.json"
_TERMINATED = 128 + signal.SIGTERM


def train(config: TrainConfig) -> str | Path:
    """Train, and return where the last checkpoint stands. A run that was cut short goes on where it was.

    Raises a PaddockError before anything starts for whatever can be known by then: configuration, data,
    model, a run directory of another configuration, a cluster that is too small. Told to end (SIGTERM), it
    saves a checkpoint and exits.
    """
    rows, inputs = _check(config)
    started = cluster.connect()
    try:
        scaling, backend = _scaling(config)
        run = config.output_dir
        with manifest.locked(run):
            if config.overwrite:
                _remove(run)
            identity = begin(config, inputs)
            steps = _max_steps(config, pack_rows(config, inputs, rows, dataset.tokenise_on_ray), identity)
            last = checkpoint.path(run, steps)
            found = checkpoint.find_last(run, identity, inputs)
            if found is not None and checkpoint.step_of(found) == steps:
                print(f"{last}: already trained with this configuration; nothing to do")
                return _ended(config, last)
            quiet = config.train.disable_tqdm
            attempt = Attempt(
                config=config,
                identity=identity,
                inputs=inputs,
                max_steps=steps,
                stop_flag=f"paddock-stop-{uuid.uuid4()}",
                progress_bar=sys.stderr.isatty() if quiet is None else not quiet,
            )
            with _terminable(attempt):
                done = _fit(attempt, scaling, backend)
            if done < steps:
                print(f"{checkpoint.path(run, done)}: saved; the same command goes on from there", flush=True)
                sys.exit(_TERMINATED)
            manifest.verify(last)
            return _ended(config, last)
    finally:
        cluster.disconnect(started)


def _ended(config: TrainConfig, last: str | Path) -> str | Path:
    """What is left to do when all steps are done: scores that are missing, and which checkpoints stay."""
    run, recipe = config.output_dir, config.train
    validation.score_missing(config)
    checkpoint.prune(run, recipe.save_total_limit, best_by=recipe.best_by)
    if recipe.best_by:
        best = checkpoint.best(run, recipe.best_by)
        print(f"best by {recipe.best_by}: {checkpoint.path(run, best) if best else 'none'}", flush=True)
    return last


def check_config(config: TrainConfig) -> None:
    """What can be refused before any input is looked at, or made."""
    if config.data.train is None:
        raise ConfigError("data.train: is required; give the file of training rows as data.train=FILE")
    load_template(config.prompt.template)
    lora.lora_config(config.lora)
    ways = [name for name in ("fp8", "load_in_4bit", "fsdp") if getattr(config.train, name)]
    if len(ways) > 1:
        raise ConfigError(f"train.{ways[0]}: not together with train.{ways[1]}; give one of them as false")
    journal.check_trackers(config.train.report_to)


def check(config: TrainConfig) -> dict[str, str]:
    """Everything that can be refused before Ray is asked; returns the inputs' fingerprints."""
    return _check(config)[1]


def _check(config: TrainConfig) -> tuple[Rows, dict[str, str]]:
    check_config(config)
    template = load_template(config.prompt.template)
    lora.check_base(config.model.path)
    lora.load_tokenizer(config.model.path)
    lora.check_targets(config.model, config.lora)
    model = manifest.fingerprint(config.model.path)
    rows = load_rows(config)
    if config.train.best_by and not rows.dev:
        raise ConfigError("train.keep_best: needs dev rows; give data.dev or data.validation_split_percentage")
    validation.check(config, rows.dev)
    inputs = {"model": model, **rows.fingerprints, "prompt": template.text}
    if config.lora.init_from is not None:
        lora.check_init_from(config.lora, model)
        inputs["lora.init_from"] = manifest.fingerprint(config.lora.init_from)
    return rows, inputs


def run_config(config: TrainConfig, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What identifies a run: the hashed configuration, with the step's batch instead of how it is split.

    earlier: what `run.json` says of the same run. Where only the number of workers is another one, the run
    keeps its batch.
    """
    hashed = config.hashed()
    recipe = hashed["train"]
    share = recipe.pop("per_device_train_batch_size") * recipe.pop("gradient_accumulation_steps")
    workers = config.scaling.max_workers
    if earlier and earlier["num_workers"] != workers:
        batch = earlier["config"]["train"]["global_batch_size"]
        workers = earlier["num_workers"] if batch == share * earlier["num_workers"] else workers
    recipe["global_batch_size"] = workers * share
    if recipe["max_steps"] > 0:
        recipe.pop("num_train_epochs")
    return hashed


def begin(config: TrainConfig, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Compare the run with what `run.json` says it is, and write that where it starts; returns its identity.

    A run without a checkpoint has nothing to lose: it starts afresh with another configuration. Raises
    OutputError where there are checkpoints of another one.
    """
    run, record = config.output_dir, storage.join(config.output_dir, RECORD)
    earlier = None
    if storage.exists(record):
        with storage.reading(record) as stream:
            try:
                said = json.load(stream)
                earlier = {name: said[name] for name in ("config", "inputs", "num_workers")}
            except (ValueError, KeyError, TypeError):
                raise OutputError(f"{record}: cannot be read; choose another output_dir or overwrite=true") from None
    identity = run_config(config, earlier)
    now = {"config": identity, "inputs": dict(inputs), "num_workers": config.scaling.max_workers}
    if earlier:
        changed = manifest.changed(earlier["config"], earlier["inputs"], identity, inputs)
        if changed is None:
            batch = identity["train"]["global_batch_size"]
            if earlier["num_workers"] != now["num_workers"]:
                print(
                    f"{run}: begun with {earlier['num_workers']} worker(s); its steps stay {batch} blocks", flush=True
                )
            return identity
        if checkpoint.steps(run):
            raise OutputError(
                f"{run}: its checkpoints were made with another configuration: {changed};"
                " choose another output_dir or overwrite=true"
            )
        _remove(run)
    text = json.dumps({"created_by": f"paddock {__version__}", **now}, ensure_ascii=False, indent=2) + "\n"
    storage.write_text(record, text)
    return identity


def _remove(run: str | Path) -> None:
    """Remove what a run has made, and nothing else."""
    checkpoint.prune(run, keep=0)
    for name in (RECORD, "packed", journal.METRICS, journal.TENSORBOARD, checkpoint.SCORES):
        storage.remove(storage.join(run, name))


def _max_steps(config: TrainConfig, packed: str | Path, identity: Mapping[str, Any]) -> int:
    made = manifest.check(packed, "packed")
    return steps_of(config, made.extra["train"]["blocks"], identity["train"]["global_batch_size"])


def steps_of(config: TrainConfig, blocks: int, batch: int) -> int:
    """Optimizer steps of a run over so many packed blocks, `batch` of them a step."""
    if config.train.max_steps > 0:
        return config.train.max_steps
    return max(1, math.ceil(config.train.num_train_epochs * blocks / batch))


def _scaling(config: TrainConfig) -> tuple[ray.train.ScalingConfig, TorchConfig]:
    """What Ray Train is asked for. Raises ResourceError where the cluster cannot give it."""
    part = config.scaling
    use_gpu = cluster.has_gpus() if part.use_gpu is None else part.use_gpu
    bundle = {"CPU": 1.0, **({"GPU": 1.0} if use_gpu else {}), **part.resources_per_worker}
    if config.train.load_in_4bit:
        four_bit.check(on_gpu=bundle.get("GPU", 0) > 0)
    if config.train.fsdp and 0 < bundle.get("GPU", 0) < 1:
        raise ConfigError("train.fsdp: needs a whole GPU for each worker; give scaling.resources_per_worker no GPU")
    beside = validation.resources(config, use_gpu)
    cluster.require([*[bundle] * part.min_workers, *([beside] if beside else [])], "training")
    scaling = ray.train.ScalingConfig(
        num_workers=part.num_workers, use_gpu=bundle.get("GPU", 0) > 0, resources_per_worker=bundle
    )
    # NCCL refuses two workers on one card.
    whole_cards = bundle.get("GPU", 0) >= 1
    return scaling, TorchConfig(backend="nccl" if whole_cards else "gloo")


class _Refusal(ray.train.UserCallback):  # type: ignore[misc]
    """A mistake that the user can fix is not tried again: raised in Ray Train's controller, it ends the run, and with
    it the scoring of checkpoints, for which Ray Train would wait."""

    def __init__(self, stop_flag: str) -> None:
        self.stop_flag = stop_flag

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for failure in worker_exceptions.values():
            if isinstance(failure, PaddockError):
                cluster.ask_to_stop(self.stop_flag)
                raise failure


def _fit(attempt: Attempt, scaling: Any, backend: Any) -> int:
    """Run the workers, again where they die; returns the steps that are done."""
    config = attempt.config
    run = ray.train.RunConfig(
        # Ray's own records of the attempt; what counts are our checkpoints, one directory up.
        name=time.strftime("%Y%m%d-%H%M%S"),
        storage_path=str(storage.join(config.output_dir, "ray_train")),
        logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
        failure_config=ray.train.FailureConfig(max_failures=config.scaling.max_failures),
        callbacks=[_Refusal(attempt.stop_flag)],
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=attempt,
        scaling_config=scaling,
        run_config=run,
        torch_config=backend,
        validation_config=validation.ray_config(config, attempt.stop_flag),
    )
    try:
        return int(trainer.fit().return_value)
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, PaddockError):
            raise error.controller_failure from None
        raise
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, PaddockError):
                raise failure from None
        if all(isinstance(failure, ray.exceptions.RayActorError) for failure in error.worker_failures.values()):
            raise ResourceError(
                f"{config.output_dir}: the workers died more than scaling.max_failures={config.scaling.max_failures}"
                " times (killed, or out of memory); the same command goes on from the last checkpoint"
            ) from None
        raise


@contextmanager
def _terminable(attempt: Attempt) -> Iterator[None]:
    """While this lasts, SIGTERM asks the workers to save a checkpoint and to end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        print("SIGTERM: saving a checkpoint, then ending", flush=True)
        threading.Thread(target=cluster.ask_to_stop, args=(attempt.stop_flag,)).start()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
