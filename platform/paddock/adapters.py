"""LoRA adapters by name: a directory of adapter directories beside a base, looked at anew for every request.

A name is looked up among the names that lie there and never joined to a path, so no name leaves the
directory. What is found is copied first and then checked, the copy, against the base, tensor by tensor: what
the engine reads later, after it had evicted the adapter, is what was checked, whatever happened to the original.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from paddock import manifest
from paddock.errors import ConfigError, ModelError, UnknownAdapterError
from paddock.merge_adapter import Reading, count_tokens, open_lora
from paddock.merge_operations import AddLora
from paddock.weights import ADAPTER_FILES, one_line

_CONFIG = "adapter_config.json"


class AdapterDirectory:
    """The adapters that lie in a directory, for one base. Thread-safe."""

    def __init__(self, root: str | Path, base: Path) -> None:
        """root: a local or shared directory; base: a local Hugging Face directory. Raises ConfigError."""
        if "://" in str(root) or not Path(root).is_dir():
            raise ConfigError(f"serve.adapters: {root}: no such directory; give one that every replica can read")
        self.root, self.base = Path(root).resolve(), base
        self._tokens = count_tokens(base)
        self._copies = Path(tempfile.mkdtemp(prefix="paddock-adapters-"))
        self._checked: dict[str, tuple[object, Path]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The names that can be asked for: those of its subdirectories with an adapter_config.json."""
        return sorted(path.name for path in self.root.iterdir() if not path.name.startswith(".") and _is_adapter(path))

    def open(self, name: str) -> Path:
        """A checked copy of an adapter, a new one wherever the adapter's files are others than before.

        Raises UnknownAdapterError where there is none of that name, ModelError where it is damaged or does not fit
        the base.
        """
        with self._lock:
            if name not in self.names():
                self._checked.pop(name, None)
                raise UnknownAdapterError(f"there is no adapter {name[:100]!r}")
            files = self._files(name)
            state = tuple((file.name, s.st_mtime_ns, s.st_size, s.st_ino) for file in files for s in [file.stat()])
            if name not in self._checked or self._checked[name][0] != state:
                try:
                    self._checked[name] = (state, self._copy(name, files))
                except Exception as error:  # PEFT, safetensors and transformers each raise their own
                    raise ModelError(f"adapter {name!r}: {self._public(one_line(error), name)}") from None
            return self._checked[name][1]

    def close(self) -> None:
        """Remove the copies."""
        shutil.rmtree(self._copies, ignore_errors=True)

    def _files(self, name: str) -> list[Path]:
        """The files of an adapter, none of them a link out of the directory."""
        named = [_CONFIG, manifest.NAME, *ADAPTER_FILES]
        files = [file for file in (self.root / name / each for each in named) if file.is_file()]
        for file in files:
            if not file.resolve().is_relative_to(self.root):
                raise ModelError(f"adapter {name!r}: {file.name} is a link out of the directory of adapters")
        return files

    def _copy(self, name: str, files: list[Path]) -> Path:
        original = open_lora(self.root / name)  # its manifest and headers, before anything large is copied
        if original.tokens is not None and self._tokens is not None and original.tokens > self._tokens:
            raise ModelError(
                f"its vocabulary grew to {original.tokens} tokens, the base knows {self._tokens}; merge it (jobs.merge)"
            )
        partial = Path(tempfile.mkdtemp(dir=self._copies))
        try:
            digest = hashlib.sha256(name.encode())  # the answer names the adapter
            for file in files:
                if file.name != manifest.NAME:
                    shutil.copyfile(file, partial / file.name)
                    digest.update(f"{file.name} {manifest.sha256(partial / file.name)}\n".encode())
            self._check(partial)
            copy = self._copies / digest.hexdigest()
            if copy.exists():
                shutil.rmtree(partial)
            else:
                partial.rename(copy)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return copy

    def _check(self, directory: Path) -> None:
        """Raise ModelError where an adapter is anything but low-rank updates of the base's own layers."""
        adapter = open_lora(directory)
        if adapter.config.rank_pattern or adapter.config.alpha_pattern:
            raise ModelError("its layers have ranks of their own, which not every vLLM serves; merge it (jobs.merge)")
        empty = self._empty()
        names = {id(module): name for name, module in empty.named_modules()}
        embeddings = names[id(empty.get_input_embeddings())], names[id(empty.get_output_embeddings())]
        for name, operation in Reading(adapter, 1, empty, embeddings).operations():
            if not isinstance(operation, AddLora) or operation.magnitude is not None or operation.transposed:
                raise ModelError(f"changes {name} by more than a low-rank update; merge it (jobs.merge)")

    def _empty(self) -> Any:
        config = AutoConfig.from_pretrained(self.base)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    def _public(self, message: str, name: str) -> str:
        """An error without the paths of this machine."""
        for place in (self.root / name, self.root, self._copies):
            message = message.replace(str(place), name)
        return message


def _is_adapter(path: Path) -> bool:
    return path.is_dir() and (path / _CONFIG).is_file()
