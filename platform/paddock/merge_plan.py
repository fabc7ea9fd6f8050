"""The plan of a merge: every tensor of the merged model, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from paddock import manifest
from paddock.errors import ModelError
from paddock.merge_adapter import Adapter, Reading, count_tokens, open_lora
from paddock.merge_operations import Operation, OutputTensor, Replace, ReplaceRows
from paddock.shards import in_order
from paddock.weights import TensorInfo, Weights, one_line, open_model, read_object


@dataclass(frozen=True)
class Step:
    """The model once an adapter is applied; the proof follows these steps."""

    reading: Reading
    """The adapter, as PEFT reads it."""
    rows: int
    """Rows of the embedding and the head."""
    tied: bool
    """The head is the embedding."""

    @property
    def adapter(self) -> Path:
        return self.reading.adapter.directory


@dataclass(frozen=True)
class Plan:
    """A merge, worked out."""

    base: Path
    base_config: dict[str, Any]
    """The base's `config.json`."""
    sources: tuple[Weights, ...]
    """The base's weights, then each adapter's."""
    base_tied: bool
    """The base's head is its embedding."""
    embedding: str
    """Module name of the input embedding."""
    head: str
    """Module name of the head."""
    steps: tuple[Step, ...]
    outputs: dict[str, OutputTensor]
    rows: int
    tied: bool
    tokenizer: Path | None
    """The directory whose tokenizer the merged model gets."""
    notes: tuple[str, ...]
    """What is dropped or unusual, one line each."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Name -> shape and dtype of what is written."""
        return {name: output.info for name, output in self.outputs.items()}

    @property
    def bytes(self) -> int:
        return sum(info.bytes for info in self.infos.values())


def make_plan(base: str | Path, adapters: list[Path], dtype: torch.dtype | None = None) -> Plan:
    """Plan base + adapters, in order.

    dtype: what floating point tensors are rounded to; None keeps the base's own. Raises ModelError for
    whatever would make the result wrong.
    """
    model = _Model(Path(base))
    base_tied = model.tied
    opened = [open_lora(directory) for directory in adapters]
    for number, adapter in enumerate(opened, 1):
        model.apply(adapter, number)
    return Plan(
        base=model.base,
        base_config=model.base_config,
        sources=(model.weights, *(adapter.weights for adapter in opened)),
        base_tied=base_tied,
        embedding=model.embedding,
        head=model.head,
        steps=tuple(model.steps),
        outputs={name: _cast(model.outputs[name], dtype) for name in in_order(model.outputs)},
        rows=model.rows,
        tied=model.tied,
        tokenizer=None if model.tokens is None else model.tokenizer,
        notes=tuple(model.notes),
    )


def empty_model(base: Path, rows: int, *, tied: bool) -> Any:
    """The model of a base's `config.json` without memory for its weights. rows: its vocabulary."""
    config = AutoConfig.from_pretrained(base)
    config.vocab_size, config.tie_word_embeddings = rows, tied
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


