"""A test set through a model: Ray Data -> whoever answers -> ledger -> submission.

Each row is predicted once and stands, in the end, where it stood in the input. What can be retried is, with
jitter; a row that cannot be answered is put into quarantine with its reason and stops nothing; a service
that is gone stops the run, with what is done kept.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError, RaySystemError, RayTaskError
from tqdm import tqdm

from paddock import cluster, engine, lora, manifest, prompts, service, storage, unmerged
from paddock.clients import Client, Endpoint, HandleClient, HttpClient, LocalClient, find_endpoint
from paddock.config import PredictConfig, ServeConfig
from paddock.data import Row, content_hash, place, read_rows, write_records
from paddock.errors import ConfigError, DataError, OutputError, PaddockError, ServiceError
from paddock.feeder import Asking, Feeder, line
from paddock.ledger import Ledger, Prediction
from paddock.scoring import profile_of
from paddock.submission import PREDICTIONS, write_submission
from paddock.tasks import TASKS

# Rows come back block by block: few in each, so that none waits long for its slowest.
_ROWS_PER_BLOCK = 4
# Ray Data reserves room for a block of this size for each task that runs, whatever comes out of it.
_BLOCK_BYTES = 2**20
_LOST_FEEDERS = 3
# Engine arguments that say how an answer is computed and not which.
_HOW = {"gpu_memory_utilization", "disable_log_stats", "max_num_seqs", "max_num_batched_tokens", "swap_space"}


def predict(config: PredictConfig, make_client: Callable[[], Callable[[], Client]] | None = None) -> str | Path:
    """Predict `data.test` and return `output_dir`, which holds the ledger and the submission.

    `make_client` gives what `answering` does, where that is up for several runs.

    Raises a PaddockError before anything starts for whatever is wrong by then, and ServiceError where the
    service stops answering; started again, it goes on with the rows that are missing.
    """
    rows = read_test(config)
    endpoint = _endpoint(config)
    key = ledger_key(config, rows, endpoint)
    output = storage.join(config.output_dir)
    manifest.apart(output, config.data.test or "", *_directories(config))
    with manifest.locked(output):
        if config.overwrite:
            _remove_ours(output)
        ledger = Ledger(output, key)
        ledger.repair()
        finished = manifest.read(output)
        pending = ledger.pending(len(rows), retry_quarantined=config.predict.retry_quarantined)
        if finished and not pending:
            manifest.check(output, "predictions")
            print(f"{output}: already predicted with this configuration; nothing to do")
            return output
        # While rows are missing the directory is not finished, whatever it was before.
        for directory in (output, ledger.directory):
            storage.remove(storage.join(directory, manifest.NAME))
        if pending:
            with ExitStack() as stack:
                if make_client is None:
                    stack.callback(cluster.disconnect, cluster.connect())
                    client = stack.enter_context(answering(config, endpoint))
                else:
                    client = make_client()
                _predict_pending(config, rows, pending, client, ledger)
        _finish(config, rows, ledger, key)
    return output


def read_test(config: PredictConfig) -> list[Row]:
    """The rows to predict, without their gold."""
    if config.merge_best is not None:
        raise ConfigError("merge_best: belongs to a sweep; give the adapters to choose from as adapters=PATTERN")
    if config.data.test is None:
        raise ConfigError("data.test: is required; give the file of rows to predict as data.test=FILE")
    rows = read_rows(config.data.test, config.data.format, unique_ids=True)
    if config.data.format == "promptcblue":
        known = {**TASKS["v1"], **TASKS["v2"]}
        foreign = next((i for i, row in enumerate(rows) if row.task_dataset not in known), 0)
        try:
            profile_of(rows)  # tasks that no profile has are refused now, not when all is predicted
        except DataError as error:
            raise DataError(f"{place(config.data.test, foreign)}: {error}") from None
    return [replace(row, target="") for row in rows]


def ledger_key(config: PredictConfig, rows: list[Row], endpoint: Endpoint | None = None) -> dict[str, Any]:
    """What the predictions depend on. Checks the model, the adapters, the template and the sampling by the way."""
    key = {
        "prompt": prompts.load_template(config.prompt.template).text,
        "sampling": {"preset": config.predict.sampling.preset, **_sampling(config)},
        "options": {
            "max_tokens_by_task": config.predict.max_tokens_by_task,
            "structured_choices": config.predict.structured_choices,
        },
        "data": content_hash(rows),
    }
    _check_tasks(config, rows)
    if endpoint is None or endpoint.kind == "completions":
        _check_prompts(config, rows)
    if endpoint is not None:
        if config.adapter or config.adapter_by_task:
            raise ConfigError("adapter: target_url serves its own; name one of them as serve.served_model_name")
        if config.predict.structured_choices and endpoint.kind == "generate":
            raise ConfigError("predict.structured_choices: a /generate endpoint has no such option; ask .../v1 instead")
        return {**key, "model": f"{endpoint.model} at {endpoint.url}".strip()}
    model = config.base().path
    lora.check_base(model)
    lora.load_tokenizer(model)
    for path in _adapters(config):
        unmerged.check(path, model)
    arguments = {name: value for name, value in config.service().engine.items() if name not in _HOW}
    return {
        **key,
        "model": manifest.fingerprint(model),
        "engine": arguments,
        "adapter": manifest.fingerprint(config.adapter) if config.adapter else None,
        "adapter_by_task": {task: manifest.fingerprint(path) for task, path in config.adapter_by_task.items()},
    }


def serving(config: PredictConfig) -> ServeConfig:
    """The service that answers a run, with room for its adapters."""
    base = config.service()
    engine_args = {**unmerged.engine_args(_adapters(config)), **base.engine}
    return base.model_copy(update={"engine": engine_args, "optimize_for": "throughput"})


def _sampling(config: PredictConfig) -> dict[str, Any]:
    """vLLM's parameters; without vLLM on this machine, which an endpoint does not need, as they are given."""
    if config.target_url is not None:
        return engine.preset(config.predict.sampling)
    return engine.sampling_params(config.predict.sampling)


