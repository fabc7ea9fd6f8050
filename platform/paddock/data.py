"""Files of task instructions -> typed rows.

Three formats, one JSON object a line (`data.format`):

    promptcblue   {"input", "target", "answer_choices", "task_type", "task_dataset", "sample_id"}
    alpaca        {"instruction", "input", "output"}            (a missing "input" is empty)
    messages      {"messages": [{"role", "content"}, ...]}      (system?, user, assistant?)

A row that does not fit is refused with file and line, never skipped. Rows come from one file, from the files
that a glob matches, or from a directory with `train.json`, `dev.json` and `test.json`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paddock import storage
from paddock.errors import DataError

# A hundred times what any model reads; a file without line ends is not read whole before it is refused.
_LONGEST_LINE = 4 * 2**20
FIELDS = ("input", "target", "answer_choices", "task_type", "task_dataset", "sample_id")


@dataclass(frozen=True)
class Row:
    """One instruction with its answer, in the benchmark's six fields.

    `instruction` is what a prompt template with that slot shows beside `input`; the benchmark
    writes its instruction into `input` itself and leaves it empty. `target` is empty in a test set.
    """

    input: str
    target: str = ""
    answer_choices: tuple[str, ...] | None = None
    task_type: str = ""
    task_dataset: str = ""
    sample_id: str = ""
    instruction: str = ""

    @property
    def content(self) -> tuple[str, str, str]:
        """What the row says, whoever wrote it down and under which id."""
        return self.instruction.strip(), self.input.strip(), self.target.strip()

    def as_record(self, target: str | None = None) -> dict[str, Any]:
        """The row as the benchmark writes it: six fields, in its order, with another `target`."""
        record = {name: value for name, value in asdict(self).items() if name in FIELDS}
        if self.answer_choices is not None:
            record["answer_choices"] = list(self.answer_choices)
        if target is not None:
            record["target"] = target
        return {name: record[name] for name in FIELDS}


def read_rows(
    path: str | Path,
    data_format: str = "promptcblue",
    *,
    require_target: bool = False,
    unique_ids: bool = False,
) -> list[Row]:
    """Read and check every row of a file.

    `require_target` is for training data; `unique_ids` for rows that are predicted or scored,
    which are told apart by `sample_id`.

    Raises DataError with file and line for the first row that cannot be used, and for an empty file.
    """
    if data_format not in _PARSERS:
        raise DataError(f"data.format: {data_format!r} is unknown; known are {', '.join(_PARSERS)}")
    file = storage.fetch(path)
    if not file.is_file():
        found = "a directory" if file.is_dir() else "nothing"
        raise DataError(f"{path}: no such data file (found {found} there); check the path")
    parse = _PARSERS[data_format]
    rows: list[Row] = []
    seen: dict[str, int] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE + 1), b""), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            if len(line) > _LONGEST_LINE:
                raise DataError(f"{where}: the line has more than {_LONGEST_LINE} bytes; each line is one row")
            record = _parse_object(line, where)
            row = parse(record, where, number)
            if unique_ids and data_format == "promptcblue" and not record.get("sample_id"):
                raise DataError(f"{where}: the row has no sample_id; rows are predicted and scored by their ids")
            if not row.input.strip() and not row.instruction.strip():
                raise DataError(f"{where}: the input is empty; every row needs a text to answer")
            if require_target and not row.target.strip():
                raise DataError(f"{where}: the target is missing or empty; training data needs an answer in every row")
            if unique_ids and row.sample_id in seen:
                raise DataError(
                    f"{where}: sample_id {row.sample_id!r} stands already in line {seen[row.sample_id]};"
                    " ids must be unique"
                )
            seen[row.sample_id] = number
            rows.append(row)
    if not rows:
        raise DataError(f"{path}: the file has no rows")
    return rows


def place(path: str | Path, index: int) -> str:
    """FILE:LINE of a row of a file that `read_rows` has read; blank lines are no rows."""
    with storage.fetch(path).open("rb") as lines:
        numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    return f"{path}:{numbers[index]}"


def find_files(location: str | Path, split: str) -> list[str | Path]:
    """The files that a location stands for: SPLIT.json of a directory, all that a glob matches, or itself.

    Raises DataError where a glob matches nothing, or a directory has no such file.
    """
    found = storage.matches(location)
    if found is not None:
        if not found:
            raise DataError(f"data.{split}: {location}: no file matches; check the pattern")
        return found
    within = storage.join(location, f"{split}.json")
    if storage.is_directory(location):
        if not storage.exists(within):
            raise DataError(f"data.{split}: {location}: the directory has no {split}.json; name the file, or a glob")
        return [within]
    return [location]


def read_split(location: str | Path, split: str, data_format: str = "promptcblue") -> list[Row]:
    """Every row of a split to train or evaluate on, in the order of its files. Raises DataError as `read_rows` does."""
    files = find_files(location, split)
    return [row for file in files for row in read_rows(file, data_format, require_target=True)]


def set_apart(rows: Sequence[Row], percentage: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Take a seeded share of the rows away for validation: (training rows, validation rows), each in order.

    Rows that say the same go the same way. Raises DataError where one of both would be empty.
    """
    contents = list(dict.fromkeys(row.content for row in rows))
    count = round(len(contents) * percentage / 100)
    if not 0 < count < len(contents):
        raise DataError(
            f"data.validation_split_percentage: {percentage:g} % of {len(contents)} different rows leaves no rows on"
            " one side; choose another share"
        )
    dev = set(random.Random(seed).sample(contents, count))
    return [row for row in rows if row.content not in dev], [row for row in rows if row.content in dev]


