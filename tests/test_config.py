"""The configuration tree: what it accepts, what it says about mistakes, what counts for the hash."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from paddock.config import DemoConfig, MergeConfig, PredictConfig, ServeConfig, TrainConfig, describe, load
from paddock.errors import ConfigError

NEEDED = ["output_dir=run", "model.path=base"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learning_rat=1", "train.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("trian.max_steps=1", "trian: unknown key; did you mean 'train'?"),
        ("train.max_steps=0", "train.max_steps: value error, should be at least 1, or -1"),
        ("scaling.num_workers=[3,2]", "scaling.num_workers: value error, should be a number of at least 1, or [min"),
        ("train.max_steps=many", "train.max_steps: input should be a valid integer"),
        ("train.lr_scheduler_type=cosin", "found 'cosin'"),
        ("train", "an override is key.sub=value"),
        ("output_dir.x=1", "'output_dir' is a value"),
    ],
)
def test_a_mistake_is_one_line(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as told:
        load(TrainConfig, None, [*NEEDED, override])
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_a_misspelt_key_comes_before_the_key_that_it_should_have_been() -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.pth: unknown key; did you mean 'path'\?; .*model\.path: is required"
    ):
        load(TrainConfig, None, ["output_dir=run", "model.pth=base"])


def test_a_file_that_is_missing_or_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(TrainConfig, tmp_path / "no.yaml")
    for text, says in (("- a", "mapping of keys"), ("a: [", "not YAML")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match=says):
            load(TrainConfig, tmp_path / "x.yaml")


def test_overrides_lie_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("output_dir: run\nmodel: {path: base}\ntrain: {learning_rate: 1e-3, seed: 7}\n")
    config = load(TrainConfig, file, ["train.learning_rate=2e-4", "lora.r=4", "lora.use_rslora=true"])
    assert (config.train.learning_rate, config.train.seed, config.lora.r) == (2e-4, 7, 4)
    assert config.lora.model_extra == {"use_rslora": True}
    assert config.lora.lora_alpha == 32


def test_relative_paths_are_of_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(MergeConfig, None, ["base_model=b", "lora_model=x,s3://bucket/y", "output_dir=~/m"])
    assert config.base_model == str(tmp_path / "b")
    assert config.lora_model == (str(tmp_path / "x"), "s3://bucket/y")
    assert config.output_dir == os.path.expanduser("~/m")


def test_output_dir_decides_the_paths_under_it() -> None:
    config = load(TrainConfig, None, ["output_dir=/a/run", "model.path=${output_dir}/base"])
    assert config.model.path == "/a/run/base"


class TestSubmitted:
    """Under `ray job submit` the working directory is a copy that vanishes."""

    @pytest.fixture(autouse=True)
    def _submitted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")

    def test_relative_paths_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"output_dir: 'run' is relative.*storage_path=DIR_OR_URI"):
            load(TrainConfig, None, NEEDED)

    def test_storage_path_holds_them(self) -> None:
        assert load(TrainConfig, None, [*NEEDED, "storage_path=/data"]).model.path == "/data/base"
        assert load(TrainConfig, None, [*NEEDED, "storage_path=s3://b/"]).output_dir == "s3://b/run"

    def test_absolute_paths_need_none(self) -> None:
        assert load(TrainConfig, None, ["output_dir=/r", "model.path=/b"]).output_dir == "/r"


def test_a_files_storage_path_is_for_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.yaml"
    file.write_text("output_dir: run\nmodel: {path: base}\nstorage_path: /data\n")
    assert load(TrainConfig, file).output_dir == str(tmp_path / "run")
    assert load(TrainConfig, file, ["storage_path=/here"]).output_dir == "/here/run"


@pytest.mark.parametrize(
    "override",
    [
        "prompt.template=x.txt",
        "scaling.num_workers=2",
        "scaling.max_failures=9",
        "train.logging_steps=1",
        "storage_path=/x",
        "data.train=/y",
    ],
)
def test_how_and_where_are_not_hashed(override: str) -> None:
    assert load(TrainConfig, None, NEEDED).hashed() == load(TrainConfig, None, [*NEEDED, override]).hashed()


@pytest.mark.parametrize(
    "override",
    ["train.learning_rate=1", "lora.r=2", "lora.use_dora=true", "data.format=alpaca"],
)
def test_what_changes_the_result_is_hashed(override: str) -> None:
    assert load(TrainConfig, None, NEEDED).hashed() != load(TrainConfig, None, [*NEEDED, override]).hashed()


def test_a_prediction_starts_the_service_that_it_describes() -> None:
    config = load(PredictConfig, None, [*NEEDED, "model.dtype=float32", "serve.engine.max_model_len=99"])
    assert config.service() == ServeConfig(model=config.model.path, engine={"dtype": "float32", "max_model_len": 99})


def test_a_key_below_a_default_leaves_its_siblings() -> None:
    serve = load(ServeConfig, None, ["model=m", "autoscaling.max_replicas=4"])
    assert serve.autoscaling == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 64}
    demo = load(DemoConfig, None, [*NEEDED, "serve.engine.dtype=float32", "predict.sampling.max_tokens=7"])
    assert demo.serve.engine == {"max_model_len": 4096, "dtype": "float32"}
    assert demo.serve.ray_actor_options == {"num_cpus": 0.5}
    assert demo.predict.sampling.model_extra == {"max_tokens": 7, "min_tokens": 2}
    sampling = load(ServeConfig, None, ["model=m", "sampling.max_tokens=5"]).sampling
    assert (sampling.preset, sampling.model_extra) == ("reference", {"max_tokens": 5})


@pytest.mark.parametrize("name", ["2026-11-24", "0123", "12:30", "no", "1_000", "7", "1e3x"])
def test_a_name_that_yaml_would_read_as_something_else_stays_a_name(name: str) -> None:
    assert Path(load(TrainConfig, None, [f"output_dir=/r/{name}", "model.path=b"]).output_dir).name == name
    config = load(ServeConfig, None, ["model=m", f"served_model_name={name}"])
    assert config.served_model_name == name


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("-3", -3), ("0.5", 0.5), ("true", True), ("null", None), ("[1, a]", [1, "a"])]
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    found = load(ServeConfig, None, ["model=m", f"engine.x={text}"]).engine["x"]
    assert (type(found), found) == (type(value), value)


def test_a_template_file_is_a_path_and_a_template_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(TrainConfig, None, [*NEEDED, "prompt.template=my.txt"]).prompt.template == str(tmp_path / "my.txt")
    assert load(TrainConfig, None, [*NEEDED, "prompt.template=alpaca"]).prompt.template == "alpaca"


def test_help_shows_values_not_how_they_are_made() -> None:
    text = "\n".join(describe(DemoConfig))
    assert "Undefined" not in text
    assert "serve.engine = {'max_model_len': 4096}" in text


@pytest.mark.parametrize("cls", [TrainConfig, MergeConfig, PredictConfig, ServeConfig])
def test_every_key_has_a_help(cls: Any) -> None:
    lines = list(describe(cls))
    assert lines
    assert all(line.split("\n")[1].strip() for line in lines)
