"""The rows of a run: read and checked, then tokenised and packed into `RUN/packed/`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from paddock import lora, manifest, packing, storage
from paddock.config import TrainConfig
from paddock.data import Row, content_hash, read_split, refuse_overlap, set_apart
from paddock.errors import DataError, OutputError, PaddockError
from paddock.prompts import Template, load_template

# Rows of one Ray Data task.
_PIECE = 4096
_COLUMNS = ("instruction", "input", "target", "task_dataset", "sample_id")
_TOLD = packing.TOKENS.append(pa.field("mistake", pa.string()))

Tokenise = Callable[[str, Template, Sequence[Row], int], pa.Table]
"""(model directory, template, rows, max_seq_length) -> what `packing.tokenise` returns."""


@dataclass(frozen=True)
class Rows:
    """What a run learns from, and what its dev loss is taken over."""

    train: list[Row]
    dev: list[Row]

    @property
    def fingerprints(self) -> dict[str, str]:
        """The rows by what they say; only the training rows can change what is learnt."""
        return {"data.train": content_hash(self.train)}


def load_rows(config: TrainConfig) -> Rows:
    """Read the rows that a configuration names, within its limits.

    Raises DataError for a row that cannot be used, and for dev rows that are trained on.
    """
    data, recipe = config.data, config.train
    location = data.train or ""
    train, dev = read_split(location, "train", data.format), []
    # The dev rows that lie beside the training rows of a directory.
    beside = storage.join(location, "dev.json")
    if data.dev is not None:
        dev = read_split(data.dev, "dev", data.format)
    elif storage.is_directory(location) and storage.exists(beside):
        dev = read_split(beside, "dev", data.format)
    elif data.validation_split_percentage:
        train, dev = set_apart(train, data.validation_split_percentage, recipe.seed)
    train, dev = train[: recipe.max_train_samples], dev[: recipe.max_eval_samples]
    refuse_overlap(train, dev)
    return Rows(train, dev)


def pack_rows(
    config: TrainConfig, inputs: Mapping[str, str], rows: Rows | None = None, tokenise: Tokenise | None = None
) -> str | Path:
    """Tokenise and pack the training and dev rows into `RUN/packed/`.

    Blocks that are damaged, or of other rows or sizes, are replaced.
    """
    rows = rows or load_rows(config)
    inputs = {**inputs, **({"data.dev": content_hash(rows.dev)} if rows.dev else {})}
    what = {"max_seq_length": config.train.max_seq_length}
    packed = storage.join(config.output_dir, "packed")
    stale = False
    if storage.exists(packed):
        try:
            stale = manifest.difference(manifest.verify(packed), what, inputs) is not None
        except OutputError as error:
            print(f"warning: {error}; packing the rows again", flush=True)
            stale = True
    with manifest.stage(packed, kind="packed", config=what, inputs=inputs, overwrite=stale) as work:
        if not work.finished:
            reports = write_packed(config, rows, tokenise or tokenise_here, work.directory)
            work.extra |= {split: asdict(report) for split, report in reports.items()}
            for split, report in reports.items():
                print(f"packed {split}: {describe(report)}", flush=True)
    return packed


def write_packed(
    config: TrainConfig, rows: Rows, tokenise: Tokenise, directory: Path
) -> dict[str, packing.PackingReport]:
    """Write train.parquet and, where there are dev rows, dev.parquet, whose blocks hold one task each."""
    template, size = load_template(config.prompt.template), config.train.max_seq_length
    reports = {}
    for split, members in (("train", rows.train), ("dev", rows.dev)):
        if members:
            tokens = tokenise(config.model.path, template, members, size)
            file = directory / f"{split}.parquet"
            reports[split] = packing.write_blocks(tokens, size, file, by_task=split == "dev")
    return reports


def describe(report: packing.PackingReport) -> str:
    """What became of a split's rows, in one line."""
    return (
        f"{report.rows} rows, {report.tokens} tokens ({report.supervised_tokens} supervised) in {report.blocks} blocks,"
        f" fill {report.fill:.0%}; truncated: {by_task(report.truncated)}; dropped: {by_task(report.dropped)}"
    )


def by_task(counts: Mapping[str, int]) -> str:
    """Counts, for a person."""
    if not counts:
        return "none"
    named = ", ".join(f"{task or 'rows without a task'} {count}" for task, count in sorted(counts.items()))
    return f"{sum(counts.values())} ({named})"


def tokenise_here(model: str, template: Template, rows: Sequence[Row], max_seq_length: int) -> pa.Table:
    """Tokenise in this process."""
    return packing.tokenise(_tokenizer(model), template, rows, max_seq_length)


def tokenise_on_ray(model: str, template: Template, rows: Sequence[Row], max_seq_length: int) -> pa.Table:
    """Tokenise by Ray Data, a task a piece; the result does not depend on how many run at a time."""
    table = pa.table({"index": range(len(rows)), **{name: [getattr(row, name) for row in rows] for name in _COLUMNS}})
    pieces = [table.slice(start, _PIECE) for start in range(0, len(rows), _PIECE)]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    work = partial(_tokenise_piece, model=model, template=template, max_seq_length=max_seq_length)
    dataset = ray.data.from_arrow(pieces).map_batches(work, batch_format="pyarrow", batch_size=None)
    tokens = pa.concat_tables(ray.get(dataset.to_arrow_refs()))
    mistakes = tokens["mistake"].drop_null().to_pylist()
    if mistakes:
        raise DataError(min(mistakes))
    return tokens.drop_columns(["mistake"])


def _tokenise_piece(piece: pa.Table, model: str, template: Template, max_seq_length: int) -> pa.Table:
    """`packing.tokenise` of a piece. A user's mistake is handed back as a row: a task that raises is told by Ray."""
    records = piece.to_pylist()
    rows = [Row(**{name: record[name] for name in _COLUMNS}) for record in records]
    try:
        tokens = packing.tokenise(_tokenizer(model), template, rows, max_seq_length, [r["index"] for r in records])
    except PaddockError as error:
        return pa.Table.from_pylist([{"mistake": str(error)}], schema=_TOLD)
    return tokens.append_column("mistake", pa.nulls(len(tokens), pa.string()))


@lru_cache(maxsize=1)
def _tokenizer(model: str) -> Any:
    return lora.load_tokenizer(model)
