"""Writing tensors: the bytes of safetensors' own writer, hashed; what a killed run wrote is kept if it is right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from paddock.config_parts import ShardPart
from paddock.errors import OutputError
from paddock.shard_tasks import at_a_time, write_shards
from paddock.shards import Shard, in_order, kept, progress, write_shard
from paddock.weights import DTYPES, TensorInfo


class Given:
    """Tensors as they are, in two pieces each."""

    def __init__(self, tensors: dict[str, torch.Tensor], memory: int = 0) -> None:
        self.tensors, self.each, self.asked = tensors, memory, list[str]()

    def pieces(self, name: str, said: dict[str, Any]) -> Iterator[torch.Tensor]:
        self.asked.append(name)
        yield from (self.tensors[name][:1], self.tensors[name][1:])
        said[name] = 7

    def memory(self, name: str) -> int:
        return self.each

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}


def test_shard_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {f"{name}.{n}": torch.ones(n, 3).to(dtype) for name, dtype in DTYPES.items() for n in (1, 2)}
    tensors["a.transposed"] = torch.arange(6.0).reshape(2, 3).T
    source = Given(tensors)
    shard = Shard(tmp_path / "ours", tmp_path / "note", source.infos)
    done = write_shard(shard, source)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert done.sha256 == hashlib.sha256((tmp_path / "theirs").read_bytes()).hexdigest()
    assert done.said == dict.fromkeys(tensors, 7)
    assert kept(shard) == done
    assert progress(shard) == (shard.bytes, len(tensors))


def test_what_is_right_is_kept_and_only_the_rest_written(tmp_path: Path) -> None:
    tensors = {f"layers.{n}": torch.full((2, 3), float(n)) for n in range(4)}
    plan = {f"{n}.safetensors": [f"layers.{n}"] for n in range(4)}

    def write() -> tuple[list[str], dict[str, Any]]:
        source = Given(tensors)
        written = write_shards(source, plan, source.infos, tmp_path, tmp_path / "notes", ShardPart(), what="test")
        return source.asked, written

    asked, first = write()
    assert asked == list(tensors)
    whole = {file: (tmp_path / file).read_bytes() for file in plan}
    assert write() == ([], first)
    (tmp_path / "0.safetensors").write_bytes(whole["0.safetensors"][:-1] + b"x")  # a bit flipped
    (tmp_path / "1.safetensors").write_bytes(whole["1.safetensors"][:-1])  # cut off
    (tmp_path / "2.safetensors").unlink()
    asked, again = write()
    assert (asked, again) == (["layers.0", "layers.1", "layers.2"], first)
    assert {file: (tmp_path / file).read_bytes() for file in plan} == whole


def test_full_disk_is_one_line() -> None:
    source = Given({"a": torch.ones(2**20)})
    with pytest.raises(OutputError, match="No space left on device") as caught:
        write_shard_to_full_disk(source)
    assert "\n" not in str(caught.value)


def write_shard_to_full_disk(source: Given) -> None:
    """/dev/full takes nothing: a shard whose file it is."""

    class Full(Shard):
        @property
        def unfinished(self) -> Path:
            return Path("/dev/full")

    from paddock import shard_tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_tasks, "Shard", Full)
        place = Path("/tmp")
        write_shards(source, {"a": ["a"]}, source.infos, place, place, ShardPart(), what="test")


def test_as_many_at_a_time_as_memory_has_room_for() -> None:
    gib = 2**30
    shards = [Shard(Path(f"{n}"), Path(f"{n}.note"), {f"{n}": TensorInfo((gib,), torch.float16)}) for n in range(7)]

    def number(memory: int, **how: Any) -> int:
        return at_a_time(ShardPart(**how), shards, Given({}, memory))

    assert number(0) > number(gib // 2) > number(2 * gib) == 1
    assert number(0, memory_gib=64) == 7
    assert number(0, memory_gib=0.1) == 1
    assert number(2 * gib, num_workers=3) == 3
    tiny = [Shard(Path("a"), Path("b"), {"x": TensorInfo((8,), torch.float16)})] * 9
    assert at_a_time(ShardPart(), tiny, Given({})) == 1


def test_layers_are_in_the_order_of_their_numbers() -> None:
    names = [f"model.layers.{n}.weight" for n in (10, 2, 0)]
    assert in_order(names) == [f"model.layers.{n}.weight" for n in (0, 2, 10)]
