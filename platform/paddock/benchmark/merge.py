"""A LLaMA-7B-sized merge beside a plain copy of the same files and beside PEFT, in one run on one disk.

    python -m jobs.benchmark merge [output_dir=benchmarks] [work_dir=DIR] [num_hidden_layers=32]

Makes a base of random float16 weights in 2 GB shards and two rank-8 adapters over seven modules in `work_dir` (three
times the base's 13.5 GB at most, removed afterwards). Each peer is a process of its own and begins with a cold page
cache. Memory is what the process and all that it started hold, anonymous and shared (smaps_rollup: Pss_Anon and
Pss_Shmem), sampled twice a second, without Ray's own daemons; time is the whole process's, with its start.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from paddock.benchmark import BenchmarkConfig, Record
from paddock.config import MergeConfig
from paddock.config_parts import Location, ShardPart
from paddock.merge import plan_of
from paddock.merge_plan import empty_model
from paddock.proof import prove
from paddock.shard_tasks import write_shards
from paddock.shards import plan_shards, write_index
from paddock.weights import TensorInfo

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DAEMONS = ("raylet", "gcs_server", "dashboard", "monitor", "runtime_env", "log_monitor", "agent")


class MergeBenchmarkConfig(BenchmarkConfig):
    """`python -m jobs.benchmark merge`."""

    work_dir: Location = "runs/benchmark-merge"
    """Where the models are made; removed when all is measured."""
    num_hidden_layers: int = 32
    """Layers of the base; 32 is LLaMA-7B's number."""
    vocab_size: int = 49954
    """Rows of its embedding; Chinese-Alpaca has 49,954."""


def merge(config: MergeBenchmarkConfig) -> None:
    """Measure copy, merge, proof and PEFT; write the record."""
    record = Record(config, "merge")
    work = Path(config.work_dir)
    shutil.rmtree(work, ignore_errors=True)
    base, adapters = work / "base", [work / "adapter-1", work / "adapter-2"]
    try:
        size = make_base(base, config)
        for number, adapter in enumerate(adapters, 1):
            make_adapter(base, adapter, number)
        names = ",".join(map(str, adapters))
        record.say(f"base: {size / 1e9:.2f} GB; page cache emptied by {_cold(work)}")
        words = [f"base_model={base}", f"lora_model={names}", f"output_dir={work / 'merged'}", "prove_prompts=0"]
        here = [sys.executable, "-c"]
        copied = measure(record, work, "cp -r", ["cp", "-r", str(base), str(work / "copy")])
        shutil.rmtree(work / "copy")
        ours = measure(record, work, "merge", [sys.executable, "-m", "jobs.merge", *words])
        code = f"from paddock.benchmark.merge import proof; proof({words!r}, {str(work / 'merged')!r})"
        proven = measure(record, work, "proof", [*here, code])
        shutil.rmtree(work / "merged")
        code = f"from paddock.benchmark.merge import peft; peft({str(base)!r}, {names!r}, {str(work / 'peft')!r})"
        theirs = measure(record, work, "peft", [*here, code])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    record.write(
        peak_rss_gib=ours["peak_rss_gib"],
        time_vs_copy=round(ours["seconds"] / copied["seconds"], 3),
        time_vs_peft=round(ours["seconds"] / theirs["seconds"], 3),
        proof_peak_rss_gib=proven["peak_rss_gib"],
        proof_seconds=proven["seconds"],
        peft_peak_rss_gib=theirs["peak_rss_gib"],
    )


