"""Reading and writing tensors: the bytes of safetensors' own writer, and nothing unpickled."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from paddock.errors import ModelError
from paddock.weights import DTYPES, TensorInfo, Weights, in_order, open_adapter, open_model, write_shard


class Touch:
    """Unpickled, it would leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_shard_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {f"{name}.{n}": torch.ones(n, 3).to(dtype) for name, dtype in DTYPES.items() for n in (1, 2)}
    tensors["a.transposed"] = torch.arange(6.0).reshape(2, 3).T
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_shard(tmp_path / "ours", infos, tensors.__getitem__)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


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


def test_layers_are_in_the_order_of_their_numbers() -> None:
    names = [f"model.layers.{n}.weight" for n in (10, 2, 0)]
    assert in_order(names) == [f"model.layers.{n}.weight" for n in (0, 2, 10)]
