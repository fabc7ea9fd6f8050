"""Reading tensors: nothing is unpickled, nothing outside the directory is read."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from paddock.errors import ModelError
from paddock.weights import DTYPES, Weights, open_adapter, open_model


class Touch:
    """Unpickled, it would leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_tensor_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    content = {"weight": torch.ones(2), "code": Touch(tmp_path / "ran")}
    file = tmp_path / "adapter_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="more than tensors"):
        open_adapter(tmp_path)
    file.write_bytes(pickle.dumps(content["code"]))
    with pytest.raises(ModelError):
        open_adapter(tmp_path)
    torch.save({"weight": torch.ones(2), "epoch": 3}, file)
    with pytest.raises(ModelError, match="'epoch' is int"):
        open_adapter(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_old_format_bin_is_read(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=False)
    assert open_adapter(tmp_path).read("weight").tolist() == [1, 1]


def test_pickled_source_opens_the_files_itself(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    source = open_model(tmp_path)
    source.read("weight")
    again: Weights = pickle.loads(pickle.dumps(source))
    assert again.infos == source.infos
    assert again.read("weight").tolist() == [1, 1]


@pytest.mark.parametrize("named", ["../outside.safetensors", "missing.safetensors", 3])
def test_index_names_files_beside_it(tmp_path: Path, named: Any) -> None:
    (tmp_path / "model").mkdir()
    save_file({"weight": torch.ones(2)}, tmp_path / "outside.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": named}}))
    with pytest.raises(ModelError, match="not a file beside it"):
        open_model(tmp_path / "model")
    index.write_text("{}")
    with pytest.raises(ModelError, match="no weight_map"):
        open_model(tmp_path / "model")


def test_rows_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    tensors = {f"{dtype}": torch.arange(24).reshape(6, 2, 2).to(dtype) for dtype in DTYPES.values()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    weights = open_model(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name), tensor)
        for start, stop in ((0, 6), (0, 1), (2, 5), (5, 9), (3, 3)):
            assert torch.equal(weights.rows(name, start, stop), tensor[start:stop])


def test_file_that_is_cut_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 2**12)}, tmp_path / "model.safetensors")
    weights = open_model(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 2**15)
    assert weights.rows("a", 0, 1).sum() == 2**12
    with pytest.raises(ModelError, match="was cut while it was read"):
        weights.rows("a", 3, 4)