def measure(record: Record, work: Path, name: str, command: list[str]) -> dict[str, Any]:
    """Run a command on a cold page cache; record its time, its time until the disk has all, and its peak memory."""
    _cold(work)
    record.say(f"$ {shlex.join(command)}")
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as it:
        assert it.stdout is not None
        reader = threading.Thread(target=_tell, args=(record, it.stdout))
        reader.start()
        while it.poll() is None:
            peak = max(peak, held(it.pid))
            time.sleep(0.5)
        seconds = time.monotonic() - started
        reader.join()
    if it.returncode:
        raise subprocess.CalledProcessError(it.returncode, command)
    os.sync()
    synced = time.monotonic() - started
    row = {"name": name, "seconds": round(seconds, 1), "seconds_with_sync": round(synced, 1)}
    row["peak_rss_gib"] = round(peak / 2**30, 2)
    record.add(**row)
    return row


def _tell(record: Record, lines: Iterable[str]) -> None:
    for line in lines:
        record.say(line.rstrip())


def held(pid: int) -> int:
    """Anonymous and shared bytes of a process and all below it, without Ray's daemons."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            words = process.cmdline()
            if process.pid != pid and any(daemon in word for word in words[:6] for daemon in _DAEMONS):
                continue
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += int(line.split()[1]) * 1024
        except (psutil.Error, OSError):
            continue  # it ended meanwhile
    return total


class _Random:
    """Weights out of one pool of normal numbers (a `paddock.shards.Source`)."""

    def __init__(self, infos: dict[str, TensorInfo]) -> None:
        self.infos = infos
        self.pool = (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02).half()

    def pieces(self, name: str, said: dict[str, Any]) -> Iterator[torch.Tensor]:
        """From another place of the pool for each tensor."""
        left, place = self.infos[name].bytes // 2, hash(name) % len(self.pool)
        while left:
            piece = self.pool[place : place + left]
            yield piece
            left, place = left - len(piece), 0

    def memory(self, name: str) -> int:
        """All of it is in memory already."""
        return 0


def make_base(directory: Path, config: MergeBenchmarkConfig) -> int:
    """A random LLaMA of 7B's shape; returns its bytes."""
    directory.mkdir(parents=True)
    LlamaConfig(
        vocab_size=config.vocab_size,
        num_hidden_layers=config.num_hidden_layers,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        tie_word_embeddings=False,
    ).save_pretrained(directory)
    model = empty_model(directory, config.vocab_size, tied=False)
    infos = {name: TensorInfo(tuple(p.shape), torch.float16) for name, p in model.named_parameters()}
    shards = plan_shards(infos, "2GB")
    how = ShardPart(num_workers=1)
    write_shards(_Random(infos), shards, infos, directory, directory.parent / "notes", how, what="base")
    write_index(directory, shards, infos)
    return sum(info.bytes for info in infos.values())


def make_adapter(base: Path, directory: Path, seed: int) -> None:
    """A rank-8 adapter over seven modules, every tensor of it random."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=list(PROJECTIONS))
    lora.inference_mode = True
    lora.save_pretrained(str(directory))
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for name, module in empty_model(base, 1, tied=False).named_modules():
        if name.endswith(PROJECTIONS):
            prefix = f"base_model.model.{name}.lora_"
            tensors[f"{prefix}A.weight"] = torch.randn(8, module.in_features, generator=generator) * 0.02
            tensors[f"{prefix}B.weight"] = torch.randn(module.out_features, 8, generator=generator) * 0.02
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})


def proof(words: list[str], merged: str) -> None:
    """The logit proof of a finished merge, as `jobs.merge` makes it."""
    values: dict[str, Any] = dict(word.split("=", 1) for word in words)
    print(prove(plan_of(MergeConfig.model_validate(values)), Path(merged), 8), flush=True)


def peft(base: str, adapters: str, output_dir: str) -> None:
    """What PEFT's users do: load, merge_and_unload once an adapter, save."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    for adapter in adapters.split(","):
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(output_dir, max_shard_size="2GB")


def _cold(work: Path) -> str:
    """Empty the page cache, of everything or at least of our files; say how."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError:
        for file in work.rglob("*"):
            if file.is_file():
                handle = os.open(file, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)
        return "posix_fadvise"
    return "/proc/sys/vm/drop_caches"
