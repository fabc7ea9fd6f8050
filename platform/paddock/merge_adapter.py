"""A PEFT adapter directory, and what it does to each tensor of a model.

PEFT itself says what an adapter means: its configuration is applied to an empty model (torch's meta
device, no memory), and the names, shapes, scalings and wrappers that come out are compared with the
adapter's file. So rank patterns, rsLoRA, regular expressions and tied layers follow PEFT's own rules, and
each tensor of the file is used exactly once or named in the error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from paddock import manifest
from paddock.errors import ModelError
from paddock.merge_operations import AddBias, AddLora, Operation, Replace, ReplaceRows
from paddock.models_of_2023 import load_tokenizer
from paddock.weights import Weights, one_line, open_adapter, read_object

_PREFIX = "base_model.model."
_NAME = "default"
# What says nothing about the merged weights, or is read through PEFT. Anything else must be unset.
_HONOURED = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
    *("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
}
# Other initialisations change the base as well: such an adapter belongs to a base that is not on disk.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter directory."""

    directory: Path
    config: LoraConfig
    weights: Weights
    tokens: int | None
    """The number of tokens of the tokenizer beside it, if there is one."""
    obsolete: tuple[str, ...]
    """Keys of its configuration that PEFT no longer knows and that say nothing."""

    @property
    def names(self) -> dict[str, str]:
        """Tensor names without PEFT's prefix -> as in the file."""
        return {name.removeprefix(_PREFIX): name for name in self.weights.infos}


