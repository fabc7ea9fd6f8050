"""Rows into blocks: nothing is lost, no row sees another, the order is the same for any workers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from paddock import lora, packing, prompts
from paddock.config import ModelConfig
from paddock.data import Row, read_rows
from paddock.errors import DataError

TEMPLATE = prompts.load_template("promptcblue")


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> Any:
    return lora.load_tokenizer(base_model)


@pytest.fixture(scope="module")
def rows(assets: Path) -> list[Row]:
    return read_rows(assets / "data" / "dev.json")


@pytest.fixture(scope="module")
def packed(
    tokenizer: Any, rows: list[Row], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, packing.PackingReport]:
    file = tmp_path_factory.mktemp("packed") / "dev.parquet"
    return file, packing.pack(tokenizer, TEMPLATE, rows, 1024, file)


def test_every_row_stands_in_a_block_once_and_whole(tokenizer: Any, rows: list[Row], packed: Any) -> None:
    file, report = packed
    blocks = packing.PackedBlocks(file)
    found: dict[str, tuple[list[int], list[int]]] = {}
    for block in blocks.table.to_pylist():
        starts = [i for i, position in enumerate(block["position_ids"]) if position == 0]
        for row_id, start, end in zip(block["row_ids"], starts, [*starts[1:], None], strict=True):
            assert row_id not in found
            found[row_id] = (block["input_ids"][start:end], block["labels"][start:end])
        assert len(block["input_ids"]) <= 1024
    assert found.keys() == {row.sample_id for row in rows}
    for row in rows:
        prompt, completion = prompts.example_ids(tokenizer, TEMPLATE, row)
        assert found[row.sample_id] == (prompt + completion, [packing.IGNORE] * len(prompt) + completion)
    assert report.rows == len(rows)
    assert report.supervised_tokens == sum(blocks.supervised_tokens)
    assert report.fill == pytest.approx(report.tokens / (len(blocks) * 1024))


def test_packed_logits_equal_the_rows_own(base_model: Path, packed: Any) -> None:
    model = lora.load_base(ModelConfig(path=str(base_model), dtype="float32")).eval()
    blocks = packing.PackedBlocks(packed[0])
    batch = blocks.batch([0, len(blocks) - 1])
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for block in range(2):
            starts = (batch["position_ids"][block] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
                alone = model(input_ids=batch["input_ids"][block : block + 1, start:end]).logits
                assert torch.allclose(alone[0], together[block, start:end], atol=1e-4, rtol=1e-5)


def test_a_long_prompt_loses_its_middle_and_no_answer_is_cut(tokenizer: Any) -> None:
    row = Row(input="头" + "长" * 300 + "尾", target="回答", task_dataset="T", sample_id="long")
    prompt, completion = prompts.example_ids(tokenizer, TEMPLATE, row)
    tokens, cut = packing.token_row(tokenizer, TEMPLATE, row, 64)
    assert cut
    assert tokens is not None
    assert len(tokens.input_ids) == 64
    assert tokens.input_ids[-len(completion) :] == completion
    room = 64 - len(completion)
    assert tokens.input_ids[: room - room // 2] == prompt[: room - room // 2]
    assert tokens.input_ids[room - room // 2 : room] == prompt[-(room // 2) :]


def test_an_answer_that_does_not_fit_is_dropped_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    long = Row(input="问题", target="答" * 300, task_dataset="T", sample_id="long")
    short = Row(input="问题", target="答", task_dataset="T", sample_id="short")
    report = packing.pack(tokenizer, TEMPLATE, [long, short], 64, tmp_path / "x.parquet")
    assert json.loads(json.dumps(asdict(report)))["dropped"] == {"T": 1}  # as it stands in the manifest
    assert report.rows == 1
    with pytest.raises(DataError, match="no row fits"):
        packing.pack(tokenizer, TEMPLATE, [long], 64, tmp_path / "y.parquet")


def test_first_fit() -> None:
    assert packing.first_fit([5, 6, 4, 3, 1], 10) == [[0, 2, 4], [1, 3]]


def test_an_epoch_visits_every_block_once_in_a_seeded_order() -> None:
    steps = [packing.step_blocks(10, step, 5, seed=3) for step in range(4)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(10))
    assert steps[0] + steps[1] != steps[2] + steps[3]
    assert steps[0] != packing.step_blocks(10, 0, 5, seed=4)
    # The same positions, however they are cut into steps.
    assert packing.step_blocks(10, 0, 20, seed=3) == [block for step in steps for block in step]
