"""Our endpoint beside plain `vllm serve` of the same model on one card: `python -m jobs.benchmark serve`.

    concurrency   so many clients at a time, streaming and unary: output tokens/s and times to the first token
    rates         Poisson arrivals: times to the first token, between tokens, and requests that meet the goodput
    fp8           ours with FP8 weights and KV cache, behind an API key, beside plain bf16 without; and how far its
                  logits are from bf16's. An event of its streams holds up to `stream_interval` tokens: with one a
                  token, the process that answers is busier than the card
    hf            transformers' `generate` of as many prompts at once as there were clients

The load is `vllm bench serve` (serve_client.py): random prompts, every answer of the same length, the same prompts for
both sides and others in each measurement, which else would find them in its prefix cache. Where the card holds both
servers they stand side by side, each with the same KV cache, room for all requests of the highest concurrency; one at a
time is under load, in turn, so that what drifts on the machine meets both alike. On a smaller card (`together=false`)
one is measured after the other, each with vLLM's default share of the memory. Both run as a user starts them, with
their own logging.

One H200 takes about 12 minutes for all stages. A run adds its stages to what the file has of the others from the same
machine and versions, and writes after each; a stage that fails is told in its rows, and the others go on.
"""

from __future__ import annotations

import itertools
import os
import random
import secrets
import signal
import statistics
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from paddock import ingress, lora
from paddock.benchmark import Record
from paddock.benchmark.apart import Apart
from paddock.benchmark.random_llama import LlamaBenchmarkConfig, hf_generate, write_model, write_weights
from paddock.benchmark.serve_client import API_KEY, UNARY, Likeliest, bench, divergence, likeliest
from paddock.benchmark.servers import Server, running, serve_run, vllm_serve
from paddock.config import ServeConfig, build
from paddock.config_parts import Split
from paddock.errors import ConfigError, ServiceError
from paddock.ports import free_port

VLLM, OURS, FP8 = "vllm", "paddock", "paddock-fp8"
MODES = {"streaming": "openai", "unary": UNARY}
_NAME = "llama"
_MARGIN = 1.03
_BESIDE_KV = 4 * 2**30  # activations, CUDA graphs and context of one server
_FIGURES = ("duration", "output_throughput", "request_throughput", "request_goodput", "max_concurrent_requests")
_TOKENS = ("completed", "total_input_tokens", "total_output_tokens")
_TIMES = [f"{p}_{name}_ms" for name in ("ttft", "itl", "e2el") for p in ("mean", "p50", "p99")]


class ServeBenchmarkConfig(LlamaBenchmarkConfig):
    """`python -m jobs.benchmark serve`."""

    stages: Annotated[tuple[Literal["concurrency", "rates", "fp8", "hf"], ...], Split] = (
        "concurrency",
        "rates",
        "fp8",
        "hf",
    )
    """What is measured."""
    concurrencies: tuple[int, ...] = (1, 32, 128, 256)
    """Clients at a time."""
    fp8_concurrencies: tuple[int, ...] = (128, 256)
    """Those for fp8."""
    hf_concurrencies: tuple[int, ...] = (1, 32, 128)
    """Prompts at once for transformers, each of which should be among `concurrencies`."""
    repeats: int = Field(default=3, ge=1)
    """How often; the median counts."""
    waves: int = Field(default=2, ge=1)
    """Prompts a client and measurement; at least four prompts in all."""
    rates: tuple[float, ...] = (16, 32, 48)
    """Requests a second."""
    rate_seconds: float = 10
    """How long they come."""
    goodput: Annotated[tuple[str, ...], Split] = ("ttft:1000", "tpot:50")
    """What a good request keeps to, in ms."""
    input_len: int = 256
    """Tokens of a prompt."""
    output_len: int = 128
    """Tokens of an answer."""
    logit_prompts: int = Field(default=16, ge=1)
    """Prompts on all whose positions the logits of FP8 and bf16 are compared."""
    logit_tokens: int = Field(default=100, ge=2)
    """Likeliest tokens that are compared at each."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM's engine arguments, for both; null takes one of the benchmark's own away."""
    fp8: dict[str, Any] = Field(
        default_factory=lambda: {
            "quantization": "fp8",
            "kv_cache_dtype": "fp8",
            "attention_backend": "CUSTOM",
            "stream_interval": 8,
        }
    )
    """Those that `fp8` adds to ours; CUSTOM is engine/decode_attention.py."""
    serve: dict[str, Any] = Field(default_factory=dict)
    """Keys of our service (`serve run deployments:app KEY=...`) beside its model and engine."""
    ingress: Literal["auto", "serve"] = "auto"
    """What stands before our replica (`serve.ingress`)."""
    together: bool | None = None
    """Both servers at once; null where the card has room for it."""
    startup_timeout_s: float = 400
    """How long a server may take to answer."""
    bench_timeout_s: float = 180
    """How long one measurement may take."""


