"""What a training run would do, without doing it: `python -m jobs.train plan ...`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from paddock import lora, storage
from paddock.config import TrainConfig, TrainPart
from paddock.dataset import by_task, load_rows, tokenise_here, write_packed
from paddock.loss import CHUNK
from paddock.trainer import check, run_config, steps_of

# The benchmark's rule: PEFT modules together have at most this share of the backbone's parameters.
_BENCHMARK_SHARE = 0.01
# Forward, and backward without the frozen weights' gradients: FLOP for a parameter and a token. Recomputation adds a
# forward.
_FLOP = 4
# What one H200 gave a LLaMA-7B, packed and compiled per layer (benchmarks/train-h200.json): tokens/s x 4N.
_GPU_FLOP_PER_S = {"bf16": 5.27e14, "fp8": 7.72e14}
# A trained parameter in float32, its gradient, Adam's two moments, and its float64 sum.
_TRAINED_BYTES = 4 + 4 + 8 + 8
# The scales of 4-bit blocks of 64: in float32, or in 8 bits with float32 ones for 256 blocks.
_SCALE_BYTES = {False: 4 / 64, True: (1 + 4 / 256) / 64}


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
    shape: Any = AutoConfig.from_pretrained(storage.fetch(config.model.path, only=("config.json",)))
    dtype = getattr(torch, config.model.dtype) if config.model.dtype else shape.dtype or torch.float32
    supervised = report.supervised_tokens / report.tokens
    peak = peak_bytes(
        shape,
        recipe,
        size=dtype.itemsize,
        total=total,
        trainable=trainable,
        supervised=supervised,
        workers=config.scaling.min_workers,
    )
    lines = [
        f"model        {config.model.path}",
        f"rows         {report.rows} of {len(rows.train)}, {report.tokens} tokens, {supervised:.1%} of them supervised",
        f"dev rows     {reports['dev'].rows} of {len(rows.dev)}" if rows.dev else "dev rows     none",
        f"truncated    {by_task(report.truncated)}",
        f"dropped      {by_task(report.dropped)}",
        f"blocks       {report.blocks} of {recipe.max_seq_length} tokens, fill {report.fill:.1%}",
        f"steps        {steps} of {batch} blocks on {workers if isinstance(workers, int) else list(workers)} worker(s),"
        f" {steps * batch / report.blocks:.1f} epochs",
        f"parameters   {trainable:,} trainable, {share:.2%} of the backbone's {total - trainable:,}",
        f"memory       about {peak / 2**30:.1f} GiB a worker at its peak, on a GPU",
        f"duration     {_duration(total, steps * batch * report.tokens / report.blocks, config)}",
    ]
    if share > _BENCHMARK_SHARE:
        lines.append(
            f"warning: PromptCBLUE allows {_BENCHMARK_SHARE:.0%} of the backbone; lower lora.r or modules_to_save"
        )
    return "\n".join(lines)


def peak_bytes(
    shape: Any, recipe: TrainPart, *, size: int, total: int, trainable: int, supervised: float, workers: int = 1
) -> float:
    """An estimate for a GPU: the base, what is trained, a micro-batch's activations, its supervised tokens' logits.

    shape: transformers' LlamaConfig. size: bytes of a base parameter. supervised: the share of all tokens.

    For its backward a compiled layer keeps, for each token, 6 hidden vectors (its input, both normalised ones, the
    query, what was attended to, the sum after it), key and value, and 3 intermediate ones.
    """
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    around = shape.vocab_size * hidden * (1 if shape.tie_word_embeddings else 2)
    inside = total - trainable - around
    base = size * (around + inside)
    if recipe.load_in_4bit:
        base = size * around + inside * (0.5 + _SCALE_BYTES[recipe.bnb_4bit_use_double_quant])
    elif recipe.fsdp and workers > 1:
        base = base / workers + size * (around + 2 * inside / layers)
    narrow = hidden * shape.num_key_value_heads / shape.num_attention_heads
    layer = 6 * hidden + 2 * narrow + 3 * shape.intermediate_size
    kept = {False: layers * layer, "selective": layers * layer / 2, True: layers * hidden + layer}
    tokens = recipe.per_device_train_batch_size * recipe.max_seq_length
    activations = tokens * kept[recipe.gradient_checkpointing] * size
    logits = min(tokens * supervised, CHUNK) * shape.vocab_size * (size + 8)
    return float(base + trainable * _TRAINED_BYTES + activations + logits)


def gpu_seconds(total: int, tokens: float, recipe: TrainPart) -> float:
    """An estimate for one GPU, from what an H200 gave: parameters of the model, tokens of the run."""
    flop = _FLOP * total * tokens * (1.5 if recipe.gradient_checkpointing is True else 1)
    return flop / _GPU_FLOP_PER_S["fp8" if recipe.fp8 else "bf16"]


def _duration(total: int, tokens: float, config: TrainConfig) -> str:
    """On GPUs, and on this CPU from a matrix product of its own."""
    workers = config.scaling.max_workers
    matrix = torch.randn(768, 768)
    matrix @ matrix
    begun = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    cpu_flop_per_s = 4 * 2 * 768**3 / (time.perf_counter() - begun)
    return (
        f"about {_clock(gpu_seconds(total, tokens, config.train) / workers)} on {workers} x H200,"
        f" {_clock(_FLOP * total * tokens / cpu_flop_per_s)} on this machine's CPU, and the start"
    )


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
