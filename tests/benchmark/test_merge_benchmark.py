"""The benchmark of merging, with one layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paddock.benchmark.merge import MergeBenchmarkConfig, merge


@pytest.mark.slow
def test_all_four_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    work = tmp_path / "work"
    config = MergeBenchmarkConfig(
        output_dir=str(tmp_path / "figures"), work_dir=str(work), num_hidden_layers=1, vocab_size=512
    )
    merge(config)
    (file,) = (tmp_path / "figures").glob("merge-*.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    seconds = {row["name"]: row["seconds"] for row in record["rows"]}
    assert seconds.keys() == {"cp -r", "merge", "proof", "peft"}
    assert record["summary"]["time_vs_copy"] == pytest.approx(seconds["merge"] / seconds["cp -r"], abs=1e-3)
    assert 0 < record["summary"]["peak_rss_gib"] < 3
    assert not work.exists()