def refuse_overlap(train: Sequence[Row], dev: Sequence[Row]) -> None:
    """Raise DataError where a dev row is trained on: its loss would tell nothing."""
    trained = {row.content: row for row in train}
    shared = [row for row in dev if row.content in trained]
    if shared:
        example = trained[shared[0].content]
        raise DataError(
            f"data.dev: {len(shared)} of {len(dev)} rows are training rows, by what they say (dev row"
            f" {shared[0].sample_id!r} is training row {example.sample_id!r}); take them out of one of both"
        )


def write_records(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines as the benchmark does: UTF-8, nothing escaped, one record a line."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    Path(path).write_text(text, encoding="utf-8")


def content_hash(rows: Sequence[Row]) -> str:
    """The sha256 of what the rows say, whatever file or format they came from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row), ensure_ascii=False, sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _parse_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); each line is one JSON object") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}, not an object; each line is one JSON object")
    return record


def _text(record: dict[str, Any], key: str, where: str, *, required: bool = False) -> str:
    if required and key not in record:
        raise DataError(f"{where}: the row has no {key!r} (found {', '.join(record) or 'no keys'})")
    value = record.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {key!r} has half a surrogate pair, which no tokenizer can read") from None
    return value


def _parse_promptcblue(record: dict[str, Any], where: str, number: int) -> Row:
    choices = record.get("answer_choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(c, str) for c in choices)):
        raise DataError(f"{where}: 'answer_choices' is neither a list of texts nor null")
    return Row(
        input=_text(record, "input", where, required=True),
        target=_text(record, "target", where),
        answer_choices=None if choices is None else tuple(choices),
        task_type=_text(record, "task_type", where),
        task_dataset=_text(record, "task_dataset", where),
        sample_id=_text(record, "sample_id", where) or f"line-{number}",
    )


def _parse_alpaca(record: dict[str, Any], where: str, number: int) -> Row:
    return Row(
        instruction=_text(record, "instruction", where, required=True),
        input=_text(record, "input", where),
        target=_text(record, "output", where),
        task_dataset=_text(record, "task_dataset", where),
        sample_id=_text(record, "sample_id", where) or f"line-{number}",
    )


def _parse_messages(record: dict[str, Any], where: str, number: int) -> Row:
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{where}: the row has no list of 'messages' (found {', '.join(record) or 'no keys'})")
    said = [(_text(m, "role", where, required=True), _text(m, "content", where, required=True)) for m in messages]
    roles = [role for role, _ in said]
    if roles not in (["user"], ["user", "assistant"], ["system", "user"], ["system", "user", "assistant"]):
        raise DataError(
            f"{where}: messages of {', '.join(roles) or 'nobody'}; one turn is read: system (optional), user, assistant"
        )
    text = dict(said)
    return Row(
        instruction=text.get("system", ""),
        input=text["user"],
        target=text.get("assistant", ""),
        task_dataset=_text(record, "task_dataset", where),
        sample_id=_text(record, "sample_id", where) or f"line-{number}",
    )


_PARSERS: dict[str, Callable[[dict[str, Any], str, int], Row]] = {
    "promptcblue": _parse_promptcblue,
    "alpaca": _parse_alpaca,
    "messages": _parse_messages,
}
