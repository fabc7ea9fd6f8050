"""A run's rows: found, limited, set apart, tokenised by Ray Data as by a plain function, packed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paddock import dataset, lora, manifest, packing
from paddock.config import TrainConfig, build
from paddock.data import Row, read_rows, write_records
from paddock.errors import DataError, ModelError
from paddock.prompts import Template, load_template

TEMPLATE = load_template("promptcblue")


def _config(tree: dict[str, Any], data: dict[str, Any], **train: Any) -> TrainConfig:
    tree["data"] = data
    tree["train"] |= train
    return build(TrainConfig, tree)


def test_a_directory_a_glob_and_a_file_are_the_same_rows(
    train_tree: dict[str, Any], assets: Path, tmp_path: Path
) -> None:
    rows = read_rows(assets / "data" / "train.json")
    for name, part in (("b.json", rows[100:200]), ("a.json", rows[:100])):
        write_records(tmp_path / name, [row.as_record() for row in part])
    assert dataset.load_rows(_config(train_tree, {"train": str(tmp_path / "*.json")})).train == rows[:200]
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "a.json", tmp_path / "folder" / "train.json")
    shutil.copy(tmp_path / "b.json", tmp_path / "folder" / "dev.json")
    found = dataset.load_rows(_config(train_tree, {"train": str(tmp_path / "folder")}))
    assert found == dataset.Rows(rows[:100], rows[100:200])
    limited = _config(train_tree, {"train": str(tmp_path / "folder")}, max_train_samples=7, max_eval_samples=3)
    assert dataset.load_rows(limited) == dataset.Rows(rows[:7], rows[100:103])
    for location, says in (("x*.json", "no file matches"), ("nothing.json", "no such data file"), (".", r"no train\.")):
        with pytest.raises(DataError, match=says):
            dataset.load_rows(_config(train_tree, {"train": str(tmp_path / location)}))


def test_a_share_is_set_apart_the_same_each_time_and_never_trained_on(
    train_tree: dict[str, Any], assets: Path, tmp_path: Path
) -> None:
    rows = read_rows(assets / "data" / "train.json")[:200]
    rows += [replace(row, sample_id=f"again-{row.sample_id}") for row in rows[:20]]
    write_records(tmp_path / "rows.json", [row.as_record() for row in rows])
    config = _config(train_tree, {"train": str(tmp_path / "rows.json"), "validation_split_percentage": 10})
    found = dataset.load_rows(config)
    assert found == dataset.load_rows(config)
    assert sorted(found.train + found.dev, key=lambda row: row.sample_id) == sorted(rows, key=lambda row: row.sample_id)
    assert {row.content for row in found.dev}.isdisjoint(row.content for row in found.train)
    assert len({row.content for row in found.dev}) == round(len({row.content for row in rows}) / 10)


def test_dev_rows_that_are_trained_on_are_named(train_tree: dict[str, Any], assets: Path, tmp_path: Path) -> None:
    rows = read_rows(assets / "data" / "train.json")
    dev = [read_rows(assets / "data" / "dev.json")[0], replace(rows[5], sample_id="other", target=rows[5].target + " ")]
    write_records(tmp_path / "dev.json", [row.as_record() for row in dev])
    config = _config(train_tree, {"train": str(assets / "data" / "train.json"), "dev": str(tmp_path / "dev.json")})
    with pytest.raises(DataError, match=rf"1 of 2 rows are .*'other' is training row '{rows[5].sample_id}'"):
        dataset.load_rows(config)


def test_ray_data_gives_what_the_plain_function_gives(
    base_model: Path, assets: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dataset, "_PIECE", 40)
    rows = read_rows(assets / "data" / "dev.json")
    on_ray = dataset.tokenise_on_ray(str(base_model), TEMPLATE, rows, 64)
    here = packing.tokenise(lora.load_tokenizer(base_model), TEMPLATE, rows, 64)
    assert on_ray.sort_by("index").equals(here)
    for name, tokens in (("a", on_ray.take(list(reversed(range(len(rows)))))), ("b", here)):
        packing.write_blocks(tokens, 64, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises((DataError, ModelError), match="share a token"):
        dataset.tokenise_on_ray(str(base_model), Template("{input}感"), [Row("x", "冒")], 64)


def test_blocks_that_are_damaged_or_of_other_rows_are_replaced(train_tree: dict[str, Any], assets: Path) -> None:
    data = {"train": str(assets / "data" / "dev.json")}
    packed = dataset.pack_rows(_config(train_tree, data), {})
    made = manifest.verify(packed)
    assert made.extra["train"]["rows"] == 96
    assert manifest.verify(dataset.pack_rows(_config(train_tree, data), {})) == made
    file = Path(packed) / "train.parquet"
    file.write_bytes(bytes(len(file.read_bytes())))
    assert manifest.verify(dataset.pack_rows(_config(train_tree, data), {})) == made
    smaller = dataset.pack_rows(_config(train_tree, data, max_seq_length=256), {})
    assert manifest.verify(smaller).extra["train"]["blocks"] > made.extra["train"]["blocks"]


def test_a_dev_block_holds_one_task(base_model: Path, assets: Path, tmp_path: Path) -> None:
    rows = read_rows(assets / "data" / "dev.json")
    tokens = packing.tokenise(lora.load_tokenizer(base_model), TEMPLATE, rows, 512)
    report = packing.write_blocks(tokens, 512, tmp_path / "x", by_task=True)
    blocks = packing.PackedBlocks(tmp_path / "x")
    task_of = {row.sample_id: row.task_dataset for row in rows}
    for block in range(len(blocks)):
        assert {task_of[row] for row in blocks.row_ids([block])} == {blocks.tasks[block]}
    assert sum(blocks.tokens) == report.tokens
    assert set(blocks.tasks) == set(task_of.values())
