"""Around the loop: what identifies a run, what is refused before it starts, what a plan tells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from paddock import trainer
from paddock.config import TrainConfig, TrainPart, build
from paddock.data import read_rows, write_records
from paddock.errors import ConfigError, DataError, ModelError, OutputError, ResourceError
from paddock.train_plan import gpu_seconds, peak_bytes, plan_text


def test_the_runs_identity_is_the_steps_batch_not_its_split(train_tree: dict[str, Any]) -> None:
    def identity(workers: int, size: int, accumulation: int) -> dict[str, Any]:
        train_tree["scaling"]["num_workers"] = workers
        train_tree["train"] |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        return trainer.run_config(build(TrainConfig, train_tree))

    assert identity(1, 1, 4) == identity(2, 2, 1) == identity(4, 1, 1)
    assert identity(1, 1, 4) != identity(1, 1, 2)


def test_a_run_is_identified_by_what_its_inputs_say(train_tree: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "template.txt"
    train_tree["prompt"] = {"template": str(file)}

    def inputs(text: str) -> dict[str, str]:
        file.write_text(text, encoding="utf-8")
        return trainer.check(build(TrainConfig, train_tree))

    assert inputs("Q: {input}\n") != inputs("A: {input}\n")


def test_a_plan_tells_what_would_be_done(train_tree: dict[str, Any]) -> None:
    train_tree["train"]["max_seq_length"] = 40
    text = plan_text(build(TrainConfig, train_tree))
    assert "of 2400" in text
    assert "4 of 2 blocks on 2 worker(s)" in text
    assert "PromptCBLUE allows 1%" in text
    assert "IMCS-V2-MRG" in text  # the longest rows do not fit
    assert not Path(train_tree["output_dir"]).exists()


@pytest.mark.parametrize("variant", ["bf16", "fp8"])
def test_a_plans_memory_and_time_are_those_of_the_benchmark(root: Path, variant: str) -> None:
    measured = json.loads((root / "benchmarks" / "train-h200.json").read_text(encoding="utf-8"))
    rows = {row["what"]: row for row in measured["rows"]}
    ours, total = rows[f"ours, {variant}"], rows["plain"]["base_parameters"]
    keys = {"max_seq_length": ours["block_tokens"], "per_device_train_batch_size": ours["blocks"]}
    recipe = TrainPart.model_validate({**keys, "fp8": variant == "fp8"})
    shape = LlamaConfig(vocab_size=49954)  # otherwise LLaMA-7B's
    trainable = 8 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    supervised = ours["supervised_tokens_per_s"] / ours["tokens_per_s"]
    peak = peak_bytes(shape, recipe, size=2, total=total + trainable, trainable=trainable, supervised=supervised)
    assert peak / 2**30 == pytest.approx(ours["peak_memory_gib"], rel=0.15)
    assert 1 / gpu_seconds(total, 1, recipe) == pytest.approx(ours["tokens_per_s"], rel=0.15)


class TestRefusals:
    """Each before Ray is asked, and with nothing written."""

    def _refused(self, train_tree: dict[str, Any], error: type[Exception], says: str) -> None:
        with pytest.raises(error, match=says) as told:
            trainer.train(build(TrainConfig, train_tree))
        assert "\n" not in str(told.value)
        assert not Path(train_tree["output_dir"]).exists()

    def test_no_training_file(self, train_tree: dict[str, Any]) -> None:
        train_tree["data"]["train"] = None
        self._refused(train_tree, ConfigError, "data.train: is required")

    def test_a_missing_target(self, train_tree: dict[str, Any], tmp_path: Path) -> None:
        rows = read_rows(train_tree["data"]["train"])
        write_records(tmp_path / "x.json", [rows[0].as_record(), replace(rows[1], target="").as_record()])
        train_tree["data"]["train"] = str(tmp_path / "x.json")
        self._refused(train_tree, DataError, r"x\.json:2: the target is missing")

    def test_a_base_without_config(self, train_tree: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        train_tree["model"]["path"] = str(tmp_path / "empty")
        self._refused(train_tree, ModelError, r"no config\.json")

    def test_a_misspelt_lora_key(self, train_tree: dict[str, Any]) -> None:
        train_tree["lora"]["lora_alfa"] = 1
        self._refused(train_tree, ConfigError, "did you mean 'lora_alpha'")

    @pytest.mark.parametrize("other", ["load_in_4bit", "fsdp"])
    def test_two_ways_to_hold_the_base(self, train_tree: dict[str, Any], other: str) -> None:
        train_tree["train"] |= {"fp8": True, other: True}
        self._refused(train_tree, ConfigError, f"train.fp8: not together with train.{other}")

    def test_4_bits_without_a_gpu(self, train_tree: dict[str, Any], ray_cluster: Any) -> None:
        train_tree["train"]["load_in_4bit"] = True
        self._refused(train_tree, ConfigError, "train.load_in_4bit: needs a CUDA GPU for each worker")

    def test_shards_on_a_shared_gpu(self, train_tree: dict[str, Any], ray_cluster: Any) -> None:
        train_tree["train"]["fsdp"] = True
        train_tree["scaling"]["resources_per_worker"] = {"GPU": 0.5}
        self._refused(train_tree, ConfigError, "train.fsdp: needs a whole GPU for each worker")

    def test_too_few_cpus(self, train_tree: dict[str, Any], ray_cluster: Any) -> None:
        train_tree["scaling"] = {"num_workers": 3}
        self._refused(train_tree, ResourceError, r"training needs 3 x 1 CPU, .* the cluster has 1 node of 2 CPU")

    def test_no_gpu(self, train_tree: dict[str, Any], ray_cluster: Any) -> None:
        train_tree["scaling"] = {"num_workers": 1, "use_gpu": True}
        self._refused(
            train_tree, ResourceError, r"training needs 1 x 1 CPU \+ 1 GPU, .* the cluster has 1 node of 2 CPU"
        )


class TestBegin:
    """What run.json says of a run, compared when it goes on."""

    def _begin(self, tree: dict[str, Any], workers: Any = 2, accumulation: int = 1) -> int:
        tree["scaling"]["num_workers"] = workers
        tree["train"]["gradient_accumulation_steps"] = accumulation
        identity = trainer.begin(build(TrainConfig, tree), {"model": "abc"})
        return int(identity["train"]["global_batch_size"])

    def _checkpoint(self, tree: dict[str, Any]) -> None:
        directory = Path(tree["output_dir"]) / "checkpoint-2"
        directory.mkdir(parents=True)
        (directory / "manifest.json").write_text("{}")

    def test_a_run_keeps_its_batch_on_other_workers(
        self, train_tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self._begin(train_tree) == 2
        self._checkpoint(train_tree)
        assert self._begin(train_tree, 1) == 2
        assert "begun with 2 worker(s); its steps stay 2 blocks" in capsys.readouterr().out
        assert self._begin(train_tree, [1, 4]) == 2
        assert self._begin(train_tree, 1, accumulation=2) == 2
        for workers, accumulation in ((2, 2), (1, 4)):
            with pytest.raises(OutputError, match=r"train\.global_batch_size was 2 and is now 4"):
                self._begin(train_tree, workers, accumulation)

    def test_a_run_without_a_checkpoint_starts_afresh(self, train_tree: dict[str, Any]) -> None:
        assert self._begin(train_tree) == 2
        assert self._begin(train_tree, accumulation=3) == 6
        self._checkpoint(train_tree)
        assert self._begin(train_tree, 1, accumulation=3) == 6

    def test_how_often_it_saves_is_no_part_of_it(self, train_tree: dict[str, Any]) -> None:
        self._begin(train_tree)
        self._checkpoint(train_tree)
        train_tree["train"] |= {"save_steps": 1, "save_total_limit": 3, "eval_steps": 7, "keep_best": True}
        self._begin(train_tree)
        with pytest.raises(OutputError, match=r"input\.model was"):
            trainer.begin(build(TrainConfig, train_tree), {"model": "another base"})


def test_epochs_become_steps(train_tree: dict[str, Any]) -> None:
    train_tree["train"] |= {"max_steps": -1, "num_train_epochs": 2.5}
    assert trainer.steps_of(build(TrainConfig, train_tree), blocks=10, batch=4) == 7
    train_tree["train"]["max_steps"] = 3
    assert trainer.steps_of(build(TrainConfig, train_tree), blocks=10, batch=4) == 3
