"""Prompts -> token rows -> packed blocks: `max_seq_length` tokens each, on disk as Parquet.

Rows stand one after the other in a block; `position_ids` restart at each, from which the attention mask is
made block-diagonal, so that no row sees another. Labels are -100 outside the completion. Which row goes
into which block depends on the rows' order and lengths alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from paddock.data import Row
from paddock.errors import DataError
from paddock.prompts import Template, example_ids

IGNORE = -100
_OPEN_BLOCKS = 256
TOKENS = pa.schema(
    [
        ("index", pa.int64()),
        ("row_id", pa.string()),
        ("task", pa.string()),
        ("input_ids", pa.list_(pa.int32())),  # empty where the answer alone is too long
        ("prompt_tokens", pa.int32()),
        ("truncated", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class TokenRow:
    """One training row as ids; `labels` are the ids where the loss counts, -100 elsewhere."""

    row_id: str
    input_ids: list[int]
    labels: list[int]


@dataclass
class PackingReport:
    """What became of the rows."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    blocks: int = 0
    fill: float = 0.0
    """The share of the blocks' positions that hold a token."""
    truncated: dict[str, int] = field(default_factory=dict)
    """Rows whose prompt lost its middle, by task."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows whose answer alone does not fit, by task."""


def token_row(tokenizer: Any, template: Template, row: Row, max_seq_length: int) -> tuple[TokenRow | None, bool]:
    """A row's ids, and whether its prompt was cut; None where the answer alone is too long.

    A prompt that is too long loses its middle: it begins with the task and ends with the question. The
    answer is never cut.
    """
    prompt, completion = example_ids(tokenizer, template, row)
    room = max_seq_length - len(completion)
    if room < 2:
        return None, False
    cut = len(prompt) > room
    if cut:
        prompt = [*prompt[: room - room // 2], *prompt[len(prompt) - room // 2 :]]
    return TokenRow(row.sample_id, prompt + completion, [IGNORE] * len(prompt) + completion), cut


def tokenise(
    tokenizer: Any, template: Template, rows: Sequence[Row], max_seq_length: int, indices: Sequence[int] | None = None
) -> pa.Table:
    """Rows as a table of ids, a row each: what `write_blocks` takes, of all rows in the order of their `index`."""
    columns: dict[str, list[Any]] = {name: [] for name in TOKENS.names}
    for index, row in zip(range(len(rows)) if indices is None else indices, rows, strict=True):
        tokens, cut = token_row(tokenizer, template, row, max_seq_length)
        columns["index"].append(index)
        columns["row_id"].append(row.sample_id)
        columns["task"].append(row.task_dataset)
        columns["input_ids"].append(tokens.input_ids if tokens else [])
        columns["prompt_tokens"].append(tokens.labels.count(IGNORE) if tokens else 0)
        columns["truncated"].append(cut)
    return pa.table(columns, schema=TOKENS)


def first_fit(lengths: Iterable[int], max_seq_length: int) -> list[list[int]]:
    """Indices of rows, block by block: each row goes into the first open block that has room.

    The oldest blocks are closed, so that the time stays linear in the number of rows.
    """
    blocks: list[list[int]] = []
    room: dict[int, int] = {}
    for index, length in enumerate(lengths):
        block = next((b for b, left in room.items() if left >= length), None)
        if block is None:
            block = len(blocks)
            blocks.append([])
            room[block] = max_seq_length
            if len(room) > _OPEN_BLOCKS:
                del room[next(iter(room))]
        blocks[block].append(index)
        room[block] -= length
    return blocks


def write_blocks(tokens: pa.Table, max_seq_length: int, file: Path, *, by_task: bool = False) -> PackingReport:
    """Pack tokenised rows and write the blocks; with `by_task`, each block holds rows of one task.

    Raises DataError where no row is left.
    """
    tokens = tokens.sort_by("index").combine_chunks()
    truncated = tokens.filter(tokens["truncated"])["task"].to_pylist()
    fits = pc.greater(pc.list_value_length(tokens["input_ids"]), 0)
    dropped = tokens.filter(pc.invert(fits))["task"].to_pylist()
    kept = tokens.filter(fits).combine_chunks()
    if not kept.num_rows:
        raise DataError(f"no row fits into train.max_seq_length={max_seq_length}; make it larger")
    ids = [np.asarray(row, dtype=np.int32) for row in kept["input_ids"].to_numpy()]
    row_ids, tasks, prompts = (kept[name].to_pylist() for name in ("row_id", "task", "prompt_tokens"))

    groups = [list(range(len(ids)))]
    if by_task:
        groups = [[i for i, task in enumerate(tasks) if task == name] for name in sorted(set(tasks))]
    blocks = [
        [group[i] for i in block]
        for group in groups
        for block in first_fit((len(ids[i]) for i in group), max_seq_length)
    ]
    labels = [np.concatenate([np.full(n, IGNORE, np.int32), row[n:]]) for n, row in zip(prompts, ids, strict=True)]
    positions = [np.arange(len(row), dtype=np.int32) for row in ids]
    table = pa.table(
        {
            **{
                name: [np.concatenate([rows[i] for i in block]) for block in blocks]
                for name, rows in (("input_ids", ids), ("labels", labels), ("position_ids", positions))
            },
            "row_ids": [[row_ids[i] for i in block] for block in blocks],
            "task": [tasks[block[0]] if by_task else "" for block in blocks],
        }
    )
    pq.write_table(table, file)
    total = sum(map(len, ids))
    return PackingReport(
        rows=len(ids),
        tokens=total,
        supervised_tokens=total - sum(prompts),
        blocks=len(blocks),
        fill=total / (len(blocks) * max_seq_length),
        truncated=dict(Counter(truncated)),
        dropped=dict(Counter(dropped)),
    )


def pack(tokenizer: Any, template: Template, rows: Sequence[Row], max_seq_length: int, file: Path) -> PackingReport:
    """Tokenise rows, pack them and write the blocks. Raises DataError where no row is left."""
    return write_blocks(tokenise(tokenizer, template, rows, max_seq_length), max_seq_length, file)


class PackedBlocks:
    """A file of packed blocks, read where it lies."""

    def __init__(self, file: str | Path) -> None:
        self.table = pq.read_table(file, memory_map=True)
        self._columns = {name: self.table[name].to_numpy() for name in ("input_ids", "labels", "position_ids")}
        self.tokens: list[int] = [len(block) for block in self._columns["input_ids"]]
        # Each row's first token is predicted by no one, which is why its label never counts.
        self.supervised_tokens: list[int] = [int((block != IGNORE).sum()) for block in self._columns["labels"]]
        self.tasks: list[str] = self.table["task"].to_pylist()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row_ids(self, indices: Sequence[int]) -> list[str]:
        """The rows that stand in some blocks."""
        return [row for block in self.table["row_ids"].take(pa.array(indices)).to_pylist() for row in block]

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Blocks as tensors of shape (len(indices), longest), int64.

        The padding at the end is a row of its own: its positions restart at 0, its labels are -100.
        """
        longest = max(self.tokens[i] for i in indices)
        padding = {
            "input_ids": np.zeros(longest),
            "labels": np.full(longest, IGNORE),
            "position_ids": np.arange(longest),
        }

        def padded(name: str) -> torch.Tensor:
            blocks = [self._columns[name][i] for i in indices]
            rows = [np.concatenate([b, padding[name][: longest - len(b)]]) for b in blocks]
            return torch.from_numpy(np.stack(rows).astype(np.int64))

        return {name: padded(name) for name in padding}


@lru_cache(maxsize=2)
def block_order(blocks: int, epoch: int, seed: int) -> tuple[int, ...]:
    """The order in which an epoch visits the blocks: the same for any number of workers."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(blocks, generator=generator).tolist())


def step_blocks(blocks: int, step: int, batch: int, seed: int) -> list[int]:
    """The blocks of an optimizer step, counted from 0: positions step*batch ... of the endless order."""
    chosen: list[int] = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, offset = divmod(position, blocks)
        chosen.append(block_order(blocks, epoch, seed)[offset])
    return chosen


def micro_batches(chosen: Sequence[int], size: int) -> list[list[int]]:
    """Blocks in portions of one forward pass, cut before they are dealt out to workers."""
    return [list(chosen[i : i + size]) for i in range(0, len(chosen), size)]