def _adapters(config: PredictConfig) -> list[str]:
    """Every adapter directory that the run needs, once."""
    return list(dict.fromkeys([*filter(None, [config.adapter]), *config.adapter_by_task.values()]))


def _directories(config: PredictConfig) -> list[str]:
    return [*([config.model.path] if config.model else []), *_adapters(config)]


def _check_tasks(config: PredictConfig, rows: list[Row]) -> None:
    """Raise ConfigError for a task among the keys that no row is of: most likely misspelt."""
    tasks = {row.task_dataset for row in rows}
    for name, by_task in (
        ("adapter_by_task", config.adapter_by_task),
        ("predict.max_tokens_by_task", config.predict.max_tokens_by_task),
    ):
        for task in by_task:
            if task not in tasks and task not in {**TASKS["v1"], **TASKS["v2"]}:
                known = ", ".join(sorted(tasks - {""})) or "none: their format names no task"
                raise ConfigError(f"{name}.{task}: no such task; the rows are of {known}")


def _check_prompts(config: PredictConfig, rows: list[Row]) -> None:
    """Raise DataError, with file and line, for a row that the template cannot take."""
    template = prompts.load_template(config.prompt.template)
    for index, row in enumerate(rows):
        try:
            template.render(row)
        except DataError as error:
            raise DataError(f"{place(config.data.test or config.data.dev or '', index)}: {error}") from None


def _endpoint(config: PredictConfig) -> Endpoint | None:
    if config.target_url is None:
        config.base()
        return None
    return find_endpoint(config.target_url, config.serve.served_model_name)


def _remove_ours(output: str | Path) -> None:
    """For `overwrite`: a ledger and what was made of it; nobody else's directory."""
    if storage.children(output) and not storage.exists(storage.join(output, "ledger.json")):
        raise OutputError(f"{output}: holds files but no ledger.json; choose another output_dir")
    storage.remove(output)


@contextmanager
def answering(config: PredictConfig, endpoint: Endpoint | None = None) -> Iterator[Callable[[], Client]]:
    """What makes a client in a worker, while what it asks is up."""
    template = prompts.load_template(config.prompt.template)
    if endpoint is not None:
        yield functools.partial(HttpClient, endpoint, template)
    elif config.engine == "local":
        cluster.require([_resources(config)] * config.predict.num_workers, "engine=local")
        yield functools.partial(LocalClient, serving(config), template)
    else:
        # By its own name no other run stops it, and this one, killed and started again, finds its own.
        name = f"{service.TEMPORARY}{hashlib.sha256(str(config.output_dir).encode()).hexdigest()[:8]}"
        with service.running(serving(config), name) as app_name:
            yield functools.partial(HandleClient, app_name, config.base().path, template)


def _resources(config: PredictConfig) -> dict[str, float]:
    """What Ray reserves for a worker: nothing where it waits for others, an engine's where it holds one."""
    if config.engine != "local" or config.target_url is not None:
        return {"CPU": 0}  # it must find room where others hold every CPU
    options, arguments = config.serve.ray_actor_options, config.serve.engine
    cards = int(arguments.get("tensor_parallel_size", 1)) * int(arguments.get("pipeline_parallel_size", 1))
    return {
        "CPU": float(options.get("num_cpus", 1)),
        "GPU": float(options.get("num_gpus", cards if cluster.has_gpus() else 0)),
    }


@dataclass
class _Progress:
    """Answered rows on their way to the ledger, and what the person who waits is told."""

    ledger: Ledger
    rows_per_shard: int

    def __post_init__(self) -> None:
        self.begun = self.written = time.monotonic()
        self.kept: list[Prediction] = []
        self.tokens = 0

    def add(self, prediction: Prediction) -> None:
        self.kept.append(prediction)
        self.tokens += prediction.completion_tokens
        now = time.monotonic()
        # What a crash can cost: the rows that are asked for, and a second or a hundredth of the work so far.
        if len(self.kept) >= self.rows_per_shard or now - self.written >= max(1.0, (now - self.begun) / 100):
            self.write()

    def write(self) -> None:
        if self.kept:
            self.ledger.append(self.kept)
        self.kept, self.written = [], time.monotonic()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(time.monotonic() - self.begun, 1e-9)


