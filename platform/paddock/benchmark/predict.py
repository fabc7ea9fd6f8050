"""Batch prediction beside its peers: `python -m jobs.benchmark predict`.

One random-weight LLaMA, one set of rows with the benchmark's lengths, one card, one after the other:

    paddock   jobs.predict's own path: Ray Data -> Serve handle -> vLLM -> ledger
    vllm      one vllm.LLM.generate over the same token ids, with the same engine arguments
    hf        transformers' generate in batches of 32, sorted by length, on every n-th batch

Start-up is apart in all three: what is timed begins when the model is loaded and whoever asks it is ready. Each row's
answer has a length of its own, which the model is made to keep, so that all three compute the same tokens.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from pydantic import Field

from paddock import cluster, lora, prompts
from paddock.benchmark import Record
from paddock.benchmark.random_llama import Asked, LlamaBenchmarkConfig, hf_generate, write_model
from paddock.clients import Client
from paddock.config import PredictConfig, build
from paddock.data import Row, read_rows, write_records
from paddock.demo.tokenizer import chinese_pieces
from paddock.predict import answering, predict

_BATCH = 32
# Toy rows of the benchmark, in characters: (median, mean, shortest, longest) of inputs and of answers. A character is
# about a token. The distribution is taken as log-normal.
_INPUT, _ANSWER = (102, 205, 16, 1846), (13, 49, 1, 681)


class PredictBenchmarkConfig(LlamaBenchmarkConfig):
    """`python -m jobs.benchmark predict`."""

    rows: int = Field(default=10_320, ge=64)
    """Rows of the test set; the benchmark's own has 10,320."""
    hf_rows: int = Field(default=160, ge=_BATCH)
    """Rows of them that transformers answers: every n-th batch of the sorted ones."""
    max_in_flight: int = 1024
    """Requests that are open at a time, and that the replica takes."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM's engine arguments, for both."""
    seed: int = 0
    """Seeds rows and lengths."""


def run(config: PredictBenchmarkConfig) -> Path:
    """Measure all three; returns the JSON that was written."""
    record = Record(config, "predict")
    with TemporaryDirectory(prefix="paddock-benchmark-") as place, ExitStack() as stack:
        model, rows = Path(place) / "model", Path(place) / "rows.json"
        write_model(model, config)
        _write_rows(rows, config)
        stack.callback(cluster.disconnect, cluster.connect())
        engine = {"load_format": "dummy", "max_model_len": 4096, **config.engine}
        ours = _paddock(config, Path(place), engine, record)
        asked = _asked(model, read_rows(rows, "alpaca"))
        gpus = int(cluster.has_gpus())
        vllm = _peer(record, "vllm", _vllm, gpus, str(model), asked, engine)
        hf = _peer(record, "hf", _hf, gpus, str(model), _sample(asked, config.hf_rows), {})
    return record.write(
        throughput_vs_vllm=round(ours["rows_per_s"] / vllm["rows_per_s"], 4),
        speedup_vs_hf=round(ours["rows_per_s"] / hf["rows_per_s"], 2),
        rows_per_s=ours["rows_per_s"],
    )


def lengths(count: int, shape: tuple[int, int, int, int], rng: random.Random) -> list[int]:
    """Log-normal lengths of a (median, mean, shortest, longest)."""
    median, mean, shortest, longest = shape
    drawn = torch.empty(count).log_normal_(
        float(torch.tensor(median).log()),
        float((2 * torch.tensor(mean / median).log()).sqrt()),
        generator=torch.Generator().manual_seed(rng.randrange(2**31)),
    )
    return [min(longest, max(shortest, round(value))) for value in drawn.tolist()]


def _write_rows(file: Path, config: PredictBenchmarkConfig) -> None:
    """Rows whose task is the number of tokens of their answer."""
    rng = random.Random(config.seed)
    characters = [piece for piece in chinese_pieces([]) if len(piece) == 1]
    sizes = zip(lengths(config.rows, _INPUT, rng), lengths(config.rows, _ANSWER, rng), strict=True)
    write_records(
        file,
        [{"instruction": "", "input": "".join(rng.choices(characters, k=n)), "task_dataset": str(m)} for n, m in sizes],
    )


