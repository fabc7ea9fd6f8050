"""The tensors of a Hugging Face or PEFT directory, read one at a time or some rows at a time, and its JSON files.

A directory's tensors are known by name, shape and dtype before any of them is read. Files are safetensors,
or `.bin`/`.pth` that `torch.load(weights_only=True)` can read: nothing is ever unpickled. `paddock.shards` writes
what is read here.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from paddock.aside import let_go
from paddock.errors import ModelError

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
        self._open: dict[Path, dict[str, torch.Tensor] | _Safetensors] = {}
        for file in files:
            for name, info in _infos(self._handle(file)).items():
                if name in self.infos:
                    raise ModelError(f"{file}: tensor {name} stands already in {self._files[name].name}")
                self.infos[name], self._files[name] = info, file

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it is on disk (memory-mapped where the file allows it)."""
        handle = self._handle(self._files[name])
        tensor: torch.Tensor = handle[name] if isinstance(handle, dict) else handle.mapped.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of a tensor, as they are on disk. Of safetensors they are a copy, for who reads all rows in order:
        the file does not stay in the page cache."""
        handle = self._handle(self._files[name])
        return handle[name][start:stop] if isinstance(handle, dict) else handle.rows(name, start, stop)

    def file(self, name: str) -> Path:
        """The file that a tensor is in: what an error about it names."""
        return self._files[name]

    def _handle(self, file: Path) -> dict[str, torch.Tensor] | _Safetensors:
        if file not in self._open:
            self._open[file] = load_tensors(file) if file.suffix in (".bin", ".pth") else _Safetensors(file)
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


class _Safetensors:
    """An open safetensors file."""

    def __init__(self, file: Path) -> None:
        """Raises ModelError where it is none, or cut short."""
        self.file = file
        try:
            self.mapped: Any = safe_open(file, framework="pt")  # it checks the header against the file's length
            self.handle = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, self.handle)
            size = int.from_bytes(os.pread(self.handle, 8, 0), "little")
            header = json.loads(os.pread(self.handle, size, 8))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: unreadable as safetensors ({error}); get the file again") from None
        header.pop("__metadata__", None)
        self.begins = {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}
        self.infos: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise ModelError(f"tensor {name} is {entry['dtype']}: quantised weights are not read; dequantise first")
            self.infos[name] = TensorInfo(tuple(entry["shape"]), dtype)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows, read and not mapped: what is mapped cannot be let go."""
        info = self.infos[name]
        row = info.bytes // max(1, info.shape[0])
        rows = torch.empty((min(stop, info.shape[0]) - start, *info.shape[1:]), dtype=info.dtype)
        data = rows.reshape(-1).view(torch.uint8).numpy().data
        place, end = self.begins[name] + start * row, 0
        while end < len(data):
            try:
                size = os.preadv(self.handle, [data[end:]], place + end)
            except OSError as error:
                raise ModelError(f"{self.file}: cannot be read ({error.strerror}); get the file again") from None
            if size == 0:
                raise ModelError(f"{self.file}: was cut while it was read; get the file again")
            end += size
        let_go(self.handle, place, place + end)
        return rows


def _infos(handle: dict[str, torch.Tensor] | _Safetensors) -> Mapping[str, TensorInfo]:
    if isinstance(handle, _Safetensors):
        return handle.infos
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in handle.items()}
