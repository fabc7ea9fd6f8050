"""What a training run would do, without doing it: `python -m jobs.train plan ...`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from paddock import lora, storage
from paddock.config import TrainConfig
from paddock.dataset import by_task, load_rows, tokenise_here, write_packed
from paddock.trainer import check, run_config, steps_of

# The benchmark's rule: PEFT modules together have at most this share of the backbone's parameters.
_BENCHMARK_SHARE = 0.01
# Forward, and backward without the frozen weights' gradients: FLOP for a parameter and a token.
_FLOP = 4
# What one H200 gave a LLaMA-7B in bfloat16, packed and compiled per layer: 13,230 tokens/s.
_GPU_FLOP_PER_S = 3.6e14
# A trained parameter in float32, its gradient, Adam's two moments, and its float64 sum.
_TRAINED_BYTES = 4 + 4 + 8 + 8


def plan_text(config: TrainConfig) -> str:
    """Rows, tokens, blocks, steps, parameters, memory and time, for a person.

    Nothing is written, no GPU and no Ray are needed. Raises what `train` would raise for the configuration
    and its inputs.
    """
    check(config)
    rows = load_rows(config)
    with tempfile.TemporaryDirectory() as directory:
        reports = write_packed(config, rows, tokenise_here, Path(directory))
    report, recipe = reports["train"], config.train
    batch = run_config(config)["train"]["global_batch_size"]
    steps = steps_of(config, report.blocks, batch)
    trainable, total = lora.check_targets(config.model, config.lora)
    share = trainable / (total - trainable)
    workers = config.scaling.num_workers
    peak = _peak_bytes(config, total, trainable, report.supervised_tokens / report.tokens)
    lines = [
        f"model        {config.model.path}",
        f"rows         {report.rows} of {len(rows.train)}, {report.tokens} tokens,"
        f" {report.supervised_tokens / report.tokens:.1%} of them supervised",
        f"dev rows     {reports['dev'].rows} of {len(rows.dev)}" if rows.dev else "dev rows     none",
        f"truncated    {by_task(report.truncated)}",
        f"dropped      {by_task(report.dropped)}",
        f"blocks       {report.blocks} of {recipe.max_seq_length} tokens, fill {report.fill:.1%}",
        f"steps        {steps} of {batch} blocks on {workers if isinstance(workers, int) else list(workers)} worker(s),"
        f" {steps * batch / report.blocks:.1f} epochs",
        f"parameters   {trainable:,} trainable, {share:.2%} of the backbone's {total - trainable:,}",
        f"memory       about {peak / 2**30:.1f} GiB a worker at its peak",
        f"duration     {_duration(_FLOP * total * steps * batch * report.tokens / report.blocks, config)}",
    ]
    if share > _BENCHMARK_SHARE:
        lines.append(
            f"warning: PromptCBLUE allows {_BENCHMARK_SHARE:.0%} of the backbone; lower lora.r or modules_to_save"
        )
    return "\n".join(lines)


def _peak_bytes(config: TrainConfig, total: int, trainable: int, supervised: float) -> float:
    """An estimate: weights, what is trained, a micro-batch's activations, its supervised tokens' logits.

    A layer keeps about 12 hidden and 5 intermediate vectors a token for its backward, which is what a
    LLaMA-7B in bfloat16 was seen to take (26 GiB for one block of 2,048 tokens, 63 for one of 8,192).
    """
    shape: Any = AutoConfig.from_pretrained(storage.fetch(config.model.path, only=("config.json",)))
    dtype = getattr(torch, config.model.dtype) if config.model.dtype else shape.dtype or torch.float32
    size = torch.empty(0, dtype=dtype).element_size()
    tokens = config.train.per_device_train_batch_size * config.train.max_seq_length
    layer = 12 * shape.hidden_size + 5 * shape.intermediate_size
    activations = tokens * shape.num_hidden_layers * layer * size
    logits = tokens * supervised * shape.vocab_size * (size + 8)
    return float((total - trainable) * size + trainable * _TRAINED_BYTES + activations + logits)


def _duration(flop: float, config: TrainConfig) -> str:
    """An estimate: on GPUs from what one H200 gave, on this CPU from a matrix product of its own."""
    workers = config.scaling.max_workers
    matrix = torch.randn(768, 768)
    matrix @ matrix
    begun = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    cpu_flop_per_s = 4 * 2 * 768**3 / (time.perf_counter() - begun)
    return (
        f"about {_clock(flop / _GPU_FLOP_PER_S / workers)} on {workers} x H200,"
        f" {_clock(flop / cpu_flop_per_s)} on this machine's CPU, and the start"
    )


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