def _paddock(config: PredictBenchmarkConfig, place: Path, engine: dict[str, Any], record: Record) -> dict[str, Any]:
    rows = read_rows(place / "rows.json", "alpaca")
    run = build(
        PredictConfig,
        {
            "output_dir": str(place / "out"),
            "model": {"path": str(place / "model")},
            "data": {"test": str(place / "rows.json"), "format": "alpaca"},
            "predict": {
                "sampling": {"ignore_eos": True},
                "max_tokens_by_task": {row.task_dataset: int(row.task_dataset) for row in rows},
                "max_in_flight": config.max_in_flight,
            },
            "serve": {
                "engine": engine,
                "max_ongoing_requests": config.max_in_flight,
                "autoscaling": {"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": config.max_in_flight},
                "ray_actor_options": {"num_cpus": 1},
            },
        },
    )
    begun = time.time()
    with answering(run) as make_client:
        loaded = time.time() - begun
        first = Path(place) / "ready"
        predict(run, lambda: _Stamped(make_client, str(first)))
        seconds = time.time() - float(first.read_text())
    predicted = json.loads((place / "out" / "manifest.json").read_text())
    tokens = sum(int(row.task_dataset) for row in rows)
    return _told(record, "paddock", len(rows), seconds, tokens, loaded, quarantined=predicted["quarantined"])


class _Stamped:
    """Makes a client, and notes when it was ready."""

    def __init__(self, make_client: Callable[[], Client], file: str) -> None:
        self.make_client, self.file = make_client, file

    def __call__(self) -> Client:
        client = self.make_client()
        Path(self.file).write_text(str(time.time()))
        return client


def _asked(model: Path, rows: Sequence[Row]) -> Asked:
    tokenizer, template = lora.load_tokenizer(model), prompts.load_template("promptcblue")
    return [(prompts.prompt_ids(tokenizer, template, row), int(row.task_dataset)) for row in rows]


def _sample(asked: Asked, count: int) -> Asked:
    """Every n-th batch of the rows sorted by length, with the longest among them."""
    ordered = sorted(asked, key=lambda row: len(row[0]), reverse=True)
    batches = [ordered[i : i + _BATCH] for i in range(0, len(ordered), _BATCH)]
    step = max(1, len(batches) // max(1, count // _BATCH))
    # From the middle of each stretch, so that the sample is as long as the whole.
    return [row for batch in batches[step // 2 :: step] for row in batch]


def _peer(
    record: Record,
    name: str,
    work: Callable[..., tuple[float, float]],
    gpus: int,
    model: str,
    asked: Asked,
    engine: Any,
) -> dict[str, Any]:
    """A peer in a process of its own, which gives its memory back."""
    task = ray.remote(num_gpus=gpus, num_cpus=0, max_calls=1, max_retries=0)(work)
    loaded, seconds = ray.get(task.remote(model, asked, engine))
    return _told(record, name, len(asked), seconds, sum(n for _, n in asked), loaded)


def _told(
    record: Record, name: str, rows: int, seconds: float, tokens: int, loaded: float, **more: Any
) -> dict[str, Any]:
    row = {
        "engine": name,
        "rows": rows,
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds, 3),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / seconds, 1),
        "startup_seconds": round(loaded, 1),
        **more,
    }
    record.add(**row)
    return row


def _vllm(model: str, asked: Asked, engine: Mapping[str, Any]) -> tuple[float, float]:
    """(seconds to load, seconds to answer)."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # this process may know CUDA already
    if not torch.cuda.is_available():
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        engine = {"enforce_eager": True, **engine}
    from vllm import LLM, SamplingParams

    begun = time.time()
    llm = LLM(model=model, **engine)
    loaded = time.time() - begun
    begun = time.time()
    said = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in asked],
        [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in asked],
        use_tqdm=False,
    )
    seconds = time.time() - begun
    if [len(s.outputs[0].token_ids) for s in said] != [count for _, count in asked]:
        raise RuntimeError("vLLM answered other lengths than it was asked for")
    return loaded, seconds


def _hf(model: str, asked: Asked, _: Mapping[str, Any]) -> tuple[float, float]:
    """(seconds to load, seconds to answer); `asked` comes sorted by length."""
    loaded, seconds = hf_generate(model, [asked[start : start + _BATCH] for start in range(0, len(asked), _BATCH)])
    return loaded, sum(seconds)
