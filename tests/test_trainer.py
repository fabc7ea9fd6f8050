"""Around the loop: what identifies a run, what is refused before it starts, what a plan tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paddock import trainer
from paddock.config import TrainConfig, build
from paddock.data import read_rows, write_records
from paddock.errors import ConfigError, DataError, ModelError, ResourceError
from paddock.train_plan import plan_text


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

    def test_too_few_cpus(self, train_tree: dict[str, Any], ray_cluster: Any) -> None:
        train_tree["scaling"] = {"num_workers": 3}
        self._refused(train_tree, ResourceError, "training needs 3 CPU, the cluster has 2")

    def test_no_gpu(self, train_tree: dict[str, Any], ray_cluster: Any) -> None:
        train_tree["scaling"] = {"num_workers": 1, "use_gpu": True}
        self._refused(train_tree, ResourceError, "training needs 1 GPU, the cluster has 0")
