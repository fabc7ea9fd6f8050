"""What has been predicted: shards on disk, so that a run that was cut short computes only the rest.

    OUTPUT_DIR/ledger.json                 what the predictions depend on: anything else here is refused
    OUTPUT_DIR/shards/000007.parquet       row_index, sample_id, text, error, ... of some rows
    OUTPUT_DIR/quarantine.jsonl            the rows that failed, with their reason

A shard appears whole or not at all. Where a row stands in two, the later one counts. A ledger at a URI works on a
local mirror; each shard is uploaded when it is written, everything else when the ledger is finished.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from paddock import storage
from paddock.errors import OutputError

_TYPES = {"int": pa.int64(), "str": pa.string(), "str | None": pa.string(), "float": pa.float64()}


@dataclass(frozen=True)
class Prediction:
    """What became of one row."""

    row_index: int
    sample_id: str
    text: str
    """What the model said, as generated; empty where it failed."""
    finish_reason: str
    """vLLM's: stop, length; empty where it failed."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """From the first try to the answer."""
    error: str | None
    """Why the row is in quarantine; null where it was answered."""


_SCHEMA = pa.schema([(field.name, _TYPES[str(field.type)]) for field in fields(Prediction)])


class Ledger:
    """The predictions of one test set by one model, prompt and sampling."""

    def __init__(self, directory: str | Path, key: Mapping[str, Any]) -> None:
        """Open a ledger; nothing is written before the first shard. Raises OutputError where another one is there."""
        self.location = directory
        self.directory = storage.workplace(directory)
        if storage.is_uri(directory):
            storage.mirror(directory, self.directory)
        self.shards = self.directory / "shards"
        self.key = dict(key)
        self.number: int | None = None
        """The last shard's, once this run has written one."""
        self._refuse_another(self.key)

    def _refuse_another(self, key: dict[str, Any]) -> None:
        file = self.directory / "ledger.json"
        if not file.is_file():
            if self.directory.is_dir() and any(not _is_partial(file) for file in self.directory.iterdir()):
                raise OutputError(f"{self.location}: holds files but no ledger.json; choose another output_dir")
            return
        try:
            before = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise OutputError(
                f"{storage.join(self.location, file.name)}: damaged; choose another output_dir or overwrite=true"
            ) from None
        changed = [name for name in sorted(before.keys() | key.keys()) if before.get(name) != key.get(name)]
        if changed:
            raise OutputError(
                f"{self.location}: holds predictions of another {', '.join(changed)};"
                " choose another output_dir or overwrite=true"
            )

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Write a shard of predictions."""
        if self.number is None:
            # The key first: shards that nobody can tell the origin of must never be.
            self.directory.mkdir(parents=True, exist_ok=True)
            with _whole(self.directory / "ledger.json") as stream:
                stream.write(_pretty(self.key).encode())
            self._upload("ledger.json")
            self.shards.mkdir(exist_ok=True)
            self.number = max((int(file.stem) for file in self.shards.glob("[0-9]*.parquet")), default=-1)
        self.number += 1
        file = self.shards / f"{self.number:06d}.parquet"
        with _whole(file) as stream:
            pq.write_table(pa.Table.from_pylist([asdict(p) for p in predictions], schema=_SCHEMA), stream)
        self._upload(f"shards/{file.name}")

    def repair(self) -> None:
        """Remove what a run that was killed left half-written, and shards that cannot be read: their rows are missing.

        To be called by the run that holds the directory, before it counts on what is there.
        """
        for leftover in (*self.directory.glob(".*.partial"), *self.shards.glob(".*.partial")):
            leftover.unlink()
        for file in self.shards.glob("[0-9]*.parquet"):
            try:
                pq.read_table(file, schema=_SCHEMA)
            except (pa.ArrowException, OSError) as error:
                told = " ".join(str(error).split())[:200]
                print(f"{file}: damaged ({told}); its rows are predicted again", flush=True)
                file.unlink()
                if storage.is_uri(self.location):
                    storage.remove(storage.join(self.location, "shards", file.name))

    def publish(self) -> None:
        """Once the directory has its manifest: let it be where the ledger is."""
        if storage.is_uri(self.location):
            storage.publish(self.directory, self.location)

    def _upload(self, name: str) -> None:
        if storage.is_uri(self.location):
            storage.upload(self.directory / name, storage.join(self.location, name))

    def predictions(self) -> dict[int, Prediction]:
        """Every row that was tried, by its index."""
        return read_shards(self.shards)

    def pending(self, rows: int, *, retry_quarantined: bool = False) -> list[int]:
        """The indices that are still to be predicted."""
        found = self.predictions()
        return [i for i in range(rows) if i not in found or (retry_quarantined and found[i].error is not None)]

    def write_quarantine(self) -> int:
        """Write `quarantine.jsonl`, in the order of the rows, and return the number of rows in it."""
        failed = [p for _, p in sorted(self.predictions().items()) if p.error is not None]
        lines = (
            json.dumps({"sample_id": p.sample_id, "row_index": p.row_index, "error": p.error}, ensure_ascii=False)
            for p in failed
        )
        (self.directory / "quarantine.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return len(failed)


def read_shards(directory: str | Path) -> dict[int, Prediction]:
    """The predictions in a directory of shards, by row index; none where there is no such directory."""
    found: dict[int, Prediction] = {}
    for name in sorted(name for name in storage.children(directory) if re.fullmatch(r"\d+\.parquet", name)):
        for record in pq.read_table(storage.fetch(storage.join(directory, name))).to_pylist():
            found[record["row_index"]] = Prediction(**record)
    return found


@contextmanager
def _whole(file: Path) -> Iterator[BinaryIO]:
    """A file that is there whole or not at all, whatever dies meanwhile."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _is_partial(file: Path) -> bool:
    return file.name.startswith(".") and file.name.endswith(".partial")


def _pretty(key: Mapping[str, Any]) -> str:
    return json.dumps(dict(key), ensure_ascii=False, indent=2, sort_keys=True) + "\n"
