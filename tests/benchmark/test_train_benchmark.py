"""The training benchmark from end to end, tiny and on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from paddock.benchmark.train import TrainBenchmarkConfig, train
from paddock.benchmark.train_rows import make_rows, packed, padded
from paddock.config_parts import LoraPart, TrainPart

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_both_loops_learn_the_same(tmp_path: Path) -> None:
    config = TrainBenchmarkConfig(
        output_dir=str(tmp_path),
        llama={"vocab_size": 600, "initializer_range": 0.1, **SHAPE},
        lora=LoraPart(r=4),
        train=TrainPart(learning_rate=0.01, max_steps=4, max_seq_length=256, per_device_train_batch_size=2),
        longest_row=128,
        plain_batch_sizes=(2, 4),
        scan_rows=8,
        dev_rows=16,
        variants=("bf16",),
    )
    train(config)
    (file,) = tmp_path.glob("train-*.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["summary"].keys() == {"speedup_vs_plain", "tokens_per_s", "mfu_4n", "loss_gap"}
    assert found["summary"]["loss_gap"] < 0.01
    curves = [row["loss_curve"] for row in found["rows"] if "loss_curve" in row]
    assert len(curves) == 2
    assert torch.allclose(*map(torch.tensor, curves), rtol=0.01)
    assert curves[0][-1] != curves[0][0]


def test_packed_and_padded_hold_the_same_rows() -> None:
    rows = make_rows(6, 600, 64, seed=1)
    one, other = packed([rows[:3], rows[3:]], 200), padded(rows)
    assert (one["labels"] >= 0).sum() == (other["labels"] >= 0).sum() > 0
    assert one["input_ids"].shape == (2, 200)
    assert int(other["attention_mask"].sum()) == sum(len(row.input_ids) for row in rows)
    assert make_rows(6, 600, 64, seed=1) == rows
