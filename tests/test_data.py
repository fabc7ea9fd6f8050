"""Rows of all formats, and the line that is told for each that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paddock.data import FIELDS, Row, content_hash, read_rows, write_records
from paddock.errors import DataError

GOOD = {
    "input": "感冒吃什么药？\n答：",
    "target": "多喝水",
    "answer_choices": ["是", "否"],
    "task_type": "cls",
    "task_dataset": "KUAKE-QIC",
    "sample_id": "a-1",
}


def _file(tmp_path: Path, *lines: object) -> Path:
    file = tmp_path / "rows.json"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def test_six_fields_survive_a_round_trip_unmodified(tmp_path: Path) -> None:
    file = _file(tmp_path, GOOD, {**GOOD, "sample_id": "a-2", "answer_choices": None})
    rows = read_rows(file, unique_ids=True)
    assert rows[0].input == GOOD["input"]
    assert rows[1].answer_choices is None
    written = tmp_path / "again.json"
    write_records(written, [row.as_record() for row in rows])
    assert written.read_text(encoding="utf-8") == file.read_text(encoding="utf-8")
    assert tuple(rows[0].as_record(target="x")) == FIELDS
    assert rows[0].as_record(target="x")["target"] == "x"


def test_alpaca_and_messages_say_the_same(tmp_path: Path) -> None:
    alpaca = read_rows(_file(tmp_path, {"instruction": "翻译", "input": "cold", "output": "感冒"}), "alpaca")
    said = [
        {"role": "system", "content": "翻译"},
        {"role": "user", "content": "cold"},
        {"role": "assistant", "content": "感冒"},
    ]
    messages = read_rows(_file(tmp_path, {"messages": said}), "messages")
    assert alpaca == messages == [Row(instruction="翻译", input="cold", target="感冒", sample_id="line-1")]
    assert content_hash(alpaca) == content_hash(messages)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{nope", "not JSON"),
        ("[1, 2]", "not an object"),
        ({key: value for key, value in GOOD.items() if key != "input"}, "no 'input'"),
        ({**GOOD, "input": " \n"}, "input is empty"),
        ({**GOOD, "input": 3}, "'input' is int"),
        ({**GOOD, "target": ""}, "target is missing"),
        ({**GOOD, "answer_choices": "是"}, "answer_choices"),
        ({**GOOD, "sample_id": "a-1"}, "already in line 1"),
        ('{"input": "\\ud800", "target": "x", "sample_id": "b"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, says: str) -> None:
    file = _file(tmp_path, GOOD, line)
    with pytest.raises(DataError, match=says) as told:
        read_rows(file, require_target=True, unique_ids=True)
    assert str(told.value).startswith(f"{file}:2: ")
    assert "\n" not in str(told.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(json.dumps(GOOD, ensure_ascii=False).encode("gbk"))
    with pytest.raises(DataError, match=r"rows\.json:1: not UTF-8"):
        read_rows(file)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        read_rows(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        read_rows(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="a directory"):
        read_rows(tmp_path)


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "assistant", "user"], ["system"], []])
def test_messages_of_another_shape_are_refused(tmp_path: Path, roles: list[str]) -> None:
    file = _file(tmp_path, {"messages": [{"role": role, "content": "x"} for role in roles]})
    with pytest.raises(DataError, match="one turn is read"):
        read_rows(file, "messages")
