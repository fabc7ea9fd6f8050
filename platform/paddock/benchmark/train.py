"""Training on one GPU beside the plain loop: `python -m jobs.benchmark train`.

Plain: transformers and PEFT as their documentation has it: rows padded to the longest of a batch, sdpa, a base in
bfloat16, at the best of `plain_batch_sizes`; with `plain_autocast=true` as Trainer(bf16=True) does it. Ours: what
`paddock.train` builds of its configuration (`acceleration.training_module`, `adamw`) on packed blocks. Both start from
the same weights (random ones) and take the same rows in each optimizer step, with the loss divided by the step's
supervised tokens.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, get_scheduler, set_seed

from paddock import lora
from paddock.acceleration import adamw, training_module
from paddock.benchmark import BenchmarkConfig, Record
from paddock.benchmark.train_rows import make_rows, packed, padded, steps_of
from paddock.config_parts import LoraPart, TrainPart
from paddock.feed import on_device
from paddock.packing import IGNORE, TokenRow

Step = list[list[TokenRow]]
Loss = Callable[[Any], torch.Tensor]


class TrainBenchmarkConfig(BenchmarkConfig):
    """LLaMA-7B with the vocabulary of Chinese-LLaMA, LoRA of rank 8 on all seven projections."""

    llama: dict[str, Any] = Field(default_factory=lambda: {"vocab_size": 49954})
    """transformers' LlamaConfig where it is not LLaMA-7B's."""
    lora: LoraPart = LoraPart()
    """The adapter of both loops."""
    train: TrainPart = TrainPart(
        learning_rate=5e-4, max_steps=20, max_seq_length=4096, per_device_train_batch_size=4, weight_decay=0.01
    )
    """Ours: packed blocks of max_seq_length, per_device_train_batch_size of them a forward pass and a step."""
    longest_row: int = 512
    """Longer rows are cut, as the reference recipe does."""
    plain_batch_sizes: tuple[int, ...] = (2, 4, 8, 16)
    """Rows in a batch of the plain loop; the fastest one that fits is what ours is compared with."""
    plain_autocast: bool = False
    """The plain loop under autocast, which is a fifth faster: without it PEFT multiplies adapters in float32."""
    scan_rows: int = 32
    """Rows that each of those is timed on before."""
    dev_rows: int = 128
    """Rows that both are evaluated on in the end."""
    variants: tuple[Literal["bf16", "fp8"], ...] = ("bf16", "fp8")
    """Ours: with the base in bfloat16, and with its products in FP8."""


def train(config: TrainBenchmarkConfig) -> None:
    """Measure, and write `train-MACHINE.json`."""
    record = Record(config, "train")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(device)
    record.add(what="bf16 matmul", tflops=round(rate / 1e12, 1))

    recipe = config.train
    vocabulary, length = llama_config(config).vocab_size, recipe.max_seq_length
    tokens = (recipe.max_steps + 1) * recipe.per_device_train_batch_size * length
    rows = make_rows(tokens // 100, vocabulary, config.longest_row, recipe.seed)
    steps = steps_of(rows, length, recipe.per_device_train_batch_size)[: recipe.max_steps]
    dev = make_rows(config.dev_rows, vocabulary, config.longest_row, recipe.seed + 1)
    row = [len(r.input_ids) for r in chain.from_iterable(chain.from_iterable(steps))]
    record.add(what="rows", rows=len(row), mean_tokens=round(sum(row) / len(row), 1), steps=len(steps))

    best = plain_scan(config, device, list(chain.from_iterable(steps[0])), record)
    plain = measure_plain(config, device, best, steps, dev, record)
    ours = {variant: measure_ours(config, device, variant, steps, dev, record) for variant in config.variants}

    parameters = plain["base_parameters"]
    summary: dict[str, Any] = {}
    for variant, found in ours.items():
        suffix = "" if variant == "bf16" else f"_{variant}"
        summary |= {
            f"speedup_vs_plain{suffix}": round(found["tokens_per_s"] / plain["tokens_per_s"], 2),
            f"tokens_per_s{suffix}": found["tokens_per_s"],
            f"mfu_4n{suffix}": round(found["tokens_per_s"] * 4 * parameters / rate, 3),
            f"loss_gap{suffix}": round(abs(found["dev_loss"] / plain["dev_loss"] - 1), 5),
        }
    record.write(**summary)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large bfloat16 product of random matrices: the median of 20."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(25):
        with timed(device) as seconds:
            a @ b
        times.append(seconds[0])
    return 2 * size**3 / sorted(times[5:])[10]


def llama_config(config: TrainBenchmarkConfig) -> LlamaConfig:
    """LLaMA-7B's, which is LlamaConfig's default, with the configuration's changes."""
    return LlamaConfig(**config.llama)


def peft_model(config: TrainBenchmarkConfig, device: torch.device) -> Any:
    """Random base and fresh adapter, the same ones each time."""
    set_seed(config.train.seed)
    with device:
        base = AutoModelForCausalLM.from_config(llama_config(config), dtype=torch.bfloat16, attn_implementation="sdpa")
        return lora.attach(base, config.lora).train()


