"""Two predictions of the same rows, side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paddock.comparison import compare
from paddock.config import CompareConfig, ScoreConfig, build
from paddock.data import Row, write_records
from paddock.demo.rows import make_rows
from paddock.errors import ConfigError, DataError, OutputError
from paddock.evaluation import score_files


@pytest.fixture(scope="module")
def gold() -> list[Row]:
    return make_rows(0)["test"]


@pytest.fixture
def place(tmp_path: Path, gold: list[Row]) -> Path:
    """gold.json, right.json, silent.json (no answer to MedDG), and the scores of both."""
    silent = [replace(r, target="") if r.task_dataset == "MedDG" else r for r in gold]
    for name, rows in (("gold", gold), ("right", gold), ("silent", silent)):
        write_records(tmp_path / f"{name}.json", [row.as_record() for row in rows])
        if name != "gold":
            files = {"predictions": str(tmp_path / f"{name}.json"), "gold": str(tmp_path / "gold.json")}
            score_files(build(ScoreConfig, {**files, "output_dir": str(tmp_path / f"{name}-scores")}))
    return tmp_path


def _compare(a: Path, b: Path, **more: Any) -> dict[str, Any]:
    return compare(build(CompareConfig, {"a": str(a), "b": str(b), **more}))


def test_scores_directories_know_their_gold(place: Path) -> None:
    record = _compare(place / "silent-scores", place / "right-scores", output_dir=str(place / "out"))
    assert record == json.loads((place / "out" / "comparison.json").read_text(encoding="utf-8"))
    reply = record["tasks"]["MedDG"]
    assert reply["a"] < 10
    assert reply["b"] > 99
    assert reply["difference"]["value"] == pytest.approx(reply["b"] - reply["a"])
    assert reply["difference"]["low"] > 0
    overall = record["tasks"]["Overall"]["difference"]
    assert overall["value"] == pytest.approx(reply["difference"]["value"] / 16)
    assert overall["low"] <= overall["value"] <= overall["high"]
    assert record["tasks"]["CHIP-CDN"]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert record["texts_differ"] == pytest.approx(10 / 160)
    assert {(row["task_dataset"], row["change"]) for row in record["changed"]} == {("MedDG", "better")}
    assert len(record["changed"]) == 10


def test_files_and_directories_of_predictions_need_a_gold(place: Path) -> None:
    with pytest.raises(ConfigError, match="give gold=FILE"):
        _compare(place / "silent.json", place / "right.json")
    one = _compare(place / "silent.json", place / "right.json", gold=str(place / "gold.json"))
    (place / "run").mkdir()
    (place / "silent.json").rename(place / "run" / "test_predictions.json")
    two = _compare(place / "run", place / "right-scores")
    assert one["tasks"] == two["tasks"]


def test_what_cannot_be_compared_is_named(place: Path, gold: list[Row]) -> None:
    write_records(place / "other.json", [row.as_record() for row in gold[1:]])
    with pytest.raises(DataError, match=r"other.json:1: row 'test-1'"):
        _compare(place / "other.json", place / "right-scores")
    with pytest.raises(OutputError, match="no such file"):
        _compare(place / "nothing", place / "right-scores")
    write_records(place / "right.json", [row.as_record() for row in gold[1:]])
    with pytest.raises(OutputError, match="is gone or changed; score again"):
        _compare(place / "silent-scores", place / "right-scores")


def test_on_the_command_line(place: Path, job: Any) -> None:
    done = job("jobs.score", "compare", str(place / "silent-scores"), str(place / "right-scores"), "draws=200")
    assert done.returncode == 0, done.stderr
    assert "MedDG" in done.stdout
    assert "6.25% of the texts differ; rows whose answer changed: 10 better" in done.stdout
    done = job("jobs.score", "compare", str(place / "silent-scores"))
    assert done.returncode == 2
    assert done.stderr == "error: b: is required; give it as b=...\n"
    done = job("jobs.score", "compare", "x", "y", "z")
    assert done.returncode == 2
    assert "'z': not understood" in done.stderr
