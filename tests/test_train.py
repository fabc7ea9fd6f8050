"""The loop: its loss means what it says, it goes on where it was, and it refuses before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from paddock import checkpoint, lora, manifest, packing, train
from paddock.config import LoraPart, ModelConfig, TrainConfig, build
from paddock.data import read_rows, write_records
from paddock.errors import ConfigError, DataError, ModelError, OutputError, ResourceError
from paddock.loss import SupervisedLoss
from paddock.train_plan import plan_text


@pytest.fixture
def tree(demo_tree: dict[str, Any], base_model: Path, assets: Path, tmp_path: Path) -> dict[str, Any]:
    """jobs/configs/demo.yaml on the session's model, four steps of short blocks."""
    demo_tree |= {"output_dir": str(tmp_path / "run"), "model": {"path": str(base_model)}, "demo_assets": None}
    demo_tree["data"] = {"train": str(assets / "data" / "train.json"), "dev": str(assets / "data" / "dev.json")}
    demo_tree["lora"] = {"r": 2, "lora_dropout": 0.1, "modules_to_save": ["lm_head"]}
    demo_tree["train"] |= {"max_seq_length": 512, "max_steps": 4, "save_steps": 2, "eval_steps": 4, "logging_steps": 1}
    demo_tree["scaling"]["resources_per_worker"] = {"CPU": 0.5}
    return demo_tree


def _supervised_loss(base_model: Path) -> SupervisedLoss:
    torch.manual_seed(0)
    return SupervisedLoss(lora.attach(lora.load_base(ModelConfig(path=str(base_model))), LoraPart(r=2)))


@pytest.fixture
def blocks(base_model: Path, assets: Path, tmp_path: Path) -> packing.PackedBlocks:
    rows = read_rows(assets / "data" / "dev.json")
    template = packing.Template("问：\n{input}\n答：\n")
    packing.pack(lora.load_tokenizer(base_model), template, rows, 512, tmp_path / "blocks.parquet")
    return packing.PackedBlocks(tmp_path / "blocks.parquet")


def test_the_loss_is_the_sum_over_supervised_tokens(base_model: Path, blocks: packing.PackedBlocks) -> None:
    loss = _supervised_loss(base_model)
    batch = blocks.batch([0, 1])
    logits = loss.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert loss(**batch).item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_is_the_same_however_it_is_split(
    base_model: Path, blocks: packing.PackedBlocks, tree: dict[str, Any], size: int
) -> None:
    chosen = [0, 1, 2, 3]
    supervised = sum(blocks.supervised_tokens[b] for b in chosen)

    def gradients(size: int) -> tuple[float, list[torch.Tensor]]:
        loss = _supervised_loss(base_model)
        tree["train"]["per_device_train_batch_size"] = size
        value = train._step(loss, blocks, chosen, supervised, build(TrainConfig, tree), world=1)
        return value, [p.grad for p in loss.parameters() if p.grad is not None]

    whole, split = gradients(4), gradients(size)
    assert split[0] == pytest.approx(whole[0], rel=1e-6)
    for one, other in zip(whole[1], split[1], strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-4)


def test_the_runs_identity_is_the_steps_batch_not_its_split(tree: dict[str, Any]) -> None:
    def identity(workers: int, size: int, accumulation: int) -> dict[str, Any]:
        tree["scaling"]["num_workers"] = workers
        tree["train"] |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        return train.run_config(build(TrainConfig, tree))

    assert identity(1, 1, 4) == identity(2, 2, 1) == identity(4, 1, 1)
    assert identity(1, 1, 4) != identity(1, 1, 2)


def test_a_run_is_identified_by_what_its_inputs_say(tree: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "template.txt"
    tree["prompt"] = {"template": str(file)}

    def inputs(text: str) -> dict[str, str]:
        file.write_text(text, encoding="utf-8")
        return train.check(build(TrainConfig, tree))

    assert inputs("Q: {input}\n") != inputs("A: {input}\n")


def test_a_plan_tells_what_would_be_done(tree: dict[str, Any]) -> None:
    tree["train"]["max_seq_length"] = 40
    text = plan_text(build(TrainConfig, tree))
    assert "of 2400" in text
    assert "4 of 2 blocks on 2 worker(s)" in text
    assert "PromptCBLUE allows 1%" in text
    assert "IMCS-V2-MRG" in text  # the longest rows do not fit
    assert not Path(tree["output_dir"]).exists()


class TestRefusals:
    """Each before Ray is asked, and with nothing written."""

    def _refused(self, tree: dict[str, Any], error: type[Exception], says: str) -> None:
        with pytest.raises(error, match=says) as told:
            train.train(build(TrainConfig, tree))
        assert "\n" not in str(told.value)
        assert not Path(tree["output_dir"]).exists()

    def test_no_training_file(self, tree: dict[str, Any]) -> None:
        tree["data"]["train"] = None
        self._refused(tree, ConfigError, "data.train: is required")

    def test_a_missing_target(self, tree: dict[str, Any], tmp_path: Path) -> None:
        rows = read_rows(tree["data"]["train"])
        write_records(tmp_path / "x.json", [rows[0].as_record(), replace(rows[1], target="").as_record()])
        tree["data"]["train"] = str(tmp_path / "x.json")
        self._refused(tree, DataError, r"x\.json:2: the target is missing")

    def test_a_base_without_config(self, tree: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        tree["model"]["path"] = str(tmp_path / "empty")
        self._refused(tree, ModelError, r"no config\.json")

    def test_a_misspelt_lora_key(self, tree: dict[str, Any]) -> None:
        tree["lora"]["lora_alfa"] = 1
        self._refused(tree, ConfigError, "did you mean 'lora_alpha'")

    def test_too_few_cpus(self, tree: dict[str, Any], ray_cluster: Any) -> None:
        tree["scaling"] = {"num_workers": 3}
        self._refused(tree, ResourceError, r"training needs 3 x 1 CPU, .* the cluster has 1 node of 2 CPU")

    def test_no_gpu(self, tree: dict[str, Any], ray_cluster: Any) -> None:
        tree["scaling"] = {"num_workers": 1, "use_gpu": True}
        self._refused(tree, ResourceError, r"training needs 1 x 1 CPU \+ 1 GPU, .* the cluster has 1 node of 2 CPU")


def test_two_workers_train_stop_and_go_on_exactly(
    tree: dict[str, Any], ray_cluster: Any, base_model: Path, copy_of: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    config = build(TrainConfig, tree)
    last = train.train(config)
    assert last == Path(config.output_dir) / "checkpoint-4"
    assert checkpoint.steps(config.output_dir) == [2, 4]
    assert manifest.verify(last).kind == "checkpoint"
    assert manifest.verify(Path(config.output_dir) / "packed").kind == "packed"
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses[4] < losses[1]
    assert lines[-1]["dev_loss"] > 0
    PeftModel.from_pretrained(lora.load_base(config.model), last)
    weights = (last / "adapter_model.safetensors").read_bytes()

    # The same again does nothing; another configuration is refused.
    train.train(config)
    assert "nothing to do" in capfd.readouterr().out
    tree["train"]["learning_rate"] = 1.0
    with pytest.raises(OutputError, match=r"train\.learning_rate was 0\.\d+ and is now 1\.0"):
        train.train(build(TrainConfig, tree))

    # A run that lost its last checkpoint ends where the uninterrupted one did, bit for bit.
    (last / "adapter_model.safetensors").write_bytes(weights[:-1])
    assert train.train(config) == last
    assert (last / "adapter_model.safetensors").read_bytes() == weights
