"""Who is asked again, who goes into quarantine, and when a run ends; without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pytest

from paddock import feeder
from paddock.clients import Answer, BusyError, Question
from paddock.config import PredictPart
from paddock.data import Row
from paddock.errors import ServiceError
from paddock.feeder import Asking, Feeder

ROWS = [Row(f"问{i}", answer_choices=("甲", "乙", "甲"), task_dataset="KUAKE-IR", sample_id=f"r{i}") for i in range(6)]


class Scripted:
    """A client that does what a function of the row and the number of its try says."""

    def __init__(self, script: Callable[[str, int], Any]) -> None:
        self.script = script
        self.tries: dict[str, int] = {}
        self.questions: list[Question] = []
        self.ids: list[str] = []

    async def ask(self, question: Question, request_id: str) -> Answer:
        name = question.row.sample_id
        self.tries[name] = self.tries.get(name, 0) + 1
        self.questions.append(question)
        self.ids.append(request_id)
        await asyncio.sleep(0.001)
        result = self.script(name, self.tries[name])
        if isinstance(result, BaseException):
            raise result
        if result is None:
            await asyncio.sleep(100)
        return Answer(str(result), "stop", 3, 2)


def feed(client: Scripted, asking: Asking | None = None, **predict: Any) -> list[dict[str, Any]]:
    async def run() -> list[dict[str, Any]]:
        table = pa.Table.from_pylist([{"row_index": i, **asdict(row)} for i, row in enumerate(ROWS)])
        part = PredictPart.model_validate({"max_attempts": 3, **predict})
        (batch,) = [b async for b in Feeder(lambda: client, asking or Asking({}), part)(table)]
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "_LONGEST_PAUSE_S", 0.01)


def test_a_row_that_is_refused_is_not_asked_again_and_stops_nothing() -> None:
    client = Scripted(lambda name, _: ValueError("too\nlong") if name == "r2" else name)
    said = feed(client)
    assert [p["error"] for p in said] == [None, None, "too long", None, None, None]
    assert [p["text"] for p in said] == ["r0", "r1", "", "r3", "r4", "r5"]
    assert [p["row_index"] for p in said] == list(range(6))
    assert client.tries["r2"] == 1


def test_what_fails_is_asked_again_under_another_id() -> None:
    client = Scripted(lambda name, attempt: RuntimeError("died") if name == "r1" and attempt < 3 else name)
    assert [p["error"] for p in feed(client)] == [None] * 6
    assert client.tries["r1"] == 3
    assert len(set(client.ids)) == len(client.ids)


def test_a_row_that_fails_while_others_are_answered_goes_into_quarantine() -> None:
    client = Scripted(lambda name, _: RuntimeError("boom") if name == "r1" else name)
    said = feed(client)
    assert said[1]["error"] == "failed 3 times, the last time with: boom"
    assert sum(p["error"] is None for p in said) == 5


def test_a_row_that_never_ends_goes_into_quarantine() -> None:
    said = feed(Scripted(lambda name, _: None if name == "r1" else name), request_timeout_s=0.05)
    assert "TimeoutError" in said[1]["error"]


def test_a_cancelled_request_is_a_failed_try() -> None:
    """As Serve does to what a replica that is stopped was at work on."""
    client = Scripted(lambda name, attempt: asyncio.CancelledError() if attempt == 1 else name)
    assert [p["error"] for p in feed(client)] == [None] * 6


def test_a_full_service_costs_no_attempt() -> None:
    client = Scripted(lambda name, attempt: BusyError("full") if name == "r1" and attempt < 9 else name)
    assert feed(client)[1]["text"] == "r1"


def test_nobody_is_blamed_for_a_service_that_comes_back() -> None:
    """Each try fails for a while, more often than max_attempts: a replica died and is replaced."""
    begun = time.monotonic()
    client = Scripted(lambda name, _: name if time.monotonic() - begun > 0.3 else RuntimeError("died"))
    assert [p["error"] for p in feed(client, service_timeout_s=30)] == [None] * 6
    assert client.tries["r0"] > 3


def test_a_service_that_stays_away_ends_the_run_in_bounded_time() -> None:
    begun = time.monotonic()
    with pytest.raises(ServiceError, match=r"nobody was answered for .* what is done is kept"):
        feed(Scripted(lambda *_: RuntimeError("connection refused")), service_timeout_s=0.3)
    assert time.monotonic() - begun < 10


def test_a_mistake_of_the_user_s_ends_the_run_at_once() -> None:
    client = Scripted(lambda *_: ServiceError("target_url: 401"))
    with pytest.raises(ServiceError, match="401"):
        feed(client)
    assert max(client.tries.values()) == 1


def test_questions_carry_what_their_task_asks_for() -> None:
    client = Scripted(lambda name, _: name)
    asking = Asking(
        {"max_tokens": 512, "temperature": 0},
        max_tokens_by_task={"KUAKE-IR": 16},
        adapter="general",
        adapter_by_task={"KUAKE-IR": "special"},
        choice_tasks={"KUAKE-IR"},
    )
    feed(client, asking)
    asked = client.questions[0]
    assert asked.sampling == {"max_tokens": 16, "temperature": 0}
    assert (asked.adapter, asked.choices) == ("special", ["甲\n", "乙\n"])
    other = asking.question(Row("x", answer_choices=("甲",), task_dataset="CMeEE-V2"))
    assert (other.sampling["max_tokens"], other.adapter, other.choices) == (512, "general", None)


def test_never_more_open_requests_than_configured() -> None:
    class Counting(Scripted):
        now = most = 0

        async def ask(self, question: Question, request_id: str) -> Answer:
            self.now += 1
            self.most = max(self.most, self.now)
            answer = await super().ask(question, request_id)
            self.now -= 1
            return answer

    client = Counting(lambda name, _: name)
    feed(client, max_in_flight=2)
    assert client.most == 2
