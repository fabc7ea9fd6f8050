"""Models of the hub, out of huggingface_hub's cache, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from paddock import hub, manifest
from paddock.config import MergeConfig, build
from paddock.errors import ModelError
from paddock.merge import merge
from tests.merge_lab import Lab


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place))
    hub._snapshot.cache_clear()
    return place


def put(cache: Path, name: str, directory: Path) -> Path:
    """Lay a directory into the cache as huggingface_hub does."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(directory, repository / "snapshots" / commit))


def test_base_and_adapter_by_name(tmp_path: Path, cache: Path) -> None:
    lab = Lab(tmp_path)
    base = lab.base()
    adapter = lab.adapter(base, "adapter")
    put(cache, "someone/base", base)
    put(cache, "someone/adapter", adapter)
    tree = {"base_model": "someone/base", "lora_model": "someone/adapter", "output_dir": str(tmp_path / "out")}
    found = merge(build(MergeConfig, tree))
    expected = lab.merge(base, adapter, name="expected")
    assert manifest.check(found).hash != manifest.check(expected).hash  # their cards name other bases
    for file in ("model.safetensors", "config.json"):
        assert (Path(found) / file).read_bytes() == (expected / file).read_bytes()
    assert "Base: `someone/base`" in (Path(found) / "README.md").read_text()


def test_path_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {"base_model": "models/x", "output_dir": "out"}
    assert build(MergeConfig, tree).base_model == "hf://models/x"
    (tmp_path / "models" / "x").mkdir(parents=True)
    assert build(MergeConfig, tree).base_model == str(tmp_path / "models" / "x")
    assert build(MergeConfig, {**tree, "base_model": "models/x/y"}).base_model == str(tmp_path / "models" / "x" / "y")


@pytest.mark.parametrize("name", ["someone/nothing", "someone/base@v2", "a--b/.."])
def test_what_is_nowhere_is_one_line(cache: Path, name: str) -> None:
    with pytest.raises(ModelError, match="no such directory") as caught:
        hub.local(f"hf://{name}")
    assert "\n" not in str(caught.value)
