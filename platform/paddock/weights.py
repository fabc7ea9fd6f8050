"""Model directories on disk. Tensors are read one at a time from a Hugging Face or PEFT directory and
written as safetensors shards; JSON files stand beside them.

A directory's tensors are known by name, shape and dtype before any of them is read. Files are safetensors,
or `.bin`/`.pth` that `torch.load(weights_only=True)` can read: nothing is ever unpickled. Written shards
follow Hugging Face's naming and the safetensors format (https://huggingface.co/docs/safetensors), tensor
by tensor, so that a shard is never in memory as a whole.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from paddock.errors import ConfigError, ModelError

# In the order in which safetensors' own writer lays types into a file, so that every tensor lies aligned.
DTYPES: Mapping[str, torch.dtype] = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The tensors of one directory, read lazily. It can be pickled: each process opens the files itself."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises ModelError for a file that is unreadable or holds anything but tensors."""
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            for name, info in _infos(self._handle(file)):
                if name in self.infos:
                    raise ModelError(f"{file}: tensor {name} stands already in {self._files[name].name}")
                self.infos[name], self._files[name] = info, file

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it is on disk (memory-mapped where the file allows it)."""
        handle = self._handle(self._files[name])
        tensor: torch.Tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        return tensor

    def file(self, name: str) -> Path:
        """The file that a tensor is in: what an error about it names."""
        return self._files[name]

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = load_tensors(file) if file.suffix in (".bin", ".pth") else _safetensors(file)
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def open_model(directory: Path) -> Weights:
    """The weights of a Hugging Face directory: one file, or the shards of its index."""
    return _open(directory, MODEL_FILES)


def open_adapter(directory: Path) -> Weights:
    """The weights of a PEFT adapter directory."""
    return _open(directory, ADAPTER_FILES)


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """A `.bin` or `.pth` of tensors, memory-mapped. Raises ModelError where it holds anything else."""
    try:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format from before 1.6 cannot be mapped
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{file}: holds more than tensors, which Paddock does not load; save its state dict alone,"
            " or as safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"{file}: unreadable ({one_line(error)}); get the file again") from None
    if not isinstance(tensors, dict):
        raise ModelError(f"{file}: holds a {type(tensors).__name__}, not a dictionary of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ModelError(f"{file}: entry {name!r} is {type(tensor).__name__}, not a tensor; remove it")
    return tensors


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


def write_shard(file: Path, infos: Mapping[str, TensorInfo], tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Write one safetensors file, asking for one tensor at a time: the bytes that safetensors' own writer makes."""
    layout = list(DTYPES.values())
    names = sorted(infos, key=lambda name: (layout.index(infos[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        info = infos[name]
        start, end = end, end + info.bytes
        dtype = _DTYPE_NAMES[info.dtype]
        header[name] = {"dtype": dtype, "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor, info = tensor_of(name), infos[name]
            if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
                raise AssertionError(f"{name}: planned {info}, computed {tensor.shape} {tensor.dtype}")
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_index(directory: Path, shards: Mapping[str, list[str]], infos: Mapping[str, TensorInfo]) -> None:
    """Write `model.safetensors.index.json` where there is more than one shard; the shards come first."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(info.bytes for info in infos.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    write_object(directory / "model.safetensors.index.json", index)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError where it is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not JSON ({one_line(error)}); get the file again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file}: a JSON {type(values).__name__}, not an object; get the file again")
    return values


def write_object(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, the same bytes for the same values."""
    file.write_text(json.dumps(values, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def one_line(error: Exception) -> str:
    """A library's error in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _open(directory: Path, stems: tuple[str, ...]) -> Weights:
    for name in stems:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return Weights([directory / name])
        if index.is_file():
            return Weights(_indexed(directory, index))
    raise ModelError(f"{directory}: no weights ({' or '.join(stems)}, or their index); check the path")


def _indexed(directory: Path, index: Path) -> list[Path]:
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index}: not an index of weights (no weight_map); get the file again") from None
    for name in named:
        # The index comes from elsewhere: it may name files, not paths.
        if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
            raise ModelError(f"{index}: names {name!r}, which is not a file beside it; get the missing shard")
    return [directory / name for name in named]


def _safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: unreadable as safetensors ({error}); get the file again") from None


def _infos(handle: Any) -> Iterable[tuple[str, TensorInfo]]:
    if isinstance(handle, dict):
        for name, tensor in handle.items():
            yield name, TensorInfo(tuple(tensor.shape), tensor.dtype)
        return
    for name in handle.keys():  # noqa: SIM118 (not a mapping)
        piece = handle.get_slice(name)
        dtype = DTYPES.get(piece.get_dtype())
        if dtype is None:
            raise ModelError(f"tensor {name} is {piece.get_dtype()}: quantised weights are not read; dequantise first")
        yield name, TensorInfo(tuple(piece.get_shape()), dtype)