class _Model:
    """The merged model while its plan grows, adapter by adapter."""

    def __init__(self, base: Path) -> None:
        if not (base / "config.json").is_file():
            found = "no config.json" if base.is_dir() else "no such directory"
            raise ModelError(f"base_model: {base}: {found}; give a Hugging Face model directory")
        if (base / manifest.NAME).is_file():
            manifest.check(base, "model")
        self.base, self.base_config = base, read_object(base / "config.json")
        if self.base_config.get("quantization_config"):
            raise ModelError(f"{base}: its weights are quantised (quantization_config); merge into the original ones")
        self.weights = open_model(base)
        self.notes: list[str] = []
        self.steps: list[Step] = []
        self.tokenizer, self.tokens = base, count_tokens(base)
        try:
            config = AutoConfig.from_pretrained(base)
            self.rows, self.tied = int(config.vocab_size), bool(config.tie_word_embeddings)
            empty = self._empty()
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{base}: not a causal language model of transformers: {one_line(error)}") from None
        names = {id(module): name for name, module in empty.named_modules()}
        self.embedding = names[id(empty.get_input_embeddings())]
        self.head = names[id(empty.get_output_embeddings())]
        infos = self.weights.infos
        self.outputs = {name: OutputTensor(name, name, info) for name, info in infos.items() if not self._drops(name)}
        buffers = [name for name in infos if name.endswith("rotary_emb.inv_freq")]
        if buffers:
            also = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
            self.notes.append(f"{buffers[0]}{also}: dropped; they follow from config.json")
        for name, parameter in empty.named_parameters():
            shape, found_shape = tuple(parameter.shape), infos[name].shape if name in infos else None
            if shape != found_shape:
                has = "is missing" if found_shape is None else f"is {found_shape}"
                raise ModelError(f"{base}: tensor {name} {has}, its config.json asks for {shape}; get all its files")
        self._check_tokens(base)

    def apply(self, adapter: Adapter, number: int) -> None:
        """Add an adapter's operations. Raises ModelError naming what does not fit."""
        where = adapter.directory
        if adapter.obsolete:
            self.notes.append(f"{where.name}: adapter_config.json: {', '.join(adapter.obsolete)} dropped; unset anyway")
        if adapter.tokens is None:
            self.notes.append(f"{where.name}: has no tokenizer of its own; the tokenizer so far stays")
        smallest = self.rows if self.tokens is None else self.tokens
        if adapter.tokens is not None and adapter.tokens < smallest:
            raise ModelError(
                f"{where}: its tokenizer has {adapter.tokens} tokens, the model it meets {smallest}; a vocabulary"
                " only grows: check the order of lora_model"
            )
        grown = self._grow(adapter)
        reading = Reading(adapter, number, self._empty(), (self.embedding, self.head))
        operations = self._keep_or_cut_tie(reading.operations(), adapter, grown)
        for name, operation in operations:
            if name not in self.outputs:
                raise ModelError(f"{where}: acts on {name}, which the base {self.base} does not have")
            output = self.outputs[name]
            self.outputs[name] = replace(output, operations=(*output.operations, operation))
        for module in (self.embedding, self.head):
            name = f"{module}.weight"
            if name in self.outputs:  # a tied head is not
                info = self.outputs[name].info
                info = replace(info, shape=(self.rows, *info.shape[1:]))
                self.outputs[name] = replace(self.outputs[name], info=info)
        if adapter.tokens is not None:
            self.tokenizer, self.tokens = where, adapter.tokens
        self._check_tokens(where)
        self.steps.append(Step(reading, self.rows, self.tied))

    def _grow(self, adapter: Adapter) -> bool:
        """Take over the rows that an adapter brings; return whether they became more."""
        brought: dict[str, int] = {}
        names = adapter.names
        for module in (self.embedding, self.head):
            for layer in ("", ".base_layer", ".token_adapter.base_layer"):
                if f"{module}{layer}.weight" in names:
                    brought[module] = adapter.weights.infos[names[f"{module}{layer}.weight"]].shape[0]
        for module, rows in brought.items():
            if rows < self.rows:
                raise ModelError(
                    f"{adapter.directory}: brings {rows} rows for {module}, the model it meets has {self.rows}; a"
                    " vocabulary only grows: check the order of lora_model"
                )
        if len(set(brought.values())) > 1:
            raise ModelError(
                f"{adapter.directory}: brings {brought[self.embedding]} rows for {self.embedding} and"
                f" {brought[self.head]} for {self.head}; both need the same number"
            )
        grown = any(rows > self.rows for rows in brought.values())
        lacking = {self.embedding, self.head} - brought.keys()
        if grown and lacking and not (self.tied and lacking == {self.head}):
            raise ModelError(
                f"{adapter.directory}: grows the vocabulary from {self.rows} to {max(brought.values())} rows, but"
                f" brings none for {', '.join(sorted(lacking))}; save both in modules_to_save"
            )
        self.rows = max([self.rows, *brought.values()])
        return grown

    def _keep_or_cut_tie(
        self, operations: list[tuple[str, Operation]], adapter: Adapter, grown: bool
    ) -> list[tuple[str, Operation]]:
        """A head that is the embedding stays so where an adapter changes both alike; else it becomes its own.

        A live adapter of PEFT changes just the layers that it names: a head that is not named stays as it
        was, and is written beside the embedding. Grown rows that only the embedding has are the head's too.
        """
        if not self.tied:
            return operations
        embedding, head = f"{self.embedding}.weight", f"{self.head}.weight"
        on_embedding = [operation for name, operation in operations if name == embedding]
        on_head = [operation for name, operation in operations if name == head]
        if _alike(on_embedding, on_head, adapter.weights):
            return [(name, operation) for name, operation in operations if name != head]
        if grown and not on_head:
            self.notes.append(f"{adapter.directory.name}: the grown {embedding} is the head's too (tied)")
            return operations
        self.tied = False
        self.outputs[head] = replace(self.outputs[embedding], name=head)
        self.notes.append(f"{adapter.directory.name}: changes {embedding} and {head} apart, so they are untied")
        return operations

    def _check_tokens(self, where: Path) -> None:
        if self.tokens is not None and self.tokens > self.rows:
            raise ModelError(
                f"{where}: the tokenizer has {self.tokens} tokens, the embedding {self.rows} rows; an adapter that"
                " grows the vocabulary brings its rows: modules_to_save=[embed_tokens, lm_head]"
            )
        if self.tokens is not None and self.tokens < self.rows:
            self.notes.append(f"{where.name}: {self.rows} embedding rows for {self.tokens} tokens; all are kept")

    def _empty(self) -> Any:
        return empty_model(self.base, self.rows, tied=self.tied)

    def _drops(self, name: str) -> bool:
        if name.endswith("rotary_emb.inv_freq"):
            return True
        if self.tied and name == f"{self.head}.weight":
            self.notes.append(f"{name}: dropped; config.json ties it to the embedding")
            return True
        return False


def _alike(on_embedding: list[Operation], on_head: list[Operation], weights: Weights) -> bool:
    """Whether an adapter does the same to both, so that one tensor can stand for both."""
    if len(on_embedding) != len(on_head):
        return False
    for one, other in zip(on_embedding, on_head, strict=True):
        if isinstance(one, Replace) and isinstance(other, Replace):
            if not torch.equal(weights.read(one.tensor), weights.read(other.tensor)):
                return False
        elif one != other or not isinstance(one, ReplaceRows):
            return False
    return True


def _cast(output: OutputTensor, dtype: torch.dtype | None) -> OutputTensor:
    if dtype is None or not output.info.dtype.is_floating_point:
        return output
    return replace(output, info=replace(output.info, dtype=dtype))
