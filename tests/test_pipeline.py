"""Everything in one run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paddock import manifest
from paddock.data import read_rows, write_records


def _rows_of_ones_own(folder: Path, assets: Path) -> Path:
    """train.json, and a test.json without targets, as the benchmark gives them to those who take part."""
    folder.mkdir()
    train, test = (read_rows(assets / "data" / f"{split}.json") for split in ("train", "test"))
    long = replace(test[5], input="\n".join(row.input for row in train)[:1846])
    rows = [replace(row, target="") for row in (*test[:5], long, *test[6:80])]
    write_records(folder / "train.json", [row.as_record() for row in train[:80]])
    write_records(folder / "test.json", [row.as_record() for row in rows])
    return folder


def test_rows_of_ones_own_become_a_submission(job: Any, assets: Path, tmp_path: Path) -> None:
    mine = _rows_of_ones_own(tmp_path / "mine", assets)
    words = [
        f"output_dir={tmp_path / 'run'}",
        f"data.train={mine}/train.json",
        "data.dev=",
        f"data.test={mine}/test.json",
    ]
    words += ["train.max_steps=2", "train.max_seq_length=512", "predict.sampling.max_tokens=16", "http_rows=2"]
    done = job("jobs.demo", "--config", "jobs/configs/demo.yaml", *words, RAY_ADDRESS="local")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["rows"], summary["predicted"], summary["quarantined"]) == (80, 80, 0)
    assert summary["served_equals_handle"] is True
    assert summary["merged_vs_adapter"]["top1_agreement"] >= 0.99
    assert summary["base_score"] is summary["tuned_score"] is None
    assert manifest.verify(summary["checkpoint"]).kind == "checkpoint"
    assert Path(summary["report"]).is_file()
    assert {"train", "merge", "serve tuned", "predict tuned", "http"} <= summary["seconds"].keys()

    given = read_rows(mine / "test.json")
    output = tmp_path / "run"
    written = read_rows(output / "test_predictions.json", unique_ids=True)
    assert [replace(row, target="") for row in written] == given
    assert all(row.target for row in written)
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert len(results) == 16
    assert sum(len(answers) for answers in results.values()) == 80


@pytest.mark.slow
def test_the_demo_learns(job: Any, tmp_path: Path) -> None:
    done = job("jobs.demo", "--config", "jobs/configs/demo.yaml", f"output_dir={tmp_path / 'run'}", RAY_ADDRESS="local")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tuned_score"] >= summary["base_score"] + 30
    assert summary["predicted"] == summary["rows"] == 160
    assert summary["quarantined"] == 0
    assert summary["served_equals_handle"] is True
    assert summary["merged_vs_adapter"]["top1_agreement"] >= 0.99
    assert summary["seconds"]["train"] <= 240
    assert sum(summary["seconds"].values()) <= 720
