"""The loop: its loss means what it says, and neither deaths nor the number of workers change what it learns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from paddock import checkpoint, lora, manifest, packing
from paddock.config import LoraPart, ModelConfig, TrainConfig, build
from paddock.data import read_rows, write_records
from paddock.errors import ModelError, OutputError
from paddock.gradients import StepSum
from paddock.loss import SupervisedLoss
from paddock.train import evaluate
from paddock.trainer import train

WEIGHTS = "adapter_model.safetensors"


def _supervised_loss(base_model: Path) -> SupervisedLoss:
    torch.manual_seed(0)
    return SupervisedLoss(lora.attach(lora.load_base(ModelConfig(path=str(base_model))), LoraPart(r=2)))


@pytest.fixture
def blocks(base_model: Path, assets: Path, tmp_path: Path) -> packing.PackedBlocks:
    rows = read_rows(assets / "data" / "dev.json")
    template = packing.Template("问：\n{input}\n答：\n")
    tokens = packing.tokenise(lora.load_tokenizer(base_model), template, rows, 512)
    packing.write_blocks(tokens, 512, tmp_path / "blocks.parquet", by_task=True)
    return packing.PackedBlocks(tmp_path / "blocks.parquet")


def test_the_loss_is_the_sum_over_supervised_tokens(base_model: Path, blocks: packing.PackedBlocks) -> None:
    loss = _supervised_loss(base_model)
    batch = blocks.batch([0, 1])
    logits = loss.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert loss(**batch).item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_is_the_same_however_it_is_split(base_model: Path, blocks: packing.PackedBlocks, size: int) -> None:
    chosen = [0, 1, 2, 3]
    supervised = sum(blocks.supervised_tokens[b] for b in chosen)

    def steps(size: int) -> list[tuple[float, list[torch.Tensor]]]:
        model = _supervised_loss(base_model)
        sums = StepSum([p for p in model.parameters() if p.requires_grad])
        found = []
        for _ in range(2):  # what a step leaves behind would show in the next one
            for indices in packing.micro_batches(chosen, size):
                sums.add(model(**blocks.batch(indices)) / supervised)
            step = sums.finish(max_grad_norm=1e9)
            found.append((step.loss, [p.grad for p in sums.parameters if p.grad is not None]))
            for parameter in sums.parameters:
                parameter.grad = None
        return found

    for whole, split in zip(steps(4), steps(size), strict=True):
        assert split[0] == pytest.approx(whole[0], rel=1e-6)
        for one, other in zip(whole[1], split[1], strict=True):
            assert torch.allclose(one, other, atol=1e-6, rtol=1e-4)


def test_the_dev_loss_is_told_by_task_too(base_model: Path, blocks: packing.PackedBlocks) -> None:
    model = _supervised_loss(base_model)
    found = evaluate(model, blocks, 2, rank=0, world=1)
    task = blocks.tasks[0]
    members = [b for b, of in enumerate(blocks.tasks) if of == task]
    with torch.no_grad():
        alone = sum(model(**blocks.batch([b])).item() for b in members)
    counted = sum(blocks.supervised_tokens[b] for b in members)
    assert found["dev_loss_by_task"][task] == pytest.approx(alone / counted, rel=1e-5)
    assert found["dev_loss_by_task"].keys() == set(blocks.tasks)
    assert min(found["dev_loss_by_task"].values()) < found["dev_loss"] < max(found["dev_loss_by_task"].values())


def _curve(run: str) -> list[tuple[int, float]]:
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def _dev_losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["step"]: record["dev_loss"] for record in lines if "dev_loss" in record}


def _kill_a_worker(run: str, after: int) -> None:
    """SIGKILL a training process once the run has told of a step."""
    while not (Path(run) / "metrics.jsonl").exists() or len(_curve(run)) < after:
        time.sleep(0.02)
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    # Ray names its processes after what they run, and cuts the name.
    pids = [int(line.split()[0]) for line in listed.splitlines() if "ray::RayTrainWorker" in line]
    os.kill(max(pids), signal.SIGKILL)


def _with_workers(train_tree: dict[str, Any], run: Path, workers: int, accumulation: int) -> TrainConfig:
    train_tree["output_dir"] = str(run)
    train_tree["scaling"]["num_workers"] = workers
    train_tree["train"]["gradient_accumulation_steps"] = accumulation
    return build(TrainConfig, train_tree)


def test_workers_and_their_deaths_change_nothing(
    train_tree: dict[str, Any], ray_cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """2 workers x accumulation 2 that lose one of them; then their last checkpoint, and 1 goes on."""
    two = _with_workers(train_tree, tmp_path / "run", 2, 2)
    threading.Thread(target=_kill_a_worker, args=(two.output_dir, 3)).start()
    last = Path(train(two))
    weights, curve = (last / WEIGHTS).read_bytes(), _curve(two.output_dir)
    assert [step for step, _ in curve] == [1, 2, 3, 4]
    assert curve[-1][1] < curve[0][1]
    assert len(list((Path(two.output_dir) / "tensorboard").iterdir())) == 2  # an attempt each

    assert checkpoint.steps(two.output_dir) == [2, 4]
    assert manifest.verify(last).extra["metrics"]["dev_loss"] > 0
    PeftModel.from_pretrained(lora.load_base(two.model), last)

    # The same again does nothing; another configuration is refused.
    train(two)
    assert "nothing to do" in capfd.readouterr().out
    train_tree["train"]["learning_rate"] = 1.0
    with pytest.raises(OutputError, match=r"train\.learning_rate was 0\.\d+ and is now 1\.0"):
        train(build(TrainConfig, train_tree))

    # A run that lost its last checkpoint goes on from the one before it to the same end.
    (last / WEIGHTS).write_bytes(weights[:-1])
    first = (Path(two.output_dir) / "checkpoint-2" / "manifest.json").stat()
    train_tree["train"] |= {"learning_rate": two.train.learning_rate}
    train_tree["scaling"]["num_workers"] = 1
    assert train(build(TrainConfig, train_tree)) == last
    assert (last / WEIGHTS).read_bytes() == weights
    assert _curve(two.output_dir) == curve
    assert (Path(two.output_dir) / "checkpoint-2" / "manifest.json").stat() == first


@pytest.mark.slow
def test_any_number_of_workers_learns_the_same_from_the_start(
    train_tree: dict[str, Any], ray_cluster: Any, tmp_path: Path
) -> None:
    runs = [_with_workers(train_tree, tmp_path / f"run-{n}", n, 4 // n) for n in (1, 2, 4)]
    weights = {(Path(train(run)) / WEIGHTS).read_bytes() for run in runs}
    assert len(weights) == 1
    assert len({tuple(_curve(run.output_dir)) for run in runs}) == 1


def test_a_loss_that_is_no_number_stops_the_run_at_once(
    train_tree: dict[str, Any], ray_cluster: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    train_tree["train"] |= {"learning_rate": 1e30, "warmup_ratio": 0}
    train_tree["scaling"]["num_workers"] = 1
    with pytest.raises(
        ModelError, match=r"step 2: the (loss|gradient's norm) is (nan|inf).* rows in it: .*good checkp"
    ):
        train(build(TrainConfig, train_tree))
    assert "resuming" not in capfd.readouterr().out
    assert len(list((Path(train_tree["output_dir"]) / "tensorboard").iterdir())) == 1  # it was not tried again


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_job_goes_on_to_the_same_end(
    train_tree: dict[str, Any], root: Path, tmp_path: Path, job: Any, way: signal.Signals
) -> None:
    """The driver is killed after its third step, the next one after its sixth; a run beside it is left alone."""
    rows = read_rows(train_tree["data"]["train"])[:400]
    write_records(tmp_path / "train.json", [row.as_record() for row in rows])
    train_tree["data"]["train"] = str(tmp_path / "train.json")
    train_tree["train"] |= {"max_steps": 16, "save_steps": 4, "eval_steps": 2}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(train_tree))
    env = {**os.environ, "PYTHONPATH": f"{root / 'platform'}:{root}", "RAY_ADDRESS": "local"}

    def start(run: Path, *more: str) -> subprocess.Popen[bytes]:
        words = ["jobs.train", "--config", str(config), f"output_dir={run}", *more]
        return subprocess.Popen([sys.executable, "-m", *words], cwd=root, env=env)

    assert start(tmp_path / "whole").wait(300) == 0
    for after, workers in ((3, 2), (6, 1)):
        driver = start(tmp_path / "cut", f"scaling.num_workers={workers}")
        while not (tmp_path / "cut" / "metrics.jsonl").exists() or len(_curve(str(tmp_path / "cut"))) < after:
            assert driver.poll() is None
            time.sleep(0.02)
        driver.send_signal(way)
        assert driver.wait(60) == (-signal.SIGKILL if way == signal.SIGKILL else 128 + signal.SIGTERM)
    assert start(tmp_path / "cut").wait(300) == 0
    last = "checkpoint-16"
    assert (tmp_path / "cut" / last / WEIGHTS).read_bytes() == (tmp_path / "whole" / last / WEIGHTS).read_bytes()
    assert _curve(str(tmp_path / "cut")) == _curve(str(tmp_path / "whole"))
    assert _dev_losses(tmp_path / "cut") == pytest.approx(_dev_losses(tmp_path / "whole"), rel=1e-9)
