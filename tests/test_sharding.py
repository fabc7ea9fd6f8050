"""A base in shards over two workers: the same steps, to the bit, and the same adapter."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor

from paddock import checkpoint, lora, packing
from paddock.acceleration import adamw, training_module
from paddock.config import LoraPart, ModelConfig, TrainConfig, TrainPart, build
from paddock.data import read_rows
from paddock.gradients import StepSum
from paddock.sharding import turns
from paddock.train import evaluate
from paddock.trainer import train

WEIGHTS = "adapter_model.safetensors"


def _two_steps(base: Path, blocks_file: Path, directory: Path, recipe: TrainPart) -> None:
    """What `paddock.train` does with a model, on however many processes there are."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    blocks = packing.PackedBlocks(blocks_file)
    torch.compiler.reset()  # after so many kinds of run in one process it would compile no more
    torch.manual_seed(0)
    part = LoraPart.model_validate({"r": 4, "lora_dropout": 0.1, "modules_to_save": ["lm_head"]})
    peft_model = lora.attach(lora.load_base(ModelConfig(path=str(base), dtype="float32")), part)
    model = training_module(peft_model, recipe, torch.device("cpu"))
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    assert bool(names) == (world > 1)
    assert not any("lora_" in name or "modules_to_save" in name for name in names)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer, sums, told = adamw(trained, recipe), StepSum(trained), []
    for step in range(2):
        model.train()
        # Three passes for two workers: one of them makes a pass that must not count.
        for index, weight in turns(model, 3, rank, world):
            checkpoint.seed_micro_batch(0, step, index)
            sums.add(model(**blocks.batch([index])) * weight / 100)
        told.append(sums.finish(1.0).loss)
        optimizer.step()
        optimizer.zero_grad()
        told.append(evaluate(model, blocks, 2, rank, world)["dev_loss"])
        if rank == 0:  # alone, between two steps
            lora.save(peft_model, directory, base)
            torch.save(told, directory / "told.pt")


def _worker(rank: int, rendezvous: str, base: Path, blocks_file: Path, directory: Path, keys: list[Any]) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=limit)
    try:
        for number, recipe in enumerate(keys):
            part = TrainPart.model_validate({**recipe, "fsdp": True})
            _two_steps(base, blocks_file, directory / str(number), part)
    finally:
        dist.destroy_process_group()


def _same_as_alone(base_model: Path, assets: Path, tmp_path: Path, variants: list[dict[str, Any]]) -> None:
    rows = read_rows(assets / "data" / "dev.json")[:9]
    tokens = packing.tokenise(lora.load_tokenizer(base_model), packing.Template("问：\n{input}\n答：\n"), rows, 128)
    packing.write_blocks(tokens, 128, tmp_path / "blocks.parquet", by_task=True)
    rendezvous, blocks_file = str(tmp_path / "rendezvous"), tmp_path / "blocks.parquet"
    arguments = (rendezvous, base_model, blocks_file, tmp_path / "shards", variants)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    other = mp.get_context("spawn").Process(target=_worker, args=(1, *arguments))
    other.start()
    for number, keys in enumerate(variants):
        _two_steps(base_model, blocks_file, tmp_path / "alone" / str(number), TrainPart.model_validate(keys))
    _worker(0, *arguments)
    other.join()
    torch.set_num_threads(threads)
    assert other.exitcode == 0
    for number in range(len(variants)):
        alone, shards = (tmp_path / how / str(number) for how in ("alone", "shards"))
        assert torch.load(shards / "told.pt", weights_only=True) == torch.load(alone / "told.pt", weights_only=True)
        assert (shards / WEIGHTS).read_bytes() == (alone / WEIGHTS).read_bytes()


def test_two_workers_with_half_the_base_each_learn_what_one_does(
    base_model: Path, assets: Path, tmp_path: Path
) -> None:
    _same_as_alone(base_model, assets, tmp_path, [{}])


@pytest.mark.slow
def test_so_do_recomputed_and_compiled_layers(base_model: Path, assets: Path, tmp_path: Path) -> None:
    recomputed = {"gradient_checkpointing": True}
    variants = [{**recomputed, "attn_implementation": "varlen"}, {"torch_compile": True, **recomputed}]
    _same_as_alone(base_model, assets, tmp_path, variants)


@pytest.mark.slow
def test_so_does_a_run_on_ray(train_tree: dict[str, Any], ray_cluster: Any, tmp_path: Path) -> None:
    lasts = []
    for workers in (1, 2):
        train_tree["output_dir"] = str(tmp_path / f"run-{workers}")
        train_tree["scaling"]["num_workers"] = workers
        train_tree["train"] |= {"gradient_accumulation_steps": 4 // workers, "fsdp": workers > 1, "eval_steps": 1}
        lasts.append(Path(train(build(TrainConfig, train_tree))))
    one, two = (json.loads((last / "manifest.json").read_text(encoding="utf-8"))["metrics"] for last in lasts)
    assert one == two
    assert (lasts[0] / WEIGHTS).read_bytes() == (lasts[1] / WEIGHTS).read_bytes()


def test_passes_are_dealt_out_evenly_only_where_layers_are_gathered() -> None:
    plain = nn.Linear(2, 2)
    assert turns(plain, 3, 1, 2) == [(1, 1)]
    assert turns(plain, 0, 0, 2) == []
