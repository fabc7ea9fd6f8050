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

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from paddock.data import Row
from paddock.errors import DataError
from paddock.prompts import Template, example_ids

IGNORE = -100
_OPEN_BLOCKS = 256
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("position_ids", pa.list_(pa.int32())),
        ("row_ids", pa.list_(pa.string())),
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


def pack(tokenizer: Any, template: Template, rows: Sequence[Row], max_seq_length: int, file: Path) -> PackingReport:
    """Tokenise rows, pack them and write the blocks. Raises DataError where no row is left."""
    report = PackingReport()
    kept: list[TokenRow] = []
    truncated, dropped = Counter[str](), Counter[str]()
    for row in rows:
        tokens, cut = token_row(tokenizer, template, row, max_seq_length)
        if cut:
            truncated[row.task_dataset] += 1
        if tokens is None:
            dropped[row.task_dataset] += 1
        else:
            kept.append(tokens)
    if not kept:
        raise DataError(f"no row fits into train.max_seq_length={max_seq_length}; make it larger")
    blocks = first_fit((len(row.input_ids) for row in kept), max_seq_length)
    columns: dict[str, list[list[Any]]] = {name: [] for name in _SCHEMA.names}
    for block in blocks:
        members = [kept[index] for index in block]
        columns["input_ids"].append([i for row in members for i in row.input_ids])
        columns["labels"].append([i for row in members for i in row.labels])
        columns["position_ids"].append([i for row in members for i in range(len(row.input_ids))])
        columns["row_ids"].append([row.row_id for row in members])
    pq.write_table(pa.table(columns, schema=_SCHEMA), file)
    report.rows, report.blocks = len(kept), len(blocks)
    report.truncated, report.dropped = dict(truncated), dict(dropped)
    report.tokens = sum(len(row.input_ids) for row in kept)
    report.supervised_tokens = sum(label != IGNORE for row in kept for label in row.labels)
    report.fill = report.tokens / (len(blocks) * max_seq_length)
    return report


class PackedBlocks:
    """A file of packed blocks, read where it lies."""

    def __init__(self, file: str | Path) -> None:
        self.table = pq.read_table(file, memory_map=True)
        # Each row's first token is predicted by no one, which is why its label never counts.
        self.supervised_tokens: list[int] = [
            sum(label != IGNORE for label in labels) for labels in self.table["labels"].to_pylist()
        ]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Blocks as tensors of shape (len(indices), longest), int64.

        The padding at the end is a row of its own: its positions restart at 0, its labels are -100.
        """
        parts = {name: self.table[name].take(pa.array(indices)).to_pylist() for name in _SCHEMA.names[:3]}
        longest = max(len(block) for block in parts["input_ids"])

        def padded(name: str, fill: int | None) -> torch.Tensor:
            rows = []
            for block in parts[name]:
                missing = longest - len(block)
                rows.append([*block, *(range(missing) if fill is None else [fill] * missing)])
            return torch.tensor(rows)

        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", IGNORE),
            "position_ids": padded("position_ids", None),
        }


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
