"""Load a base, attach PEFT adapters to it, save and load them."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from paddock import manifest, storage
from paddock.config import LoraPart, ModelConfig, nearest
from paddock.errors import ConfigError, ModelError

# Everything of a tokenizer; save_pretrained of transformers 5 leaves tokenizer.model behind.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def check_base(path: str | Path) -> None:
    """Raise ModelError where a directory cannot be a base model; verify the manifest of one of ours."""
    if not storage.exists(path):
        raise ModelError(f"model.path: {path}: no such directory; convert or merge a model into it first")
    if not storage.exists(storage.join(path, "config.json")):
        raise ModelError(f"model.path: {path}: no config.json, so not a Hugging Face model directory")
    if not any(name.endswith((".safetensors", ".bin")) for name in storage.children(path)):
        raise ModelError(f"model.path: {path}: no weights (*.safetensors or *.bin) beside config.json; copy them there")
    if manifest.read(path) is not None:
        manifest.check(path, "model")


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model directory, compared with the size of the model's embedding.

    Raises ModelError where there is none, where it needs a larger embedding than the model has, or where
    it lacks BOS or EOS.
    """
    directory = storage.fetch(path, only=(*TOKENIZER_FILES, "config.json"))
    if not any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise ModelError(f"{path}: neither tokenizer.model nor tokenizer.json; copy the tokenizer beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        vocab_size = AutoConfig.from_pretrained(directory).vocab_size
    except Exception as error:  # sentencepiece, tokenizers and json each raise their own
        told = " ".join(str(error).split())[:300]
        raise ModelError(f"{path}: its tokenizer or config.json cannot be read ({told}); copy them again") from None
    if len(tokenizer) > vocab_size:
        raise ModelError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocab_size} rows;"
            " merge the adapter that grew the vocabulary first"
        )
    return tokenizer


def load_base(model: ModelConfig) -> Any:
    """The base model on the CPU, in `model.dtype` or as its files are."""
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        storage.fetch(model.path),
        dtype=getattr(torch, model.dtype) if model.dtype else "auto",
        attn_implementation="sdpa",
    )


def lora_config(part: LoraPart) -> LoraConfig:
    """peft's LoraConfig from `lora`. Raises ConfigError for what peft does not know or refuses."""
    values = part.model_dump()
    known = list(inspect.signature(LoraConfig).parameters)
    for key in values:
        if key not in known:
            raise ConfigError(f"lora.{key}: peft's LoraConfig has no such key{nearest(key, known)}")
    values["target_modules"] = list(part.target_modules)
    values["modules_to_save"] = list(part.modules_to_save) or None
    try:
        return LoraConfig(task_type="CAUSAL_LM", **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: refused by peft: {error}") from None


def check_targets(model: ModelConfig, part: LoraPart) -> tuple[int, int]:
    """Attach the adapter to the model's outline, without weights: (trainable, all) parameters.

    Raises ModelError where `lora.target_modules` matches nothing.
    """
    config = AutoConfig.from_pretrained(storage.fetch(model.path, only=("config.json",)))
    with torch.device("meta"):
        trainable, total = attach(AutoModelForCausalLM.from_config(config), part).get_nb_trainable_parameters()
    return trainable, total


def attach(base: Any, part: LoraPart) -> PeftModel:
    """A new adapter on a base. Raises ModelError where `lora.target_modules` matches nothing."""
    try:
        return get_peft_model(base, lora_config(part))
    except ValueError as error:
        raise ModelError(f"lora: {' '.join(str(error).split())}") from None


def save(model: PeftModel, directory: Path, tokenizer_from: str | Path) -> None:
    """Write a plain PEFT adapter directory with its tokenizer."""
    # modules_to_save are written anyway; "auto" would ask the hub for the base's vocabulary.
    model.save_pretrained(directory, save_embedding_layers=False)
    copy_tokenizer(tokenizer_from, directory)


def load_weights(model: PeftModel, directory: Path) -> None:
    """Put an adapter directory's weights into an attached adapter. Raises ModelError where they do not fit."""
    result = set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"))
    if result.unexpected_keys:
        raise ModelError(f"{directory}: tensor {result.unexpected_keys[0]} fits no module of this adapter")


def copy_tokenizer(source: str | Path, directory: Path) -> None:
    """Copy a tokenizer's files, all of them, as they are."""
    source = storage.fetch(source, only=TOKENIZER_FILES)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