def plain_scan(config: TrainBenchmarkConfig, device: torch.device, rows: list[TokenRow], record: Record) -> int:
    """The plain loop's best batch size, by forward and backward over some rows."""
    model = peft_model(config, device)
    rows = rows[: config.scan_rows]
    found: dict[int, float] = {}
    for size in config.plain_batch_sizes:
        batches = [padded(rows[at : at + size]) for at in range(0, len(rows), size)]
        largest = max(batches, key=lambda batch: batch["input_ids"].numel())
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        try:
            with peak_memory(device) as peak:
                torch.autograd.backward(plain_loss(config, model, largest, device, 1))  # warm-up, and whether it fits
                with timed(device) as seconds:
                    for batch in batches:
                        torch.autograd.backward(plain_loss(config, model, batch, device, 1))
        except torch.OutOfMemoryError:
            record.add(what="plain, scan", batch_size=size, out_of_memory=True)
            break
        finally:
            model.zero_grad()
        found[size] = tokens / seconds[0]
        fill = tokens / sum(batch["input_ids"].numel() for batch in batches)
        record.add(
            what="plain, scan",
            batch_size=size,
            tokens_per_s=round(found[size]),
            fill=round(fill, 3),
            peak_memory_gib=peak[0],
        )
    del model
    return max(found, key=lambda size: found[size])


def plain_loss(
    config: TrainBenchmarkConfig, model: Any, batch: dict[str, torch.Tensor], device: torch.device, supervised: int
) -> torch.Tensor:
    """transformers' own loss, token-normalised as Trainer does over accumulated batches."""
    with torch.autocast(device.type, torch.bfloat16, enabled=config.plain_autocast):
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        return model(**on_device, use_cache=False, num_items_in_batch=supervised).loss  # type: ignore[no-any-return]


def measure_plain(
    config: TrainBenchmarkConfig,
    device: torch.device,
    size: int,
    steps: list[Step],
    dev: list[TokenRow],
    record: Record,
) -> dict[str, Any]:
    model = peft_model(config, device)
    optimizer = adamw(_trainable(model), config.train)

    def batches(rows: Sequence[TokenRow]) -> Iterator[dict[str, torch.Tensor]]:
        return (padded(rows[at : at + size]) for at in range(0, len(rows), size))

    def losses(step: Step) -> Iterator[torch.Tensor]:
        rows = list(chain.from_iterable(step))
        return (plain_loss(config, model, batch, device, _supervised(step)) for batch in batches(rows))

    found = run_steps(device, optimizer, losses, steps, config.train)
    positions = sum(batch["input_ids"].numel() for step in steps for batch in batches(list(chain.from_iterable(step))))
    model.eval()
    with torch.no_grad():
        total = sum(plain_loss(config, model, batch, device, 1).item() for batch in batches(dev))
    found |= {
        "dev_loss": total / _supervised([dev]),
        "base_parameters": sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n),
        "fill": _tokens(steps) / positions,
    }
    record.add(what="plain", batch_size=size, **_rounded(found))
    return found


def measure_ours(
    config: TrainBenchmarkConfig,
    device: torch.device,
    variant: str,
    steps: list[Step],
    dev: list[TokenRow],
    record: Record,
) -> dict[str, Any]:
    recipe = config.train.model_copy(update={"fp8": variant == "fp8"})
    model = training_module(peft_model(config, device), recipe, device)
    optimizer = adamw(_trainable(model), recipe)
    length = recipe.max_seq_length

    feed = on_device((packed(step, length) for step in steps), device)

    def losses(step: Step) -> Iterator[torch.Tensor]:
        yield model(**next(feed)) / _supervised(step)

    found = run_steps(device, optimizer, losses, steps, recipe)
    model.eval()
    with torch.no_grad():
        blocks = (packed(step, length) for step in steps_of(dev, length, 1))
        total = sum(model(**batch).item() for batch in on_device(blocks, device))
    found |= {
        "dev_loss": total / _supervised([dev]),
        "fill": _tokens(steps) / (len(steps) * len(steps[0]) * length),
    }
    record.add(what=f"ours, {variant}", blocks=len(steps[0]), block_tokens=length, **_rounded(found))
    return found


def run_steps(
    device: torch.device,
    optimizer: torch.optim.Optimizer,
    losses: Callable[[Step], Iterator[torch.Tensor]],
    steps: list[Step],
    recipe: TrainPart,
) -> dict[str, Any]:
    """Optimizer steps over the micro-batches of each; timed from the third step on, after compilation."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    warmup = math.ceil(recipe.warmup_ratio * len(steps))
    scheduler = get_scheduler(recipe.lr_scheduler_type, optimizer, warmup, len(steps))
    curve, times = [], []
    with peak_memory(device) as peak:
        for step in steps:
            with timed(device) as seconds:
                total = 0.0
                for loss in losses(step):
                    torch.autograd.backward(loss)
                    total += loss.item()
                nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            curve.append(round(total, 4))
            times.append(seconds[0])
    steady = slice(2, None) if len(steps) > 2 else slice(None)
    return {
        "tokens_per_s": round(_tokens(steps[steady]) / sum(times[steady])),
        "supervised_tokens_per_s": round(sum(map(_supervised, steps[steady])) / sum(times[steady])),
        "first_steps_s": [round(t, 2) for t in times[:2]],
        "peak_memory_gib": peak[0],
        "loss_curve": curve,
    }


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """Seconds, with the device's work done."""
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float | None]]:
    """GiB that PyTorch held at most; None on a CPU."""
    found: list[float | None] = []
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    found.append(round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _tokens(steps: Sequence[Step]) -> int:
    return sum(len(row.input_ids) for step in steps for block in step for row in block)


def _supervised(step: Step) -> int:
    return sum(label != IGNORE for block in step for row in block for label in row.labels)


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in found.items()}
