"""LoRA fine-tuning: the loop, and the TorchTrainer around it.

    packed blocks -> [forward, backward] x gradient_accumulation_steps -> AdamW -> checkpoint-N

A step's loss is the sum over its supervised tokens divided by their number over all workers and
accumulation steps, and which blocks a step takes depends on the step alone. So how a step's batch is split
over workers and accumulation changes how fast a run is, not what it learns.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer
from torch import nn
from transformers import get_scheduler, set_seed

from paddock import checkpoint, cluster, lora, manifest, packing, storage
from paddock.acceleration import adamw, training_module
from paddock.config import TrainConfig
from paddock.data import content_hash, read_rows
from paddock.errors import ConfigError, ModelError, PaddockError
from paddock.feed import on_device
from paddock.journal import Journal
from paddock.prompts import load_template


def train(config: TrainConfig) -> str | Path:
    """Train, and return where the last checkpoint stands. A run that was cut short goes on where it was.

    Raises a PaddockError before anything starts for whatever can be known by then: configuration, data,
    model, a run directory of another configuration, a cluster that is too small.
    """
    inputs = check(config)
    started = cluster.connect()
    try:
        use_gpu = cluster.has_gpus() if config.scaling.use_gpu is None else config.scaling.use_gpu
        bundle = {"CPU": 1.0, **({"GPU": 1.0} if use_gpu else {}), **config.scaling.resources_per_worker}
        cluster.require([bundle] * config.scaling.num_workers, "training")
        scaling = ray.train.ScalingConfig(
            num_workers=config.scaling.num_workers, use_gpu=use_gpu, resources_per_worker=bundle
        )
        run = config.output_dir
        with manifest.locked(run):
            if config.overwrite:
                for name in ("packed", "metrics.jsonl", "tensorboard"):
                    storage.remove(storage.join(run, name))
                checkpoint.prune(run, keep=0)
            hashed = run_config(config)
            last = checkpoint.path(run, config.train.max_steps)
            found = checkpoint.find_last(run, hashed, inputs)
            if found is not None and found.name == Path(last).name:
                print(f"{last}: already trained with this configuration; nothing to do")
                return last
            pack_rows(config, inputs)
            _fit(config, scaling, hashed, inputs)
        manifest.verify(last)
        return last
    finally:
        cluster.disconnect(started)


def check_config(config: TrainConfig) -> None:
    """What can be refused before any input is looked at, or made."""
    if config.data.train is None:
        raise ConfigError("data.train: is required; give the file of training rows as data.train=FILE")
    load_template(config.prompt.template)
    lora.lora_config(config.lora)


def check(config: TrainConfig) -> dict[str, str]:
    """Everything that can be refused before Ray is asked; returns the inputs' fingerprints."""
    check_config(config)
    template = load_template(config.prompt.template)
    lora.check_base(config.model.path)
    lora.load_tokenizer(config.model.path)
    lora.check_targets(config.model, config.lora)
    rows = read_rows(config.data.train or "", config.data.format, require_target=True)
    if config.data.dev is not None:
        read_rows(config.data.dev, config.data.format, require_target=True)
    return {
        "model": manifest.fingerprint(config.model.path),
        "data.train": content_hash(rows),
        "prompt": template.text,
    }


def run_config(config: TrainConfig) -> dict[str, Any]:
    """What identifies a run: the hashed configuration, with the step's batch instead of how it is split."""
    hashed = config.hashed()
    recipe = hashed["train"]
    workers = config.scaling.num_workers
    recipe["global_batch_size"] = (
        workers * recipe.pop("per_device_train_batch_size") * recipe.pop("gradient_accumulation_steps")
    )
    return hashed


def pack_rows(config: TrainConfig, inputs: Mapping[str, str]) -> str | Path:
    """Tokenise and pack the training and dev rows into `RUN/packed/`."""
    rows = {"train": read_rows(config.data.train or "", config.data.format, require_target=True)}
    if config.data.dev is not None:
        rows["dev"] = read_rows(config.data.dev, config.data.format, require_target=True)
        inputs = {**inputs, "data.dev": content_hash(rows["dev"])}
    what = {"max_seq_length": config.train.max_seq_length}
    packed = storage.join(config.output_dir, "packed")
    with manifest.stage(packed, kind="packed", config=what, inputs=inputs, overwrite=config.overwrite) as work:
        if work.finished:
            return packed
        tokenizer = lora.load_tokenizer(config.model.path)
        template = load_template(config.prompt.template)
        for split, members in rows.items():
            report = packing.pack(
                tokenizer, template, members, config.train.max_seq_length, work.directory / f"{split}.parquet"
            )
            work.extra[split] = asdict(report)
            print(
                f"packed {split}: {report.rows} rows, {report.tokens} tokens ({report.supervised_tokens} supervised)"
                f" in {report.blocks} blocks, fill {report.fill:.0%}, truncated {sum(report.truncated.values())},"
                f" dropped {sum(report.dropped.values())}",
                flush=True,
            )
    return packed


def _fit(config: TrainConfig, scaling: Any, hashed: dict[str, Any], inputs: dict[str, str]) -> None:
    run = ray.train.RunConfig(
        # Ray's own records of the attempt; what counts are our checkpoints, one directory up.
        name=time.strftime("%Y%m%d-%H%M%S"),
        storage_path=str(storage.join(config.output_dir, "ray_train")),
        logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        failure_config=ray.train.FailureConfig(max_failures=config.scaling.max_failures),
    )
    settings = {"config": config, "hashed": hashed, "inputs": inputs}
    try:
        TorchTrainer(train_worker, train_loop_config=settings, scaling_config=scaling, run_config=run).fit()
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, PaddockError):
                raise failure from None
        raise


