"""LoRA fine-tuning: the loop of one worker.

    packed blocks -> micro-batches -> [forward, backward] -> sum over workers -> AdamW -> checkpoint-N

A step's loss is the sum over its supervised tokens divided by their number over all workers and
accumulation steps. Which blocks a step takes, how they are cut into micro-batches and what is dropped out
of each depend on the step alone; the micro-batches are dealt out to whichever workers there are. So the
number of workers changes how fast a run is, not what it learns, and a run goes on from a checkpoint as
if it had never stopped.
"""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.experimental import tqdm_ray
from torch import nn
from transformers import get_scheduler, set_seed

from paddock import checkpoint, cluster, lora, packing, storage, validation
from paddock.acceleration import adamw, training_module
from paddock.config import TrainConfig
from paddock.errors import ModelError, ResourceError
from paddock.feed import on_device
from paddock.gradients import Step, StepSum, from_rank_0, sum_over_workers
from paddock.journal import Journal
from paddock.sharding import turns


@dataclass(frozen=True)
class Attempt:
    """What every worker of one attempt at a run is told."""

    config: TrainConfig
    identity: dict[str, Any]
    """The hashed configuration, with `train.global_batch_size`; what the checkpoints are compared with."""
    inputs: dict[str, str]
    max_steps: int
    """Optimizer steps of the whole run."""
    stop_flag: str
    """The cluster's flag that asks to save and stop."""
    progress_bar: bool


def train_worker(attempt: Attempt) -> int:
    """Train until the last step, or until asked to stop; returns the number of steps that are done.

    Raises ModelError where loss or gradient is not finite, ResourceError where the GPU has too little memory.
    """
    # Ray Train tells of each report under a name that its own log level misses.
    logging.getLogger().setLevel(logging.WARNING)
    with ExitStack() as stack:
        try:
            return _train(attempt, stack)
        except torch.cuda.OutOfMemoryError as error:
            told = " ".join(str(error).split(". ")[0].split())
            raise ResourceError(
                f"{told}; lower train.per_device_train_batch_size (and raise gradient_accumulation_steps as much)"
                " or train.max_seq_length"
            ) from None


def _train(attempt: Attempt, stack: ExitStack) -> int:
    config, recipe, run = attempt.config, attempt.config.train, attempt.config.output_dir
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    batch: int = attempt.identity["train"]["global_batch_size"]

    # Where the run is: rank 0 looks, once nothing else writes to it, and the others follow.
    found = None
    if rank == 0:
        stack.enter_context(checkpoint.writing(run))
        found = checkpoint.find_last(run, attempt.identity, attempt.inputs)
    first_step = from_rank_0(checkpoint.step_of(found) if found else 0)

    # The model, the same on every worker.
    set_seed(recipe.seed)
    peft_model = lora.attach(lora.load_base(config.model), config.lora)
    trainable, total = peft_model.get_nb_trainable_parameters()
    device = ray.train.torch.get_device()
    model = training_module(peft_model, recipe, device)
    trained = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    optimizer = adamw(parameters, recipe)
    scheduler = get_scheduler(
        recipe.lr_scheduler_type,
        optimizer,
        num_warmup_steps=recipe.warmup_steps or math.ceil(recipe.warmup_ratio * attempt.max_steps),
        num_training_steps=attempt.max_steps,
    )
    if first_step:
        state = checkpoint.read_state(storage.fetch(checkpoint.path(run, first_step)))
        _restore(state, trained, optimizer, scheduler)

    # The data, and what is told.
    packed = storage.fetch(storage.join(run, "packed"))
    blocks = packing.PackedBlocks(packed / "train.parquet")
    dev = packing.PackedBlocks(packed / "dev.parquet") if (packed / "dev.parquet").exists() else None
    journal = _journal(attempt, first_step) if rank == 0 else None
    scored = recipe.predict_with_generate
    publisher = checkpoint.Publisher(run, recipe.save_total_limit, recipe.best_by, scored=scored)
    watch = cluster.Watch(attempt.stop_flag) if rank == 0 else None
    if journal:
        journal.say(
            f"{f'resuming after step {first_step}' if first_step else 'training'}: {world} worker(s),"
            f" {attempt.max_steps} steps of {batch} blocks, {trainable:,} of {total:,} parameters trainable"
        )

    model.train()
    sums = StepSum(parameters)
    done = first_step
    while done < attempt.max_steps:
        chosen = packing.step_blocks(len(blocks), done, batch, recipe.seed)
        supervised = sum(blocks.supervised_tokens[b] for b in chosen)
        micro_batches = packing.micro_batches(chosen, recipe.per_device_train_batch_size)
        mine = turns(model, len(micro_batches), rank, world)
        batches = on_device((blocks.batch(micro_batches[index]) for index, _ in mine), device)
        for (index, weight), tensors in zip(mine, batches, strict=True):
            checkpoint.seed_micro_batch(recipe.seed, done, index)
            sums.add(model(**tensors) * weight / supervised)
        asked = {"stop": watch.stops(), "save": watch.preempts()} if watch else {}
        step = sums.finish(recipe.max_grad_norm, **asked)
        if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
            raise _not_finite(attempt, step, done + 1, model, blocks, micro_batches)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        done += 1

        last = done == attempt.max_steps
        ends = step.stop or last
        saves = ends or step.save or done % recipe.save_steps == 0
        dev_losses: dict[str, Any] = {}
        due = last or done % recipe.eval_steps == 0 or (saves and not step.stop and recipe.best_by == "dev_loss")
        if dev is not None and due:
            dev_losses = evaluate(model, dev, recipe.per_device_train_batch_size, rank, world)
        if journal:
            journal.count(sum(blocks.tokens[b] for b in chosen))
            if ends or dev_losses or done % recipe.logging_steps == 0:
                told = {"loss": step.loss, "grad_norm": step.grad_norm, "learning_rate": scheduler.get_last_lr()[0]}
                journal.log(done, {**told, "supervised_tokens": supervised, **dev_losses})
        if saves:
            if rank == 0 and journal:
                saved = checkpoint.write(
                    run,
                    done,
                    config=attempt.identity,
                    inputs=attempt.inputs,
                    save_adapter=lambda directory: lora.save(peft_model, directory, config.model.path),
                    state=_state(trained, optimizer, scheduler, done),
                    metrics=dev_losses,
                )
                publisher.publish(saved, before=journal.publish)
                journal.say(f"saved {checkpoint.path(run, done)}")
            validation.report(run, done, saved=rank == 0 and scored and not step.stop)
        if step.stop:
            break
    publisher.close()
    if journal:
        journal.close()
    return done


