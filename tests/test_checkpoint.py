"""Checkpoints: the newest good one is found, a damaged one passed over, another run's refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from paddock import checkpoint, manifest
from paddock.errors import OutputError

CONFIG = {"train": {"seed": 1}}
INPUTS = {"model": "abc"}


def _write(run: Path, step: int) -> Path:
    return checkpoint.write(
        run,
        step,
        config=CONFIG,
        inputs=INPUTS,
        save_adapter=lambda directory: (directory / "adapter_model.safetensors").write_bytes(bytes([step])),
        state={"step": step, "tensor": torch.arange(3)},
        metrics={"dev_loss": 1.5},
    )


def test_the_newest_is_found_with_its_state(tmp_path: Path) -> None:
    assert checkpoint.find_last(tmp_path, CONFIG, INPUTS) is None
    for step in (100, 20, 3):
        _write(tmp_path, step)
    found = checkpoint.find_last(tmp_path, CONFIG, INPUTS)
    assert found == tmp_path / "checkpoint-100"
    state = checkpoint.read_state(found)
    assert state["step"] == 100
    assert state["tensor"].tolist() == [0, 1, 2]
    assert manifest.verify(found).extra == {"step": 100, "metrics": {"dev_loss": 1.5}}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_one_is_passed_over_aloud(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = _write(tmp_path, 1), _write(tmp_path, 2)
    file = bad / "adapter_model.safetensors"
    if damage == "flip":
        file.write_bytes(b"\xff")
    elif damage == "cut":
        file.write_bytes(b"")
    elif damage == "remove":
        file.unlink()
    else:
        (bad / manifest.NAME).write_text("{")
    assert checkpoint.find_last(tmp_path, CONFIG, INPUTS) == good
    assert "trying the checkpoint before it" in capsys.readouterr().out


def test_what_a_crash_left_does_not_exist(tmp_path: Path) -> None:
    good = _write(tmp_path, 1)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / ".checkpoint-3.partial").mkdir()
    assert checkpoint.find_last(tmp_path, CONFIG, INPUTS) == good
    assert _write(tmp_path, 2).name == "checkpoint-2"


def test_another_configurations_run_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    with pytest.raises(OutputError, match=r"another configuration: train\.seed was 1 and is now 2"):
        checkpoint.find_last(tmp_path, {"train": {"seed": 2}}, INPUTS)
    with pytest.raises(OutputError, match=r"input\.model"):
        checkpoint.find_last(tmp_path, CONFIG, {"model": "xyz"})


def test_the_oldest_go(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        _write(tmp_path, step)
    checkpoint.prune(tmp_path, None)
    assert checkpoint.steps(tmp_path) == [1, 2, 10]
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    checkpoint.prune(tmp_path, 0)
    assert checkpoint.steps(tmp_path) == []


def test_every_rng_is_what_the_position_makes_it() -> None:
    def drawn(step: int, index: int) -> tuple[float, float, float]:
        checkpoint.seed_micro_batch(42, step, index)
        return random.random(), np.random.random(), torch.rand(1).item()

    assert drawn(3, 1) == drawn(3, 1)
    assert len({drawn(3, 1), drawn(3, 2), drawn(4, 1)}) == 3
