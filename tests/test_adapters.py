"""Names become directories without ever becoming paths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from paddock.adapters import AdapterDirectory
from paddock.errors import ConfigError, ModelError, UnknownAdapterError


@pytest.fixture
def adapters(assets: Path, tmp_path: Path) -> AdapterDirectory:
    model = AutoModelForCausalLM.from_pretrained(assets / "base", dtype=torch.float32)
    for name in ("one", "..two"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "in" / name)
    shutil.copytree(tmp_path / "in" / "one", tmp_path / "outside")
    (tmp_path / "in" / "empty").mkdir()
    return AdapterDirectory(tmp_path / "in", assets / "base")


def test_only_what_lies_there_has_a_name(adapters: AdapterDirectory) -> None:
    assert adapters.names() == ["one"]
    for name in (
        "../outside",
        str(adapters.root / "one"),
        "one/",
        "./one",
        "empty",
        "..two",
        "",
        ".",
        "one\x00",
        "One",
    ):
        with pytest.raises(UnknownAdapterError):
            adapters.open(name)


def test_what_is_opened_is_a_copy_that_outlives_the_original(adapters: AdapterDirectory) -> None:
    copy = adapters.open("one")
    assert copy == adapters.open("one")
    assert not copy.is_relative_to(adapters.root)
    shutil.rmtree(adapters.root / "one")
    with pytest.raises(UnknownAdapterError):
        adapters.open("one")
    assert (copy / "adapter_model.safetensors").is_file()
    adapters.close()
    assert not copy.exists()


def test_a_change_is_another_copy(adapters: AdapterDirectory) -> None:
    first = adapters.open("one")
    config = adapters.root / "one" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'), encoding="utf-8")
    assert adapters.open("one") != first


def test_an_adapter_of_a_grown_vocabulary_is_refused(assets: Path, tmp_path: Path) -> None:
    shutil.copytree(assets / "adapters", tmp_path / "grown")
    adapters = AdapterDirectory(tmp_path / "grown", assets / "base")
    for name in adapters.names():
        with pytest.raises(ModelError, match=rf"adapter '{name}': .*merge it") as caught:
            adapters.open(name)
        assert str(tmp_path) not in str(caught.value)


def test_a_directory_that_is_not_there_is_refused(assets: Path) -> None:
    for root in ("/nowhere", "s3://bucket/adapters"):
        with pytest.raises(ConfigError, match=r"serve\.adapters: .* no such directory"):
            AdapterDirectory(root, assets / "base")