def train_worker(settings: dict[str, Any]) -> None:
    """The loop of one worker."""
    config: TrainConfig = settings["config"]
    recipe, run = config.train, config.output_dir
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    batch: int = settings["hashed"]["train"]["global_batch_size"]
    set_seed(recipe.seed)  # the same adapter on every worker

    peft_model = lora.attach(lora.load_base(config.model), config.lora)
    resume_from = checkpoint.find_last(run, settings["hashed"], settings["inputs"])
    if resume_from is not None:
        lora.load_weights(peft_model, resume_from)
    model = ray.train.torch.prepare_model(training_module(peft_model, recipe, ray.train.torch.get_device()))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, recipe)
    scheduler = get_scheduler(
        recipe.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(recipe.warmup_ratio * recipe.max_steps),
        num_training_steps=recipe.max_steps,
    )
    first_step = 0
    set_seed(recipe.seed + rank)  # each worker drops out its own
    if resume_from is not None:
        first_step = _restore(checkpoint.read_state(resume_from), optimizer, scheduler, rank)

    packed = storage.fetch(storage.join(run, "packed"))
    blocks = packing.PackedBlocks(packed / "train.parquet")
    dev = packing.PackedBlocks(packed / "dev.parquet") if config.data.dev else None
    journal = Journal(run, first_step, recipe.max_steps) if rank == 0 else None
    if journal:
        trainable, total = peft_model.get_nb_trainable_parameters()
        journal.say(
            f"{'resuming after step ' + str(first_step) if first_step else 'training'}: {world} worker(s),"
            f" {recipe.max_steps} steps of {batch} blocks, {trainable:,} of {total:,} parameters trainable"
        )

    for step in range(first_step, recipe.max_steps):
        chosen = packing.step_blocks(len(blocks), step, batch, recipe.seed)
        supervised = sum(blocks.supervised_tokens[b] for b in chosen)
        loss = _step(model, blocks, chosen[rank::world], supervised, config, world)
        if not math.isfinite(loss):
            raise ModelError(
                f"step {step + 1}: the loss is {loss}; lower train.learning_rate, or look at the rows of blocks"
                f" {chosen} in {packed}; the checkpoints before this step are good"
            )
        nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        done = step + 1
        last = done == recipe.max_steps
        if done % recipe.logging_steps == 0 or last:
            mean = _sum_over_workers(loss, world)
            if journal:
                journal.log(done, loss=mean, learning_rate=scheduler.get_last_lr()[0], supervised_tokens=supervised)
        metrics: dict[str, float] = {}
        if dev is not None and (done % recipe.eval_steps == 0 or last):
            metrics["dev_loss"] = evaluate(model, dev, recipe.per_device_train_batch_size, rank, world)
            if journal:
                journal.log(done, **metrics)
        if done % recipe.save_steps == 0 or last:
            state = _state(optimizer, scheduler, done, world)
            if rank == 0:
                saved = checkpoint.write(
                    run,
                    done,
                    config=settings["hashed"],
                    inputs=settings["inputs"],
                    save_adapter=lambda directory: lora.save(peft_model, directory, config.model.path),
                    state=state,
                    metrics=metrics,
                )
                checkpoint.prune(run, recipe.save_total_limit)
                print(f"saved {saved}", flush=True)
            if journal:
                journal.publish()
            # The checkpoint is ours and stands already; Ray learns of the progress.
            ray.train.report({"step": done, **metrics})
    if journal:
        journal.close()


def _step(
    model: nn.Module, blocks: packing.PackedBlocks, mine: list[int], supervised: int, config: TrainConfig, world: int
) -> float:
    """Forward and backward over this worker's blocks; returns its part of the step's mean loss."""
    size = config.train.per_device_train_batch_size
    micro_batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    device = next(model.parameters()).device
    loss_here = 0.0
    for index, tensors in enumerate(on_device((blocks.batch(indices) for indices in micro_batches), device)):
        is_last = index == len(micro_batches) - 1
        # DDP exchanges gradients once, in the last backward pass.
        wait = contextlib.nullcontext() if is_last or world == 1 else model.no_sync()  # type: ignore[operator]
        with wait:
            loss = model(**tensors) / supervised
            # DDP takes the mean over workers, where the loss is a sum.
            (loss * world).backward()
        loss_here += loss.item()
    return loss_here


@torch.no_grad()
def evaluate(model: nn.Module, blocks: packing.PackedBlocks, size: int, rank: int, world: int) -> float:
    """The mean loss over all supervised tokens of the dev blocks, each worker taking its share."""
    model.eval()
    plain = model.module if world > 1 else model
    device = next(model.parameters()).device
    mine = list(range(rank, len(blocks), world))
    total = 0.0
    for start in range(0, len(mine), size):
        tensors = {n: t.to(device) for n, t in blocks.batch(mine[start : start + size]).items()}
        total += plain(**tensors).item()  # type: ignore[operator]
    model.train()
    return _sum_over_workers(total, world) / sum(blocks.supervised_tokens)


def _sum_over_workers(value: float, world: int) -> float:
    if world == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total.item())


def _state(optimizer: Any, scheduler: Any, step: int, world: int) -> dict[str, Any]:
    """What a checkpoint needs to go on exactly; the RNGs of all workers, by rank."""
    rngs: list[Any] = [checkpoint.rng_state()]
    if world > 1:
        rngs = [None] * world
        dist.all_gather_object(rngs, checkpoint.rng_state())
    return {"step": step, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "rng": rngs}


def _restore(state: dict[str, Any], optimizer: Any, scheduler: Any, rank: int) -> int:
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if rank < len(state["rng"]):
        checkpoint.set_rng_state(state["rng"][rank])
    return int(state["step"])
