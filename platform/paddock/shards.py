"""The safetensors shards of a model: planned, then written tensor by tensor and hashed on the way.

Shards follow Hugging Face's naming and the safetensors format (https://huggingface.co/docs/safetensors). A shard is
never in memory as a whole: each tensor comes as a sequence of pieces, some rows at a time.

A finished shard leaves a note of its hash in a directory beside the model, so that a run that was killed keeps the
shards whose hash is right and writes only the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from paddock.aside import let_go
from paddock.errors import ConfigError
from paddock.weights import DTYPES, TensorInfo, write_object

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Source(Protocol):
    """What a model's tensors are computed from. It can be pickled: each process reads the inputs itself."""

    def pieces(self, name: str, said: dict[str, Any]) -> Iterator[torch.Tensor]:
        """One tensor as its consecutive pieces. What the manifest is to say of it goes into `said[name]`."""
        ...

    def memory(self, name: str) -> int:
        """The bytes that `pieces` needs for one tensor at its peak."""
        ...


@dataclass(frozen=True)
class Shard:
    """A file that is to be written."""

    file: Path
    note: Path
    """Where its hash is noted once it is written."""
    infos: dict[str, TensorInfo]

    @property
    def bytes(self) -> int:
        return sum(info.bytes for info in self.infos.values())

    @property
    def unfinished(self) -> Path:
        """The file while it is being written."""
        return self.file.with_name(f".{self.file.name}.partial")


@dataclass(frozen=True)
class Written:
    """A shard that is on disk."""

    bytes: int
    sha256: str
    said: dict[str, Any]
    """What the manifest is to say of its tensors, by name."""


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order that shards are filled: numbers as numbers, whatever files they came from."""
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def plan_shards(infos: Mapping[str, TensorInfo], max_shard_size: str) -> dict[str, list[str]]:
    """File name -> tensor names, in Hugging Face's naming. Raises ConfigError for a size that is none."""
    try:
        split = split_state_dict_into_shards_factory(
            {name: infos[name] for name in in_order(infos)},
            get_storage_size=lambda info: info.bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError:
        raise ConfigError(f"max_shard_size: {max_shard_size!r} is not a size; write it as 2GB or 500MB") from None
    return {file: list(names) for file, names in split.filename_to_tensors.items()}


def write_shard(shard: Shard, source: Source) -> Written:
    """Write one shard: the bytes that safetensors' own writer makes. The file is there once it is whole."""
    said: dict[str, Any] = {}
    digest = hashlib.sha256()
    # Unbuffered: pieces are large already.
    with shard.unfinished.open("wb", buffering=0) as stream:
        header = _header(shard.infos)
        digest.update(header)
        end = _write(stream, memoryview(header), 0)
        for name in _layout(shard.infos):
            info, begin = shard.infos[name], end
            for piece in source.pieces(name, said):
                if piece.dtype != info.dtype:
                    raise AssertionError(f"{name}: planned {info}, computed {piece.dtype}")
                data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
                digest.update(data)
                end = _write(stream, data, end)
            if end - begin != info.bytes:
                raise AssertionError(f"{name}: planned {info}, computed {end - begin} bytes")
    done = Written(end, digest.hexdigest(), said)
    shard.unfinished.replace(shard.file)
    partial = shard.note.with_suffix(".partial")
    write_object(partial, asdict(done))
    partial.replace(shard.note)
    return done


def kept(shard: Shard) -> Written | None:
    """What an earlier run wrote of a shard, if its hash is right."""
    try:
        done = Written(**json.loads(shard.note.read_text(encoding="utf-8")))
        if shard.file.stat().st_size != done.bytes:
            return None
        with shard.file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError, TypeError):
        return None
    return done if found == done.sha256 else None


def progress(shard: Shard) -> tuple[int, int]:
    """Bytes and whole tensors of a shard that are on disk by now."""
    for file in (shard.file, shard.unfinished):
        try:
            size = file.stat().st_size - len(_header(shard.infos))
        except OSError:
            continue
        end, tensors = 0, 0
        for name in _layout(shard.infos):
            end += shard.infos[name].bytes
            tensors += end <= size
        return max(size, 0), tensors
    return 0, 0


def write_index(directory: Path, shards: Mapping[str, list[str]], infos: Mapping[str, TensorInfo]) -> None:
    """Write `model.safetensors.index.json` where there is more than one shard; the shards come first."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(info.bytes for info in infos.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    write_object(directory / "model.safetensors.index.json", index)


def _write(stream: io.FileIO, data: memoryview, begin: int) -> int:
    """Write bytes that begin at a place of the file; return where they end. The system may take some at a time."""
    end = begin
    while end - begin < len(data):
        end += stream.write(data[end - begin :]) or 0
    let_go(stream.fileno(), begin, end)
    return end


def _layout(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Names in the order in which safetensors' own writer lays them into a file: every tensor lies aligned."""
    layout = list(DTYPES.values())
    return sorted(infos, key=lambda name: (layout.index(infos[name].dtype), name))


def _header(infos: Mapping[str, TensorInfo]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in _layout(infos):
        info = infos[name]
        start, end = end, end + info.bytes
        header[name] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
