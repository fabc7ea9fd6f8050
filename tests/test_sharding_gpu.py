"""A base in shards over two cards: what one card learns, compiled, with less memory for the base.

Needs neither the session's fixtures nor Ray: `pytest --noconftest tests/test_sharding_gpu.py` will do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from paddock import lora
from paddock.acceleration import adamw, training_module
from paddock.benchmark.train_rows import make_rows, packed
from paddock.config_parts import LoraPart, TrainPart
from paddock.gradients import StepSum
from paddock.sharding import turns

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8}


def _steps(rank: int, world: int, keys: dict[str, Any], told: Path) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=1001, initializer_range=0.06, **SHAPE)).bfloat16()
    size = sum(parameter.nbytes for parameter in base.parameters())
    peft_model = lora.attach(base, LoraPart(r=8))
    recipe = TrainPart.model_validate({"learning_rate": 1e-3, "fsdp": world > 1, **keys})
    model = training_module(peft_model, recipe, device).train()
    held = torch.cuda.memory_allocated(device)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer, sums, losses = adamw(trained, recipe), StepSum(trained), []
    rows = make_rows(12, 1000, 96, seed=0)
    batches = [packed([rows[at : at + 4]], 400) for at in (0, 4, 8)]
    for _ in range(4):
        for index, weight in turns(model, len(batches), rank, world):
            tensors = {name: tensor.to(device) for name, tensor in batches[index].items()}
            sums.add(model(**tensors) * weight / 100)
        losses.append(sums.finish(1.0).loss)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # between steps, as `evaluate` does
            model(**{name: tensor.to(device) for name, tensor in batches[0].items()})
    if rank == 0:
        torch.save({"losses": losses, "held": held / size}, told)


def _worker(rank: int, rendezvous: str, keys: dict[str, Any], told: Path) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    _steps(rank, 2, keys, told)
    dist.destroy_process_group()


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": True}, {"torch_compile": False}], ids=str)
def test_two_cards_with_half_the_base_each_learn_what_one_does(keys: dict[str, Any], tmp_path: Path) -> None:
    _steps(0, 1, keys, tmp_path / "alone.pt")
    mp.spawn(_worker, (str(tmp_path / "rendezvous"), keys, tmp_path / "shards.pt"), nprocs=2)
    alone, shards = (torch.load(tmp_path / f"{how}.pt", weights_only=True) for how in ("alone", "shards"))
    assert shards["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert alone["losses"][-1] < alone["losses"][0]
    assert alone["held"] >= 1
    assert shards["held"] < 0.65
