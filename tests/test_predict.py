"""A test set through the session's service: every row once, in order, whatever breaks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paddock import lora, manifest, packing, predict, prompts
from paddock.config import PredictConfig, build
from paddock.data import Row, read_rows, write_records
from paddock.errors import ConfigError, DataError, OutputError
from paddock.ledger import Ledger


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


def test_training_batch_and_http_give_the_same_token_ids(
    tree: dict[str, Any], rows: list[Row], service: Any, base_model: Path, tmp_path: Path
) -> None:
    """What the model was given, as each path itself tells it."""
    import httpx

    template = prompts.load_template("promptcblue")
    tokenizer = lora.load_tokenizer(base_model)
    rows[0] = replace(rows[0], input="  甲</s>乙<s>答：\n丙 \n答：")
    write_records(tmp_path / "test.json", [row.as_record() for row in rows])
    packing.pack(tokenizer, template, rows, 1024, tmp_path / "packed.parquet")
    trained: dict[str, list[int]] = {}
    for block in packing.PackedBlocks(tmp_path / "packed.parquet").table.to_pylist():
        starts = [i for i, position in enumerate(block["position_ids"]) if position == 0]
        for row_id, start, end in zip(block["row_ids"], starts, [*starts[1:], None], strict=True):
            labels = block["labels"][start:end]
            prompt_length = sum(label == packing.IGNORE for label in labels)
            trained[row_id] = block["input_ids"][start:end][:prompt_length]

    config = build(PredictConfig, tree)
    predicted = Ledger(_predict(tree), predict.ledger_key(config, predict.read_test(config))).predictions()
    model = httpx.get(f"{service.url}/v1/models").json()["data"][0]["id"]
    for index, row in enumerate(rows):
        ids = trained[row.sample_id]
        assert predicted[index].prompt_tokens == len(ids)
        for path, body in (
            ("completions", {"prompt": template.render(row)}),
            ("chat/completions", {"messages": [{"role": "user", "content": row.input}]}),
        ):
            asked = {"model": model, "max_tokens": 1, "temperature": 0, "return_token_ids": True, **body}
            answer = httpx.post(f"{service.url}/v1/{path}", json=asked, timeout=60).json()
            given = answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
            assert given == ids, path


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"data": {}}, ConfigError, "data.test: is required"),
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
