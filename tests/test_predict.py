"""A test set through the session's service: every row once, in order, whatever breaks."""

from __future__ import annotations

import asyncio
import functools
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pyarrow as pa
import pytest

from deployments import reference
from paddock import clients, dataset, lora, manifest, packing, predict, prompts
from paddock.config import PredictConfig, TrainConfig, build
from paddock.data import Row, read_rows, write_records
from paddock.engine import Generation
from paddock.errors import ConfigError, DataError, OutputError, ServiceError
from paddock.feeder import Asking, Feeder
from paddock.ledger import Ledger, Prediction


@pytest.fixture
def rows(assets: Path) -> list[Row]:
    return read_rows(assets / "data" / "test.json")[:20]


@pytest.fixture
def tree(rows: list[Row], base_model: Path, tmp_path: Path) -> dict[str, Any]:
    write_records(tmp_path / "test.json", [row.as_record() for row in rows])
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(base_model), "dtype": "float32"},
        "data": {"test": str(tmp_path / "test.json")},
        "predict": {"sampling": {"max_tokens": 8}, "rows_per_shard": 6},
    }


def _predict(tree: dict[str, Any]) -> Path:
    return predict.predict(build(PredictConfig, tree))


def test_every_row_once_in_order_by_the_running_service(
    tree: dict[str, Any], rows: list[Row], service: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    output = _predict(tree)
    assert "using the running service 'default'" in capfd.readouterr().out
    written = [json.loads(line) for line in (output / "test_predictions.json").read_text(encoding="utf-8").splitlines()]
    assert [record["sample_id"] for record in written] == [row.sample_id for row in rows]
    assert [record["input"] for record in written] == [row.input for row in rows]
    assert (output / "submission.zip").is_file()
    assert set(json.loads((output / "results.json").read_text(encoding="utf-8"))) >= {row.task_dataset for row in rows}
    found = manifest.verify(output)
    assert found.extra == {"rows": 20, "predicted": 20, "quarantined": 0}
    assert "gold" not in (output / "ledger.json").read_text()

    # Again: nothing to do. Another sampling: refused. Shards lost: only their rows are predicted again.
    _predict(tree)
    assert "nothing to do" in capfd.readouterr().out
    with pytest.raises(OutputError, match="predictions of another sampling"):
        _predict({**tree, "predict": {"sampling": {"max_tokens": 9}}})
    before = (output / "test_predictions.json").read_bytes(), (output / "submission.zip").read_bytes()
    shards = sorted((output / "shards").iterdir())
    shards[1].unlink()
    kept = {file: file.stat().st_mtime_ns for file in shards if file.exists()}
    _predict(tree)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert ((output / "test_predictions.json").read_bytes(), (output / "submission.zip").read_bytes()) == before


def test_gold_changes_nothing(tree: dict[str, Any], rows: list[Row], tmp_path: Path) -> None:
    config = build(PredictConfig, tree)
    with_gold = predict.ledger_key(config, predict.read_test(config))
    write_records(tmp_path / "test.json", [replace(row, target="").as_record() for row in rows])
    assert predict.ledger_key(config, predict.read_test(config)) == with_gold


def test_a_row_that_cannot_be_answered_stops_nothing(
    tree: dict[str, Any], rows: list[Row], service: Any, tmp_path: Path
) -> None:
    rows[3] = replace(rows[3], input="长" * 3000)
    write_records(tmp_path / "test.json", [row.as_record() for row in rows])
    output = _predict(tree)
    (line,) = (output / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    quarantined = json.loads(line)
    assert quarantined["sample_id"] == rows[3].sample_id
    assert "maximum context length" in quarantined["error"]
    assert "Traceback" not in quarantined["error"]
    assert manifest.read(output).extra["quarantined"] == 1  # type: ignore[union-attr]
    records = [json.loads(text) for text in (output / "test_predictions.json").read_text(encoding="utf-8").splitlines()]
    assert records[3]["target"] == ""
    assert len(records) == len(rows)


class Recorder:
    """Stands where the engine does, and keeps the ids that it is handed."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.given: list[list[int]] = []

    async def find_adapter(self, model: str | None) -> None:
        return None

    async def generate(self, ids: list[int], *_: Any, **more: Any) -> Generation:
        self.given.append(list(ids))
        return Generation(text="x\n", token_ids=[5], prompt_token_ids=list(ids), finish_reason="stop")

    def handle(self) -> Any:
        """A Serve handle to it, which answers with plain values."""

        async def remote(*asked: Any) -> dict[str, Any]:
            return asdict(await self.generate(*asked))

        return SimpleNamespace(generate=SimpleNamespace(remote=remote))


def test_training_batch_and_http_give_the_same_token_ids(
    tree: dict[str, Any], rows: list[Row], base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each path hands on, taken where it does: packed blocks, the handle's requests, the engine's."""
    rows[0] = replace(rows[0], input="  甲</s>乙<s>答：\n丙 \n答：")
    records = [row.as_record() for row in rows]
    write_records(tmp_path / "test.json", records)
    packed = dataset.pack_rows(
        build(
            TrainConfig,
            {
                "output_dir": str(tmp_path / "run"),
                "model": tree["model"],
                "data": {"train": str(tmp_path / "test.json")},
            },
        ),
        {},
    )
    trained: dict[str, list[int]] = {}
    for block in packing.PackedBlocks(Path(packed) / "train.parquet").table.to_pylist():
        starts = [i for i, position in enumerate(block["position_ids"]) if position == 0]
        for row_id, start, end in zip(block["row_ids"], starts, [*starts[1:], None], strict=True):
            prompt_length = sum(label == packing.IGNORE for label in block["labels"][start:end])
            trained[row_id] = block["input_ids"][start:end][:prompt_length]

    config = build(PredictConfig, tree)
    template = prompts.load_template("promptcblue")
    batch = Recorder(lora.load_tokenizer(base_model))
    monkeypatch.setattr(clients.serve, "get_app_handle", lambda name: batch.handle())
    make_client = functools.partial(clients.HandleClient, "any", str(base_model), template)
    asked = [{"row_index": i, **asdict(row)} for i, row in enumerate(predict.read_test(config))]

    async def feed() -> None:
        async for _ in Feeder(make_client, Asking({}), config.predict)(pa.Table.from_pylist(asked)):
            pass

    asyncio.run(feed())
    http = Recorder(lora.load_tokenizer(base_model))
    for row in rows:
        body = json.dumps({"input": row.input, "parameters": {}}).encode()
        answer = asyncio.run(reference.generate(http, template, {}, body, "id"))
        assert answer.status_code == 200
    expected = [trained[row.sample_id] for row in rows]
    assert batch.given == expected
    assert http.given == expected


def test_vllm_is_given_the_ids_that_were_trained(service: Any, rows: list[Row], base_model: Path) -> None:
    """The string prompt and the chat message go through vLLM's own app, which says what it gave the model."""
    template = prompts.load_template("promptcblue")
    tokenizer = lora.load_tokenizer(base_model)
    model = httpx.get(f"{service.url}/v1/models").json()["data"][0]["id"]
    for row in rows[:4]:
        ids, _ = prompts.example_ids(tokenizer, template, row)
        for path, body in (
            ("completions", {"prompt": template.render(row)}),
            ("chat/completions", {"messages": [{"role": "user", "content": row.input}]}),
        ):
            asked = {"model": model, "max_tokens": 1, "temperature": 0, "return_token_ids": True, **body}
            answer = httpx.post(f"{service.url}/v1/{path}", json=asked, timeout=60).json()
            given = answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
            assert given == ids, path


def test_what_was_answered_before_the_service_went_is_kept(
    tree: dict[str, Any], rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build(PredictConfig, {**tree, "predict": {"rows_per_shard": 100}})
    key = predict.ledger_key(config, predict.read_test(config))

    def stream(*_: Any) -> Any:
        for index in range(5):
            yield Prediction(index, rows[index].sample_id, "x", "stop", 1, 1, 0.1, None)
        raise ServiceError("gone")

    monkeypatch.setattr(predict, "_stream", stream)
    with pytest.raises(ServiceError):
        predict._predict_pending(config, rows, list(range(20)), Any, Ledger(config.output_dir, key))
    assert Ledger(config.output_dir, key).pending(20) == list(range(5, 20))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"data": {}}, ConfigError, "data.test: is required"),
        ({"merge_best": "best"}, ConfigError, "merge_best: belongs to a sweep"),
        ({"model": None}, ConfigError, "model.path: is required"),
        ({"predict": {"max_tokens_by_task": {"KUAKE-IRR": 3}}}, ConfigError, "KUAKE-IRR: no such task"),
        ({"predict": {"sampling": {"temprature": 1}}}, ConfigError, "did you mean 'temperature'"),
        ({"prompt": {"template": "nothing"}}, ConfigError, "neither a file nor one of"),
    ],
)
def test_refusals_come_before_anything_starts(
    tree: dict[str, Any], change: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        _predict({**tree, **change})
    assert not Path(tree["output_dir"]).exists()


def test_a_task_that_no_profile_has_is_refused_at_once(tree: dict[str, Any], rows: list[Row], tmp_path: Path) -> None:
    write_records(tmp_path / "test.json", [replace(rows[0], task_dataset="CMeEEE").as_record()])
    with pytest.raises(DataError, match="CMeEEE"):
        _predict(tree)


def test_a_row_that_the_template_cannot_take_is_named_by_its_line(tree: dict[str, Any], tmp_path: Path) -> None:
    test = tmp_path / "alpaca.json"
    test.write_text('{"instruction": "", "input": "咳嗽"}\n\n{"instruction": "译", "input": "咳嗽"}\n')
    with pytest.raises(DataError, match=rf"{test}:3: .*no \{{instruction\}} slot"):
        _predict({**tree, "data": {"test": str(test), "format": "alpaca"}})
    assert not Path(tree["output_dir"]).exists()
