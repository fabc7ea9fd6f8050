"""The serving benchmark: what it makes of its rows, and all of it on a tiny model."""

from __future__ import annotations

import itertools
import json
import os
import time
from math import log
from pathlib import Path
from typing import Any

import psutil
import pytest

from paddock.benchmark import Record
from paddock.benchmark.apart import Apart
from paddock.benchmark.serve import FP8, MODES, OURS, VLLM, ServeBenchmarkConfig, _Benchmark, run, summary
from paddock.benchmark.serve_client import divergence
from paddock.errors import ServiceError


def row(stage: str, side: str, mode: str, concurrency: int, throughput: float, ttft: float = 0.0) -> dict[str, Any]:
    key = {"stage": stage, "side": side, "mode": mode, "concurrency": concurrency}
    return {**key, "output_throughput": throughput, "mean_ttft_ms": ttft}


def test_headline_figures_are_the_lowest_of_medians() -> None:
    rows = [
        *(row("concurrency", VLLM, "unary", 1, x) for x in (90, 100, 300)),
        *(row("concurrency", OURS, "unary", 1, x) for x in (99, 98, 10)),
        row("concurrency", VLLM, "unary", 32, 1000),
        row("concurrency", OURS, "unary", 32, 900),
        *(row("concurrency", VLLM, "streaming", 32, x, ttft) for x, ttft in ((1000, 150), (1100, 160))),
        *(row("concurrency", OURS, "streaming", 32, x, ttft) for x, ttft in ((1000, 170), (1000, 150))),
        {"stage": "concurrency", "sides": [OURS], "failed": "a later one"},
        row("fp8", VLLM, "streaming", 128, 100),
        row("fp8", FP8, "streaming", 128, 160),
        row("fp8", VLLM, "unary", 128, 100),
        row("fp8", FP8, "unary", 128, 170),
        {"stage": "fp8", "what": "logits", "kl": 0.01, "top_1": 0.9},
        {"stage": "hf", "side": "hf", "concurrency": 32, "output_throughput": 100},
    ]
    assert summary(rows) == {
        "throughput_vs_vllm": 0.9,
        "throughput_vs_vllm_by_concurrency": {"1": 0.98, "32": 0.9},
        "throughput_vs_vllm_streaming": 0.9524,
        "throughput_vs_vllm_streaming_by_concurrency": {"32": 0.9524},
        "ttft_added_ms": 5.0,
        "ttft_added_ms_by_concurrency": {"32": 5.0},
        "speedup_fp8": 1.6,
        "speedup_fp8_by_concurrency": {"128": 1.6},
        "speedup_fp8_unary": 1.7,
        "speedup_fp8_unary_by_concurrency": {"128": 1.7},
        "fp8_kl": 0.01,
        "fp8_top_1": 0.9,
        "speedup_vs_hf": {"32": 9.0},
    }
    assert summary([]) == {}


def test_divergence_is_kl_over_what_both_list_and_the_rest() -> None:
    theirs = [{1: log(0.5), 2: log(0.25)}, {1: log(0.6), 2: log(0.3)}]
    ours = [{2: log(0.5), 3: log(0.4)}, {1: log(0.6), 2: log(0.3)}]
    kl, top_1 = divergence(ours, theirs)
    assert kl == pytest.approx((0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)) / 2)
    assert top_1 == 0.5
    assert divergence(theirs, theirs) == pytest.approx((0, 1))


def test_both_sides_get_the_same_prompts_and_no_measurement_those_of_another(tmp_path: Path) -> None:
    asked: list[tuple[int, str, Any]] = []

    class Asked(_Benchmark):
        def _bench(self, stage: str | None, side: str, mode: str, count: int, *rest: Any, **more: Any) -> None:
            asked.append((rest[1] if len(rest) > 1 else more.pop("seed"), side, (stage, mode, count, *more.values())))

    config = ServeBenchmarkConfig(output_dir=str(tmp_path), vocab_size=6000, repeats=2)
    benchmark = object.__new__(Asked)
    benchmark.config, benchmark.record, benchmark.seeds = config, Record(config, "serve"), itertools.count()
    benchmark._warm_up((VLLM, OURS), MODES)
    warming = [seed for seed, *_ in asked]
    assert len(set(warming)) == len(warming) == 4
    asked.clear()
    benchmark._repeat("concurrency", (VLLM, OURS), MODES, config.concurrencies)
    benchmark._rates((VLLM, OURS))
    by_seed: dict[int, list[tuple[str, Any]]] = {}
    for seed, side, what in asked:
        by_seed.setdefault(seed, []).append((side, what))
    assert len(by_seed) == 2 * 2 * 4 + 3
    assert not by_seed.keys() & set(warming)
    for measured in by_seed.values():
        assert {side for side, _ in measured} == {VLLM, OURS}
        assert len({str(what) for _, what in measured}) == 1


def test_a_call_that_takes_too_long_or_dies_is_told() -> None:
    with Apart() as apart:
        assert apart(60, divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            apart(60, divmod, 7, 0)
        with pytest.raises(ServiceError, match="sleep took longer than"):
            apart(0.2, time.sleep, 60)
    with Apart() as apart, pytest.raises(ServiceError, match="_exit: its process ended with 3"):
        apart(60, os._exit, 3)


@pytest.mark.slow
def test_every_stage_ends_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "")  # the benchmark sets it
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    few = {"concurrencies": (1, 2), "fp8_concurrencies": (2,), "hf_concurrencies": (1, 2), "rates": (4.0,)}
    config = ServeBenchmarkConfig(
        output_dir=str(tmp_path), vocab_size=6000, repeats=1, rate_seconds=2, input_len=32, output_len=8,
        logit_prompts=2, fp8={"dtype": "float32", "stream_interval": 4}, **shape, **few,
    )  # fmt: skip
    found = json.loads(run(config.model_copy(update={"stages": ("concurrency", "rates", "hf")})).read_text())
    assert found["summary"].keys() >= {"throughput_vs_vllm", "throughput_vs_vllm_streaming", "speedup_vs_hf"}
    found = json.loads(run(config.model_copy(update={"stages": ("fp8",)})).read_text())  # beside what was there
    assert found["summary"].keys() >= {"throughput_vs_vllm", "speedup_vs_hf", "speedup_fp8", "fp8_kl"}
    assert 0 < found["summary"]["fp8_kl"] < 0.1
    assert not [row for row in found["rows"] if "failed" in row]
    started = [line for line in next(tmp_path.glob("*.log")).read_text().splitlines() if " ray.serve.scripts " in line]
    assert [(line.split(":")[0], "PADDOCK_API_KEYS=benchmark=sha256:" in line) for line in started] == [
        (OURS, False),
        (FP8, True),
    ]
    measured = [row for row in found["rows"] if "completed" in row]
    assert {(row["stage"], row["side"], row["mode"]) for row in measured} == {
        *(("concurrency", side, mode) for side in (VLLM, OURS) for mode in ("streaming", "unary")),
        *(("rates", side, "streaming") for side in (VLLM, OURS)),
        *(("fp8", side, mode) for side in (VLLM, FP8) for mode in ("streaming", "unary")),
    }
    assert {row["total_input_tokens"] / row["completed"] for row in measured} == {32.0}
    left = [p for p in psutil.process_iter(["cmdline"]) if "paddock-benchmark-" in " ".join(p.info["cmdline"] or [])]
    assert not left
