"""What is wrong with a file of rows is told in one line with file and line, by both jobs that need ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paddock.config import PredictConfig, ScoreConfig, build
from paddock.demo.rows import make_rows
from paddock.errors import DataError
from paddock.evaluation import score_files
from paddock.predict import predict

GOLD = [row.as_record() for row in make_rows(0)["test"][:8]]
Lines = list[bytes]


def _lines(records: list[dict[str, Any]]) -> Lines:
    return [json.dumps(record, ensure_ascii=False).encode() for record in records]


def _changed(index: int, **more: Any) -> Lines:
    records = [dict(record) for record in GOLD]
    records[index] = {name: value for name, value in {**records[index], **more}.items() if value is not Ellipsis}
    return _lines(records)


CASES: dict[str, tuple[Callable[[], Lines], str]] = {
    "a doubled id": (lambda: _changed(3, sample_id="test-0"), r":4: sample_id 'test-0' stands already in line 1"),
    "no id": (lambda: _changed(2, sample_id=...), r":3: the row has no sample_id"),
    "an empty id": (lambda: _changed(2, sample_id=""), r":3: the row has no sample_id"),
    "a number as id": (lambda: _changed(2, sample_id=7), r":3: 'sample_id' is int, not text"),
    "an unknown task": (lambda: _changed(5, task_dataset="Foo"), r":6: .*'Foo' is no task"),
    "10 MB in one line": (lambda: _changed(1, input="长" * 3_500_000), r":2: the line has more than 4194304 bytes"),
    "no line end": (lambda: [b"x" * 10_000_000], r":1: the line has more than 4194304 bytes"),
    "another encoding": (lambda: [*_lines(GOLD[:4]), "问".encode("gb18030")], r":5: not UTF-8 text"),
    "half a row": (lambda: [*_lines(GOLD[:4]), b'{"input": "x'], r":5: not JSON"),
    "a list": (lambda: [*_lines(GOLD[:1]), b"[1, 2]"], r":2: a JSON list, not an object"),
    "a row without input": (lambda: _changed(4, input=...), r":5: the row has no 'input'"),
    "choices that are a text": (lambda: _changed(4, answer_choices="x"), r":5: 'answer_choices' is neither"),
    "half a surrogate pair": (lambda: [b'{"input": "\\ud83d", "sample_id": "1"}'], r":1: 'input' has half a surrogate"),
    "nested beyond reading": (lambda: [b"[" * 100_000], r":1: not JSON"),
    "nothing": (list, r": the file has no rows"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_file_is_told_by_file_and_line(name: str, base_model: Path, tmp_path: Path) -> None:
    make, says = CASES[name]
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_bytes(b"\n".join(make()))
    good.write_bytes(b"\n".join(_lines(GOLD)))
    out = str(tmp_path / "out")
    runs: list[Callable[[], object]] = [
        lambda: predict(build(PredictConfig, {"model": {"path": str(base_model)}, "data": {"test": str(bad)},
                                              "output_dir": out})),
        lambda: score_files(build(ScoreConfig, {"predictions": str(good), "gold": str(bad), "output_dir": out})),
        lambda: score_files(build(ScoreConfig, {"predictions": str(bad), "gold": str(good), "output_dir": out})),
    ]  # fmt: skip
    for number, run in enumerate(runs):
        # Of a predictions file it is said that its row is another than gold's there.
        where = "bad.json:6" if number == 2 and "task" in name else f"bad.json{says}"
        with pytest.raises(DataError, match=where) as told:
            run()
        assert "\n" not in str(told.value)
        assert len(str(told.value)) < 400
    assert not (tmp_path / "out").exists()


def test_what_a_model_says_is_no_mistake_of_the_user_s(tmp_path: Path, job: Any) -> None:
    """Nothing, without end, or junk: a score, and no crash."""
    (tmp_path / "gold.json").write_bytes(b"\n".join(_lines(GOLD)))
    for name, text in (("nothing", ""), ("endless", "主体词：" * 20_000), ("junk", "\x00\ufffd{{[(" * 50 + "\n")):
        file = tmp_path / f"{name}.json"
        file.write_bytes(b"\n".join(_lines([{**record, "target": text} for record in GOLD])))
        record = score_files(
            build(ScoreConfig, {"predictions": str(file), "gold": str(tmp_path / "gold.json"),
                                "output_dir": str(tmp_path / name)})
        )  # fmt: skip
        assert record["score"] < 50
        assert (tmp_path / name / "report.html").is_file()
    words = [f"gold={tmp_path / 'gold.json'}", f"output_dir={tmp_path / 'again'}"]
    done = job("jobs.score", *words, f"predictions={tmp_path / 'nothing.json'}")
    assert done.returncode == 0
    assert "warning: 8 of 8 texts are empty" in done.stdout
