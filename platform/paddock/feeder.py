"""Rows in, predictions out, many at a time: who asks again, who gives up, and when.

A failure is the row's where others are answered meanwhile, and after `max_attempts` of them it is put into
quarantine. Where nobody is answered the failure is the service's; it may come back within `service_timeout_s`, so
that a replica that died costs no row, and then the run ends.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from paddock.clients import Answer, BusyError, Client, LocalClient, Question
from paddock.config import PredictPart
from paddock.data import Row
from paddock.errors import PaddockError, ServiceError
from paddock.ledger import Prediction

_LONGEST_PAUSE_S = 15


@dataclass(frozen=True)
class Asking:
    """What is asked about a row, beside the row."""

    sampling: Mapping[str, Any]
    max_tokens_by_task: Mapping[str, int] = field(default_factory=dict)
    adapter: str | None = None
    adapter_by_task: Mapping[str, str] = field(default_factory=dict)
    choice_tasks: Collection[str] = ()
    """Tasks whose rows are answered by one of their `answer_choices`."""

    def question(self, row: Row) -> Question:
        sampling = dict(self.sampling)
        if row.task_dataset in self.max_tokens_by_task:
            sampling["max_tokens"] = self.max_tokens_by_task[row.task_dataset]
        choices = None
        if row.task_dataset in self.choice_tasks and row.answer_choices:
            # With the newline that every completion was trained to end in; it also tells a choice from a longer one.
            choices = [f"{choice}\n" for choice in dict.fromkeys(row.answer_choices)]
        return Question(row, sampling, self.adapter_by_task.get(row.task_dataset, self.adapter), choices)


class Feeder:
    """Keeps what answers full, with `max_in_flight` requests open. It belongs to one event loop."""

    def __init__(self, make_client: Callable[[], Client], asking: Asking, predict: PredictPart) -> None:
        self.client = make_client()
        self.asking = asking
        self.predict = predict
        self.open: asyncio.Semaphore | None = None
        self.last_answer = float("-inf")
        self.begun = float("inf")

    async def __call__(self, batch: Any) -> AsyncIterator[dict[str, list[Any]]]:
        """Ray Data's: a table of rows with their `row_index` -> a table of predictions."""
        # Made here, in the loop that it belongs to; shared by all batches.
        self.open = self.open or asyncio.Semaphore(self.predict.max_in_flight)
        if isinstance(self.client, LocalClient):
            await self.client.start()
        self.begun = min(self.begun, time.monotonic())
        predictions = await asyncio.gather(*(self._predict(record) for record in batch.to_pylist()))
        yield {name: [getattr(p, name) for p in predictions] for name in Prediction.__dataclass_fields__}

    async def _predict(self, record: dict[str, Any]) -> Prediction:
        index = record.pop("row_index")
        record["answer_choices"] = None if record["answer_choices"] is None else tuple(record["answer_choices"])
        row = Row(**record)
        answer, error = Answer("", "", 0, 0), None
        assert self.open is not None
        async with self.open:
            begun = time.monotonic()
            try:
                answer = await self._ask(self.asking.question(row))
            except ValueError as refused:
                error = line(refused)
        return Prediction(index, row.sample_id, **asdict(answer), seconds=time.monotonic() - begun, error=error)

    async def _ask(self, question: Question) -> Answer:
        """One answer. Raises ValueError where the row cannot be answered, a PaddockError where nobody will be."""
        begun, failures, tries = time.monotonic(), 0, 0
        while True:
            tries += 1
            try:
                # An id of its own each time: the engine may still be at work on an earlier try, or an earlier run's.
                answer = await asyncio.wait_for(
                    self.client.ask(question, f"predict-{uuid.uuid4().hex}"), self.predict.request_timeout_s
                )
                self.last_answer = time.monotonic()
                return answer
            except ValueError:
                self.last_answer = time.monotonic()
                raise
            except BusyError as busy:
                error: BaseException = busy
            except (Exception, asyncio.CancelledError) as failed:
                if _is_final(failed):
                    raise
                error = failed
                failures += 1
            if failures >= self.predict.max_attempts and self.last_answer > begun:
                raise ValueError(f"failed {failures} times, the last time with: {line(error)}") from None
            silent = time.monotonic() - max(self.last_answer, self.begun)
            if silent > self.predict.service_timeout_s:
                raise ServiceError(
                    f"nobody was answered for {silent:.0f} s ({line(error)}); what is done is kept: start again when"
                    " the service is up"
                ) from None
            # Full jitter: callers that failed together do not come back together.
            await asyncio.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, 2**tries)))


def _is_final(error: BaseException) -> bool:
    """Whether the run must end: a mistake of the user's, or somebody cancels this very task."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    # A replica's ServiceError comes wrapped in one of Ray's errors; that one may pass.
    return isinstance(error, PaddockError) and not hasattr(error, "cause")


def line(error: BaseException) -> str:
    """What an error says, in one line: of what Ray wrapped in a replica's traceback, only the error."""
    inner = getattr(error, "cause", None) or error
    return " ".join(str(inner).split())[:500] or type(inner).__name__