def _predict_pending(
    config: PredictConfig, rows: list[Row], pending: list[int], make_client: Callable[[], Client], ledger: Ledger
) -> None:
    """Ask for the pending rows until none is left; a feeder that dies takes only its open requests with it."""
    progress, left, lost = _Progress(ledger, config.predict.rows_per_shard), dict.fromkeys(pending), 0
    # A pipe has no use for ten lines a second.
    bar = tqdm(total=len(rows), initial=len(rows) - len(left), unit="row", desc="predict", mininterval=0.5)
    try:
        while left:
            before, told = len(left), "it ended early"
            try:
                for prediction in _stream(config, rows, list(left), make_client):
                    if prediction.row_index not in left:
                        continue
                    del left[prediction.row_index]
                    progress.add(prediction)
                    bar.set_postfix_str(f"{progress.tokens_per_second:.0f} tokens/s", refresh=False)
                    bar.update()
            except (RayError, RaySystemError) as error:
                _raise_unless_lost(error)
                told = line(error)
            if left:
                lost = 0 if len(left) < before else lost + 1
                if lost >= _LOST_FEEDERS:
                    raise ServiceError(f"the feeder was lost {lost} times without an answer: {told}")
                bar.write(f"the feeder was lost; {len(left)} rows are still to be predicted")
    finally:
        # What was answered before the service went is not asked again.
        progress.write()
        bar.close()


def _stream(
    config: PredictConfig, rows: list[Row], pending: list[int], make_client: Callable[[], Client]
) -> Iterator[Prediction]:
    """Ray Data over the pending rows, in whatever order they are answered."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK_BYTES
    # What goes wrong is told in one line, or raised.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    items = [{"row_index": i, **asdict(rows[i])} for i in pending]
    resources = _resources(config)
    # Twice the open requests, so that there is always a next row where one is answered.
    calls = -(-2 * config.predict.max_in_flight // _ROWS_PER_BLOCK)
    blocks = -(-len(items) // _ROWS_PER_BLOCK)
    with warnings.catch_warnings():
        # Ray 2.60 deprecates how actors are given their options, and has no other way for these yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        answered = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
            Feeder,
            fn_constructor_args=(make_client, _asking(config, rows), config.predict),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=config.predict.num_workers if "GPU" in resources else 1, max_tasks_in_flight_per_actor=calls
            ),
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_concurrency=calls,
            # Started again it would ask for all its rows again; the driver knows which are missing.
            max_restarts=0,
            max_task_retries=0,
        )
    for record in answered.iter_rows():
        yield Prediction(**record)


def _asking(config: PredictConfig, rows: list[Row]) -> Asking:
    labels = {task.name for tasks in TASKS.values() for task in tasks.values() if task.is_label}
    return Asking(
        sampling=_sampling(config),
        max_tokens_by_task=config.predict.max_tokens_by_task,
        adapter=config.adapter,
        adapter_by_task=config.adapter_by_task,
        choice_tasks=labels if config.predict.structured_choices else (),
    )


def _finish(config: PredictConfig, rows: list[Row], ledger: Ledger, key: Mapping[str, Any]) -> None:
    """The submission's files, then the manifest that commits the directory."""
    predictions = ledger.predictions()
    quarantined = ledger.write_quarantine()
    texts = [prompts.answer(predictions[i].text) for i in range(len(rows))]
    if config.data.format == "promptcblue":
        write_submission(ledger.directory, rows, texts, profile_of(rows))
    else:
        records = (
            row.as_record(text) | {"instruction": row.instruction} for row, text in zip(rows, texts, strict=True)
        )
        write_records(ledger.directory / PREDICTIONS, list(records))
    inputs = {"model": key["model"], "data.test": key["data"]}
    inputs |= {"adapter": key["adapter"]} if key.get("adapter") else {}
    inputs |= {f"adapter of {task}": path for task, path in key.get("adapter_by_task", {}).items()}
    manifest.commit(
        ledger.directory,
        "predictions",
        config.hashed(),
        inputs,
        {"rows": len(rows), "predicted": len(rows) - quarantined, "quarantined": quarantined},
    )
    ledger.publish()
    print(f"{ledger.location}: {len(rows)} rows, {quarantined} in quarantine", flush=True)
    if not any(text.strip() for text in texts):
        where = "quarantine.jsonl says why" if quarantined == len(rows) else "shards/ has what the model said: blanks"
        print(f"warning: not one row has an answer; {where}", flush=True)


def _raise_unless_lost(error: BaseException) -> None:
    """Raise the PaddockError inside what Ray wrapped it in, or the bug; return where a process or node was lost."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, PaddockError) and not isinstance(inner, RayError):
            raise inner from error
        inner = getattr(inner, "cause", None) or inner.__cause__
    if isinstance(error, RayTaskError):
        raise error
