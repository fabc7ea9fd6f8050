"""A test set through a served model: Ray Data -> Serve handle -> ledger -> submission.

Each row is predicted once and stands, in the end, where it stood in the input. What can be retried is, with
jitter; a row that cannot be answered is put into quarantine with its reason and stops nothing; a service
that is gone stops the run, with what is done kept.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray import serve
from ray.exceptions import RayError
from tqdm import tqdm

from paddock import cluster, engine, lora, manifest, prompts, service, storage
from paddock.config import PredictConfig
from paddock.data import Row, content_hash, read_rows, write_records
from paddock.errors import ConfigError, DataError, OutputError, PaddockError, ServiceError
from paddock.ledger import Ledger, Prediction
from paddock.scoring import profile_of
from paddock.submission import PREDICTIONS, write_submission

# Rows come back batch by batch; several batches are open at a time.
_ROWS_PER_BATCH = 8


def predict(config: PredictConfig) -> str | Path:
    """Predict `data.test` and return `output_dir`, which holds the ledger and the submission.

    Raises a PaddockError before anything starts for whatever is wrong by then, and ServiceError where the
    service stops answering; started again, it goes on with the rows that are missing.
    """
    rows = read_test(config)
    key = ledger_key(config, rows)
    output = storage.join(config.output_dir)
    manifest.apart(output, config.model.path, config.data.test or "")
    with manifest.locked(output):
        if config.overwrite:
            _remove_ours(output)
        finished = manifest.read(output)
        ledger = Ledger(output, key)
        pending = ledger.pending(len(rows), retry_quarantined=config.predict.retry_quarantined)
        if finished and not pending:
            manifest.check(output, "predictions")
            print(f"{output}: already predicted with this configuration; nothing to do")
            return output
        # While rows are missing the directory is not finished, whatever it was before.
        for directory in (output, ledger.directory):
            storage.remove(storage.join(directory, manifest.NAME))
        if pending:
            started = cluster.connect()
            try:
                with service.running(config.service()) as app_name:
                    _predict_pending(config, rows, pending, app_name, ledger)
            finally:
                cluster.disconnect(started)
        _finish(config, rows, ledger, key)
    return output


def _remove_ours(output: str | Path) -> None:
    """For `overwrite`: a ledger and what was made of it; nobody else's directory."""
    if storage.children(output) and not storage.exists(storage.join(output, "ledger.json")):
        raise OutputError(f"{output}: holds files but no ledger.json; choose another output_dir")
    storage.remove(output)


def read_test(config: PredictConfig) -> list[Row]:
    """The rows to predict, without their gold."""
    if config.data.test is None:
        raise ConfigError("data.test: is required; give the file of rows to predict as data.test=FILE")
    rows = read_rows(config.data.test, config.data.format, unique_ids=True)
    if config.data.format == "promptcblue":
        try:
            profile_of(rows)  # tasks that no profile has are refused now, not when all is predicted
        except DataError as error:
            raise DataError(f"{config.data.test}: {error}") from None
    return [replace(row, target="") for row in rows]


def ledger_key(config: PredictConfig, rows: list[Row]) -> dict[str, Any]:
    """What the predictions depend on. Checks the model, the template and the sampling by the way."""
    lora.check_base(config.model.path)
    lora.load_tokenizer(config.model.path)
    engine.sampling_params(config.predict.sampling)
    return {
        "model": manifest.fingerprint(config.model.path),
        "engine": config.service().engine,
        "prompt": prompts.load_template(config.prompt.template).text,
        "sampling": config.predict.sampling.model_dump(mode="json"),
        "data": content_hash(rows),
    }


def _predict_pending(config: PredictConfig, rows: list[Row], pending: list[int], app_name: str, ledger: Ledger) -> None:
    begun, tokens = time.monotonic(), 0
    kept: list[Prediction] = []
    try:
        with tqdm(total=len(rows), initial=len(rows) - len(pending), unit="row", desc="predict") as progress:
            for prediction in _stream(config, rows, pending, app_name):
                kept.append(prediction)
                tokens += prediction.completion_tokens
                progress.update()
                progress.set_postfix_str(f"{tokens / (time.monotonic() - begun):.0f} tokens/s", refresh=False)
                if len(kept) >= config.predict.rows_per_shard:
                    ledger.append(kept)
                    kept = []
    finally:
        # What was answered before the service went is not asked again.
        if kept:
            ledger.append(kept)