def run(config: ServeBenchmarkConfig) -> Path:
    """Measure; returns the JSON that was written. Raises, in the end, what a stage failed with."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ[API_KEY] = secrets.token_urlsafe(32)
    record = Record(config, "serve", keep=lambda row: row["stage"] not in config.stages)
    with TemporaryDirectory(prefix="paddock-benchmark-") as place, ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are stopped then, too
        stack.callback(signal.signal, signal.SIGTERM, before)
        benchmark = _Benchmark(config, Path(place), record, stack)
        failures = [failure for phase in benchmark.phases() if (failure := benchmark.measure(*phase)) is not None]
    file = record.write(**summary(record.rows))
    if failures:
        raise failures[0]
    return file


class _Benchmark:
    def __init__(self, config: ServeBenchmarkConfig, place: Path, record: Record, stack: ExitStack) -> None:
        self.config, self.place, self.record = config, place, record
        self.model = place / "model"
        write_model(self.model, config)
        self.together = _together(config)
        self.engine = _engine(config, self.together)
        if "fp8" in config.stages:
            self._apart(write_weights, str(self.model))
            self.engine.pop("load_format", None)
        self._ours(config.engine)  # a mistake in its keys is told before anything starts
        self.client = stack.enter_context(Apart())
        self.servers: dict[str, tuple[Server, ExitStack]] = {}
        stack.callback(self._keep, ())
        self.logits: dict[str, Likeliest] = {}
        self.seeds = itertools.count()

    def phases(self) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """Servers that stand at a time, and the stages that they are measured in."""
        plain: list[str] = [stage for stage in self.config.stages if stage in ("concurrency", "rates")]
        fp8: list[str] = [stage for stage in self.config.stages if stage == "fp8"]
        sides: list[tuple[tuple[str, ...], list[str]]]
        if self.together:
            sides = [((VLLM, OURS), plain), ((VLLM, FP8), fp8)]
        else:
            sides = [((VLLM,), plain + fp8), ((OURS,), plain), ((FP8,), fp8)]
        yield from (phase for phase in sides if phase[1])
        if "hf" in self.config.stages:
            yield (), ["hf"]

    def measure(self, sides: tuple[str, ...], stages: Sequence[str]) -> Exception | None:
        """One phase; what is found is written after each stage. Returns why it ended early."""
        stage = stages[0]
        try:
            self._keep(sides)
            for stage in stages:
                getattr(self, f"_{stage}")(sides)
                self.record.save(**summary(self.record.rows))
        except Exception as error:  # the other phases are worth their time all the same
            for server, _ in self.servers.values():
                self.record.note(f"the end of {server.name}'s log:\n{server.last_lines()}")
            self.record.note(traceback.format_exc())
            self.record.add(stage=stage, sides=list(sides), failed=" ".join(f"{error!r}".split())[:500])
            self._keep(())
            return error
        return None

    def _concurrency(self, sides: Sequence[str]) -> None:
        self._warm_up(sides, MODES)
        self._repeat("concurrency", sides, MODES, self.config.concurrencies)

    def _fp8(self, sides: Sequence[str]) -> None:
        self._warm_up(sides, MODES)
        for side in sides:
            prompts, count = self._prompts(self.config.logit_prompts), self.config.logit_tokens
            url, timeout_s = self.servers[side][0].url, self.config.bench_timeout_s
            self.logits[side] = likeliest(url, _NAME, prompts, count, timeout_s)
        if self.logits.keys() == {VLLM, FP8}:
            kl, top_1 = divergence(self.logits[FP8], self.logits[VLLM])
            positions = len(self.logits[VLLM])
            self.record.add(stage="fp8", what="logits", positions=positions, kl=round(kl, 6), top_1=round(top_1, 4))
        self._repeat("fp8", sides, MODES, self.config.fp8_concurrencies)

    def _rates(self, sides: Sequence[str]) -> None:
        for rate in self.config.rates:
            count, seed = max(4, round(rate * self.config.rate_seconds)), next(self.seeds)
            for side in sides:
                options = ["--request-rate", str(rate), "--goodput", *self.config.goodput]
                self._bench("rates", side, "streaming", count, options, seed, rate=rate)

    def _hf(self, sides: Sequence[str]) -> None:
        sizes = self.config.hf_concurrencies
        batches = [[(ids, self.config.output_len) for ids in self._prompts(size)] for size in sizes]
        _, seconds = self._apart(hf_generate, str(self.model), batches)
        for size, spent in zip(sizes, seconds, strict=True):
            throughput = round(size * self.config.output_len / spent, 2)
            self.record.add(stage="hf", side="hf", concurrency=size, duration=spent, output_throughput=throughput)

    def _repeat(self, stage: str, sides: Sequence[str], modes: Iterable[str], concurrencies: Iterable[int]) -> None:
        for repeat in range(self.config.repeats):
            for mode in modes:
                for concurrency in concurrencies:
                    count, seed = max(4, self.config.waves * concurrency), next(self.seeds)
                    for side in sides if repeat % 2 == 0 else reversed(sides):
                        options = ["--max-concurrency", str(concurrency)]
                        more = {"concurrency": concurrency, "repeat": repeat}
                        self._bench(stage, side, mode, count, options, seed, **more)
            self.record.save(**summary(self.record.rows))

    def _warm_up(self, sides: Sequence[str], modes: Iterable[str]) -> None:
        """What is compiled with the first requests is none of the measurement."""
        most = max(self.config.concurrencies)
        for side in sides:
            for mode in modes:
                self._bench(None, side, mode, most, ["--max-concurrency", str(most)], next(self.seeds))

    def _bench(
        self, stage: str | None, side: str, mode: str, count: int, options: Sequence[str], seed: int, **more: Any
    ) -> None:
        arguments = [
            *("--backend", MODES[mode], "--base-url", self.servers[side][0].url, "--endpoint", "/v1/completions"),
            *("--model", _NAME, "--tokenizer", str(self.model), "--dataset-name", "random", "--seed", str(seed)),
            *("--random-input-len", str(self.config.input_len), "--random-output-len", str(self.config.output_len)),
            *("--num-prompts", str(count), "--ignore-eos", "--temperature", "0", "--disable-tqdm"),
            *("--percentile-metrics", "ttft,itl,e2el", "--metric-percentiles", "50,99"),
            *("--ready-check-timeout-sec", "0", *options),
        ]
        self.record.note(f"vllm bench serve {' '.join(arguments)}")
        found, printed = self.client(self.config.bench_timeout_s, bench, arguments)
        self.record.note(printed)
        if found["total_output_tokens"] != count * self.config.output_len:
            raise ServiceError(f"{side}: answered {found['total_output_tokens']} tokens to {count} prompts")
        if stage is not None:
            figures = {key: round(found[key], 3) for key in (*_FIGURES, *_TIMES) if found.get(key) is not None}
            tokens = {key: found[key] for key in _TOKENS}
            self.record.add(stage=stage, side=side, mode=mode, **more, **figures, **tokens)

    def _keep(self, sides: Sequence[str]) -> None:
        """Stop the servers that are not among these, and start those that are not there, all at once."""
        for side in [side for side in self.servers if side not in sides]:
            self.servers.pop(side)[1].close()
        new = [side for side in sides if side not in self.servers]
        for side in new:
            stack = ExitStack()
            self.servers[side] = (stack.enter_context(self._server(side)), stack)
        for side in new:
            self.servers[side][0].wait(self.config.startup_timeout_s)
            self.record.note(self.servers[side][0].last_lines())

    def _server(self, side: str) -> Any:
        port, environment = free_port(), {}
        if not torch.cuda.is_available():
            environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if side == VLLM:
            command = vllm_serve(self.model, _NAME, port, self.engine)
        else:
            arguments = self._ours(self.engine if side == OURS else _changed(self.engine, self.config.fp8))
            command = serve_run(self.place / f"{side}.yaml", port, arguments)
            # The Ray that this starts has Serve's controller in it, which chooses the ingress by its environment.
            variables, line = ingress.environment(self.config.ingress, "127.0.0.1", several_nodes=False)
            self.record.say(line)
            environment |= variables
            if side == FP8:
                environment["PADDOCK_API_KEYS"] = f"benchmark=sha256:{sha256(os.environ[API_KEY].encode()).hexdigest()}"
        url, log = f"http://127.0.0.1:{port}", self.place / f"{side}.log"
        return running(side, command, url, log, self.record.say, **environment)

    def _ours(self, engine: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of our service. Raises ConfigError."""
        most = max(self.config.concurrencies)
        arguments = {
            "model": str(self.model),
            "served_model_name": _NAME,
            "engine": dict(engine),
            "autoscaling": {"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": most},
            "max_ongoing_requests": 4 * most,
            "max_queued_requests": -1,
            **self.config.serve,
        }
        build(ServeConfig, arguments)
        return arguments

    def _prompts(self, count: int) -> list[list[int]]:
        rng, known = random.Random(0), len(lora.load_tokenizer(self.model))
        return [[1, *rng.choices(range(known // 2, known), k=self.config.input_len - 1)] for _ in range(count)]

    def _apart(self, work: Any, *arguments: Any) -> Any:
        with Apart() as apart:
            return apart(self.config.bench_timeout_s, work, *arguments)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The headline figures of what rows there are, of medians over repeats."""
    found: dict[str, Any] = {}
    sides = {side: _medians(rows, "concurrency", side) for side in (VLLM, OURS)}
    for mode, suffix in (("unary", ""), ("streaming", "_streaming")):
        keys = [key for key in sides[VLLM] if key[0] == mode and key in sides[OURS]]
        ratios = {key[1]: sides[OURS][key]["throughput"] / sides[VLLM][key]["throughput"] for key in keys}
        if ratios:
            found[f"throughput_vs_vllm{suffix}"] = round(min(ratios.values()), 4)
            found[f"throughput_vs_vllm{suffix}_by_concurrency"] = {str(c): round(r, 4) for c, r in ratios.items()}
    keys = [key for key in sides[VLLM] if key[0] == "streaming" and key in sides[OURS]]
    added = {str(key[1]): round(sides[OURS][key]["ttft"] - sides[VLLM][key]["ttft"], 2) for key in keys}
    if added:
        found["ttft_added_ms_by_concurrency"] = added
    if "32" in added:
        found["ttft_added_ms"] = added["32"]
    plain, fp8 = (_medians(rows, "fp8", side) for side in (VLLM, FP8))
    for mode, suffix in (("streaming", ""), ("unary", "_unary")):
        keys = [key for key in plain if key[0] == mode and key in fp8]
        speedups = {key[1]: fp8[key]["throughput"] / plain[key]["throughput"] for key in keys}
        if speedups:
            found[f"speedup_fp8{suffix}"] = round(min(speedups.values()), 3)
            found[f"speedup_fp8{suffix}_by_concurrency"] = {str(c): round(s, 3) for c, s in speedups.items()}
    found |= {f"fp8_{key}": row[key] for row in rows if row.get("what") == "logits" for key in ("kl", "top_1")}
    hf = {row["concurrency"]: row["output_throughput"] for row in rows if row.get("side") == "hf"}
    ours = {c: medians["throughput"] for (mode, c), medians in sides[OURS].items() if mode == "unary" and c in hf}
    if ours:
        found["speedup_vs_hf"] = {str(c): round(throughput / hf[c], 2) for c, throughput in ours.items()}
    return found


def _medians(rows: Sequence[Mapping[str, Any]], stage: str, side: str) -> dict[tuple[str, int], dict[str, float]]:
    """(mode, concurrency) -> output tokens a second and mean time to the first token in ms."""
    taken = [row for row in rows if row["stage"] == stage and row.get("side") == side]
    by_key: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in taken:
        by_key.setdefault((row["mode"], row["concurrency"]), []).append(row)
    names = {"throughput": "output_throughput", "ttft": "mean_ttft_ms"}
    return {
        key: {name: statistics.median(row[figure] for row in group) for name, figure in names.items()}
        for key, group in by_key.items()
    }


def _together(config: ServeBenchmarkConfig) -> bool:
    """Whether both servers stand at once. Raises ConfigError where the card cannot hold them."""
    if not torch.cuda.is_available():
        return config.together is not False
    need = 2 * (config.weight_bytes + _kv_cache_bytes(config) + _BESIDE_KV)
    room = torch.cuda.get_device_properties(0).total_memory
    if config.together and need > room:
        raise ConfigError(f"together: both servers need {need / 2**30:.0f} GiB, the card has {room / 2**30:.0f}")
    return need <= room if config.together is None else config.together


def _kv_cache_bytes(config: ServeBenchmarkConfig) -> int:
    tokens = max(config.concurrencies) * (config.input_len + config.output_len + 1)
    return int(_MARGIN * tokens * config.kv_bytes)


def _engine(config: ServeBenchmarkConfig, together: bool) -> dict[str, Any]:
    """Engine arguments of both sides."""
    engine: dict[str, Any] = {"load_format": "dummy", "max_model_len": 4096}
    if "fp8" in config.stages:
        engine["max_logprobs"] = config.logit_tokens
    if not torch.cuda.is_available():
        engine["enforce_eager"] = True
    elif together:
        # What one measures of free memory while the other starts would be by chance.
        engine |= {"kv_cache_memory_bytes": _kv_cache_bytes(config), "gpu_memory_utilization": 0.45}
    return _changed(engine, config.engine)


def _changed(engine: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """null takes an argument away."""
    return {key: value for key, value in {**engine, **by}.items() if value is not None}