def _loss(model: nn.Module, blocks: packing.PackedBlocks, indices: list[int]) -> torch.Tensor:
    """The summed loss of some blocks' supervised tokens."""
    device = next(model.parameters()).device
    loss: torch.Tensor = model(**{name: tensor.to(device) for name, tensor in blocks.batch(indices).items()})
    return loss


@torch.no_grad()
def evaluate(model: nn.Module, dev: packing.PackedBlocks, size: int, rank: int, world: int) -> dict[str, Any]:
    """The mean loss over all supervised tokens of the dev rows, and of each task's; each worker takes its share."""
    model.eval()
    tasks = sorted(set(dev.tasks))
    members = {task: [b for b, of in enumerate(dev.tasks) if of == task] for task in tasks}
    portions = [(t, p) for t, task in enumerate(tasks) for p in packing.micro_batches(members[task], size)]
    sums = torch.zeros(len(tasks), dtype=torch.float64, device=next(model.parameters()).device)
    for index, weight in turns(model, len(portions), rank, world):
        task, portion = portions[index]
        sums[task] += _loss(model, dev, portion) * weight
    model.train()
    sum_over_workers(sums)
    counts = [sum(dev.supervised_tokens[b] for b in members[task]) for task in tasks]
    losses = sums.tolist()
    by_task = {task: loss / count for task, loss, count in zip(tasks, losses, counts, strict=True)}
    return {"dev_loss": sum(losses) / sum(counts), "dev_loss_by_task": by_task}


def _not_finite(
    attempt: Attempt,
    step: Step,
    number: int,
    model: nn.Module,
    blocks: packing.PackedBlocks,
    micro_batches: list[list[int]],
) -> ModelError:
    """What is told of a step whose loss or gradient is no number; nothing of it went into the weights."""
    bad = micro_batches
    if not math.isfinite(step.loss):
        with torch.no_grad():
            bad = [blocks_of for blocks_of in bad if not math.isfinite(_loss(model, blocks, blocks_of).item())] or bad
    rows = blocks.row_ids([b for blocks_of in bad for b in blocks_of])
    named = ", ".join(rows[:20]) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
    saved = checkpoint.steps(attempt.config.output_dir)
    good = checkpoint.path(attempt.config.output_dir, saved[-1]) if saved else "none"
    what = f"the gradient's norm is {step.grad_norm}" if math.isfinite(step.loss) else f"the loss is {step.loss}"
    return ModelError(
        f"step {number}: {what}; rows in it: {named}; last good checkpoint: {good}; look at the rows, or lower"
        " train.learning_rate in a new output_dir"
    )


def _journal(attempt: Attempt, first_step: int) -> Journal:
    bar = None
    if attempt.progress_bar:
        bar = tqdm_ray.tqdm(desc="training", total=attempt.max_steps, unit="step")
        bar.update(first_step)
    recipe = attempt.config.train
    return Journal(attempt.config.output_dir, first_step, attempt.max_steps, recipe.report_to, bar)


def _state(trained: dict[str, nn.Parameter], optimizer: Any, scheduler: Any, step: int) -> dict[str, Any]:
    """What a checkpoint needs to go on exactly. An adapter's files may say the same otherwise (PiSSA's do)."""
    parameters = {name: parameter.detach().cpu() for name, parameter in trained.items()}
    return {
        "step": step,
        "parameters": parameters,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


def _restore(state: dict[str, Any], trained: dict[str, nn.Parameter], optimizer: Any, scheduler: Any) -> None:
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