def _stream(config: PredictConfig, rows: list[Row], pending: list[int], app_name: str) -> Iterator[Prediction]:
    """Ray Data over the pending rows, in whatever order they are answered."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [{"row_index": i, **asdict(rows[i])} for i in pending]
    answered = ray.data.from_items(items, override_num_blocks=1).map_batches(
        Feeder,
        fn_constructor_args=(config, app_name, prompts.load_template(config.prompt.template)),
        batch_size=_ROWS_PER_BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0,  # it waits for others, and must find room where they hold every CPU
    )
    try:
        for record in answered.iter_rows():
            yield Prediction(**record)
    except RayError as error:
        raise _user_error(error) from error


class Feeder:
    """Keeps the replicas full: rows in, predictions out, with `max_in_flight` requests open."""

    def __init__(self, config: PredictConfig, app_name: str, template: prompts.Template) -> None:
        self.predict = config.predict
        self.sampling = config.predict.sampling.model_dump()
        self.template = template
        self.tokenizer = lora.load_tokenizer(config.model.path)
        self.handle = serve.get_app_handle(app_name)
        self.open: asyncio.Semaphore | None = None

    async def __call__(self, batch: Any) -> AsyncIterator[dict[str, list[Any]]]:
        # Made here, in the loop that it belongs to; shared by all batches.
        self.open = self.open or asyncio.Semaphore(self.predict.max_in_flight)
        predictions = await asyncio.gather(*(self._row(record) for record in batch.to_pylist()))
        yield {name: [getattr(p, name) for p in predictions] for name in Prediction.__dataclass_fields__}

    async def _row(self, record: dict[str, Any]) -> Prediction:
        index = record.pop("row_index")
        row = Row(**record)
        begun = time.monotonic()
        generation: dict[str, Any] = {}
        error: str | None = None
        assert self.open is not None
        async with self.open:
            try:
                ids = prompts.prompt_ids(self.tokenizer, self.template, row)
                generation = await self._ask(ids, f"{row.sample_id}-{index}")
            except (ValueError, TimeoutError) as refused:
                error = _line(refused)
        return Prediction(
            row_index=index,
            sample_id=row.sample_id,
            text=generation.get("text", ""),
            finish_reason=generation.get("finish_reason", ""),
            prompt_tokens=len(generation.get("prompt_token_ids", ())),
            completion_tokens=len(generation.get("token_ids", ())),
            seconds=time.monotonic() - begun,
            error=error,
        )

    async def _ask(self, ids: list[int], request_id: str) -> dict[str, Any]:
        """One answer. ValueError: the row can never be answered. ServiceError: the service is gone."""
        for attempt in range(1, self.predict.max_attempts + 1):
            try:
                request = self.handle.generate.remote(ids, self.sampling, f"{request_id}-{attempt}")
                return dict(await asyncio.wait_for(request, self.predict.request_timeout_s))
            except ValueError:
                raise
            except Exception as error:
                if attempt == self.predict.max_attempts:
                    if isinstance(error, TimeoutError):
                        raise
                    raise ServiceError(
                        f"the service does not answer ({_line(error)}); what is done is kept: start again when it is up"
                    ) from None
                # Full jitter: callers that failed together do not come back together.
                await asyncio.sleep(random.uniform(0, 2**attempt))
        raise AssertionError("unreachable")


def _finish(config: PredictConfig, rows: list[Row], ledger: Ledger, key: dict[str, Any]) -> None:
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
    manifest.commit(
        ledger.directory,
        "predictions",
        config.hashed(),
        {"model": key["model"], "data.test": key["data"]},
        {"rows": len(rows), "predicted": len(rows) - quarantined, "quarantined": quarantined},
    )
    ledger.publish()
    print(f"{ledger.location}: {len(rows)} rows, {quarantined} in quarantine", flush=True)


def _line(error: BaseException) -> str:
    """What an error says, in one line: of what Ray wrapped in a replica's traceback, only the error."""
    inner = getattr(error, "cause", None) or error
    return " ".join(str(inner).split())[:500] or type(inner).__name__


def _user_error(error: BaseException) -> BaseException:
    """The PaddockError inside what Ray wrapped it in, or the error itself."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, PaddockError) and not isinstance(inner, RayError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error