def open_lora(directory: Path) -> Adapter:
    """Read an adapter directory's configuration. Raises ModelError for what a merge cannot honour."""
    file = directory / "adapter_config.json"
    if not file.is_file():
        found = "no adapter_config.json" if directory.is_dir() else "no such directory"
        raise ModelError(f"lora_model: {directory}: {found}; give a PEFT adapter or a checkpoint-N directory")
    if (directory / manifest.NAME).is_file():
        manifest.check(directory)
    values = read_object(file)
    if values.get("peft_type") != "LORA":
        raise ModelError(f"{file}: peft_type is {values.get('peft_type')!r}; only LORA adapters can be merged")
    for key, value in values.items():
        if key not in _HONOURED and value:
            raise ModelError(f"{file}: {key}={value!r} cannot be merged into weights; serve it as an adapter")
    if values.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise ModelError(
            f"{file}: init_lora_weights={values['init_lora_weights']!r} changed the base too; save the adapter"
            " again with path_initial_model_for_weight_conversion"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # obsolete keys, which are unset
            config = LoraConfig.from_pretrained(str(directory))
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{file}: refused by peft: {one_line(error)}") from None
    obsolete = tuple(key for key in values if key not in LoraConfig.__dataclass_fields__)
    return Adapter(directory, config, open_adapter(directory), count_tokens(directory), obsolete)


def count_tokens(directory: Path) -> int | None:
    """The number of tokens of a directory's tokenizer, None where there is none."""
    if not any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return None
    try:
        return len(load_tokenizer(directory))
    except Exception as error:  # transformers raises whatever it stumbles over
        raise ModelError(f"{directory}: transformers cannot read its tokenizer: {one_line(error)}") from None


class Reading:
    """One adapter, read through PEFT on an empty model."""

    def __init__(self, adapter: Adapter, number: int, empty: Any, embeddings: tuple[str, str]) -> None:
        """number: its position in the list of sources (the base is 0). empty: a model on the meta device with
        as many rows as the adapter's. embeddings: module names of its input embedding and its head."""
        self.adapter, self.number, self.embeddings = adapter, number, embeddings
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's advice to who trains
                self.model = get_peft_model(empty, adapter.config, low_cpu_mem_usage=True)
                expected = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        except (ValueError, TypeError, IndexError, NotImplementedError) as error:
            raise ModelError(f"{adapter.directory}: does not fit this base: {one_line(error)}") from None
        self.expected = {name.removeprefix(_PREFIX): tuple(t.shape) for name, t in expected.items()}
        self.names, self.used = adapter.names, set[str]()
        for name in self.expected:  # older PEFT wrote the bias of a layer under the layer's own name
            plain = name.replace(".base_layer.bias", ".bias")
            if name not in self.names and plain in self.names:
                self.names[name] = self.names.pop(plain)

    @property
    def plain(self) -> Any:
        """The empty model itself, with PEFT's layers in it."""
        return self.model.base_model.model

    def saved(self, path: str) -> torch.Tensor | None:
        """The adapter's tensor for a parameter of `plain`; None for a parameter that is the base's."""
        name = ".".join(part for part in path.split(".") if part not in (_NAME, "modules_to_save"))
        for saved in (name, name.removesuffix(".weight")):  # a DoRA magnitude is saved under its module's name
            if saved in self.names:
                return self.adapter.weights.read(self.names[saved])
        return None

    def operations(self) -> list[tuple[str, Operation]]:
        """(output tensor, operation), in the order in which they apply.

        Raises ModelError for a tensor that is missing, has another shape, or would be left over.
        """
        for name, shape in self.expected.items():
            found = self.adapter.weights.infos[self.names[name]].shape if name in self.names else None
            if found != shape:
                has = "is missing" if found is None else f"is {found}"
                raise ModelError(
                    f"{self.adapter.directory}: tensor {_PREFIX}{name} {has}; its adapter_config.json and the"
                    f" model it meets ask for {shape}"
                )
        operations = list(self._operations())
        for name, in_file in self.names.items():
            if name not in self.used:
                raise ModelError(
                    f"{self.adapter.weights.file(in_file)}: tensor {in_file} is nothing that adapter_config.json"
                    " and the base describe, so it would be lost; is this the adapter's base?"
                )
        return operations

    def _operations(self) -> Iterator[tuple[str, Operation]]:
        modules = {path.removeprefix(_PREFIX): module for path, module in self.model.named_modules()}
        for name in self.embeddings:
            yield from self._saved_below(name, modules[name])
        for name, module in modules.items():
            if isinstance(module, LoraLayer):
                yield from self._lora(name, module)
            elif isinstance(module, TrainableTokensWrapper):
                yield from self._rows(name, module)
            elif isinstance(module, ModulesToSaveWrapper):
                for saved in [expected for expected in self.expected if expected.startswith(f"{name}.")]:
                    yield saved, Replace(self.number, self._take(saved))
                    # Where PEFT saves an embedding because it grew, it writes the wrapper's copies too.
                    inner = saved.removeprefix(f"{name}.")
                    self._drop(f"{name}.modules_to_save.{inner}", f"{name}.original_module.{inner}")
        for name in self.expected.keys() - self.used:
            if self.adapter.config.bias != "none" and name.endswith(".bias"):
                yield name.replace(".base_layer.bias", ".bias"), Replace(self.number, self._take(name))

    def _saved_below(self, name: str, module: Any) -> Iterator[tuple[str, Operation]]:
        """An embedding or head that PEFT saved because its vocabulary grew: it stands below what is learned."""
        if isinstance(module, LoraLayer):
            saved = f"{name}.base_layer.weight"
        elif isinstance(module, TrainableTokensWrapper):
            saved = f"{name}.token_adapter.base_layer.weight"
        else:
            saved = f"{name}.weight"
        if saved in self.names and saved not in self.expected:
            yield f"{name}.weight", Replace(self.number, self._take(saved))

    def _lora(self, name: str, module: Any) -> Iterator[tuple[str, Operation]]:
        variant = module.lora_variant.get(_NAME)
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            raise ModelError(f"{self.adapter.directory}: {type(variant).__name__} on {name} cannot be merged")
        embedding = _NAME in module.lora_embedding_A
        suffixes = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        scaling = float(module.scaling[_NAME])
        yield (
            f"{name}.weight",
            AddLora(
                self.number,
                self._take(f"{name}.{suffixes[0]}"),
                self._take(f"{name}.{suffixes[1]}"),
                scaling,
                transposed=embedding or bool(module.fan_in_fan_out),
                magnitude=None if variant is None else self._take(f"{name}.lora_magnitude_vector"),
            ),
        )
        if f"{name}.lora_B.bias" in self.expected:
            yield f"{name}.bias", AddBias(self.number, self._take(f"{name}.lora_B.bias"), scaling)

    def _rows(self, name: str, module: Any) -> Iterator[tuple[str, Operation]]:
        # A tied head has no rows of its own in the file: they are the embedding's.
        own = name if module.token_adapter.tied_adapter is None else self.embeddings[0]
        tensor = self._take(f"{own}.token_adapter.trainable_tokens_delta")
        rows = tuple((module.token_adapter.tied_adapter or module.token_adapter).token_indices[_NAME])
        yield f"{name}.weight", ReplaceRows(self.number, tensor, rows)
        self._drop(f"{name}.token_adapter.trainable_tokens_original")

    def _take(self, name: str) -> str:
        self.used.add(name)
        return self.names[name]

    def _drop(self, *names: str) -> None:
        self.used.update(name for name in names if name in self.names)
