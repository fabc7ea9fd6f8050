"""The prediction benchmark, tiny: it ends, and its figures are of the same rows."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from paddock.benchmark.predict import _ANSWER, _INPUT, PredictBenchmarkConfig, _sample, lengths, run


@pytest.mark.slow
def test_all_three_answer_the_same_rows(ray_cluster: Any, tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PredictBenchmarkConfig(
        output_dir=str(tmp_path), rows=64, hf_rows=64, vocab_size=6000, max_in_flight=32,
        engine={"max_model_len": 4096}, **shape,
    )  # fmt: skip
    found = json.loads(run(config).read_text(encoding="utf-8"))
    assert list(found) == ["machine", "versions", "command", "date", "rows", "summary"]
    assert [row["engine"] for row in found["rows"]] == ["paddock", "vllm", "hf"]
    assert len({row["output_tokens"] for row in found["rows"]}) == 1
    assert found["rows"][0]["quarantined"] == 0
    assert found["summary"]["throughput_vs_vllm"] > 0
    assert found["summary"]["speedup_vs_hf"] > 0


def test_lengths_are_the_benchmark_s() -> None:
    for shape in (_INPUT, _ANSWER):
        drawn = lengths(10_320, shape, random.Random(0))
        assert statistics.median(drawn) == pytest.approx(shape[0], rel=0.1)
        assert statistics.mean(drawn) == pytest.approx(shape[1], rel=0.15)
        assert shape[2] <= min(drawn)
        assert max(drawn) <= shape[3]


def test_the_sample_is_as_long_as_the_whole() -> None:
    asked = [
        ([0] * n, m) for n, m in zip(*(lengths(10_320, s, random.Random(1)) for s in (_INPUT, _ANSWER)), strict=True)
    ]
    sample = _sample(asked, 512)
    assert 400 < len(sample) < 700
    assert statistics.mean(len(i) for i, _ in sample) == pytest.approx(
        statistics.mean(len(i) for i, _ in asked), rel=0.1
    )
