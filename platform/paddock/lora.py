"""Load a base, attach PEFT adapters to it, save and load them."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
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
    values = part.model_dump(exclude={"init_from"})
    known = list(inspect.signature(LoraConfig).parameters)
    for key in values:
        if key not in known:
            raise ConfigError(f"lora.{key}: peft's LoraConfig has no such key{nearest(key, known)}")
    targets = list(part.target_modules)
    # One word may be PEFT's own (all-linear), or a pattern.
    pattern = len(targets) == 1 and not targets[0].replace("_", "").replace(".", "").isalnum()
    values["target_modules"] = targets[0] if pattern else targets
    values["modules_to_save"] = list(part.modules_to_save) or None
    if _moves_base(part) and (values.get("use_rslora") or values.get("use_dora")):
        raise ConfigError(
            "lora.init_lora_weights: this start cannot be saved as plain LoRA with use_rslora or use_dora"
        )
    if str(values.get("init_lora_weights")) in ("corda", "eva", "loftq"):
        raise ConfigError(
            f"lora.init_lora_weights: {values['init_lora_weights']} needs a pass over data or a quantised base first,"
            " which is not made here; use true, gaussian, orthogonal, pissa, pissa_niter_N or olora"
        )
    try:
        return LoraConfig(task_type="CAUSAL_LM", **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: refused by peft: {error}") from None


def check_targets(model: ModelConfig, part: LoraPart) -> tuple[int, int]:
    """Attach the adapter to the model's outline, without weights: (trainable, all) parameters.

    Raises ModelError where `lora.target_modules` matches nothing.
    """
    config = AutoConfig.from_pretrained(storage.fetch(model.path, only=("config.json",)))
    # An initialisation that looks at the weights has none to look at here.
    part = part.model_copy(update={"init_lora_weights": True, "init_from": None})
    with torch.device("meta"):
        trainable, total = attach(AutoModelForCausalLM.from_config(config), part).get_nb_trainable_parameters()
    return trainable, total


def attach(base: Any, part: LoraPart) -> PeftModel:
    """An adapter on a base: a new one, or `lora.init_from`; what is trained is float32.

    Raises ModelError where `lora.target_modules` matches nothing, or the adapter does not fit.
    """
    try:
        model = get_peft_model(base, lora_config(part))
    except ValueError as error:
        raise ModelError(f"lora: {' '.join(str(error).split())}") from None
    if _moves_base(part):
        # What was taken out of the base; `save` gives it back.
        model.paddock_start = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    if part.init_from is not None:
        load_weights(model, storage.fetch(part.init_from))
    _train_in_float32(model, base.dtype)
    return model


def check_init_from(part: LoraPart, model: str) -> None:
    """Raise ModelError where `lora.init_from` is no adapter, is another kind than `lora` says, or of another base.

    model: the base's fingerprint.
    """
    source = str(part.init_from)
    file = storage.join(source, "adapter_config.json")
    if not storage.exists(file):
        raise ModelError(f"lora.init_from: {source}: no adapter_config.json, so not a PEFT adapter; check the path")
    with storage.reading(file) as stream:
        found = json.load(stream)
    wanted = lora_config(part).to_dict()
    for key in ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora", "use_dora"):
        has, wants = _plain(found.get(key)), _plain(wanted[key])
        if has != wants:
            raise ModelError(f"lora.init_from: {source}: its {key} is {has}, lora.{key} {wants}; make both the same")
    made = manifest.read(source)
    if made is not None and made.inputs.get("model", model) != model:
        raise ModelError(
            f"lora.init_from: {source}: was trained on another base (model {made.inputs['model'][:12]}..., model.path"
            f" is {model[:12]}...); give the base it was trained on as model.path"
        )


def _plain(value: Any) -> Any:
    """A value of an adapter's configuration, comparable."""
    return sorted(value) if isinstance(value, (list, set, tuple)) else (value or None)


def _train_in_float32(model: PeftModel, dtype: torch.dtype) -> None:
    """Keep what is trained in float32 over a base of another type; whole layers then cast at their borders."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if dtype == torch.float32:
        return
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.register_forward_pre_hook(lambda _, args: tuple(_cast(a, torch.float32) for a in args))
            module.register_forward_hook(lambda _, args, output: _cast(output, dtype))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def save(model: PeftModel, directory: Path, tokenizer_from: str | Path) -> None:
    """Write a plain PEFT adapter directory with its tokenizer."""
    # modules_to_save are written anyway; "auto" would ask the hub for the base's vocabulary.
    model.save_pretrained(directory, save_embedding_layers=False)
    if hasattr(model, "paddock_start"):
        _as_plain_lora(directory, model.paddock_start)
    copy_tokenizer(tokenizer_from, directory)


def _moves_base(part: LoraPart) -> bool:
    """Whether an initialisation changes the base: PiSSA and OLoRA take their first product out of it."""
    start = (part.model_extra or {}).get("init_lora_weights", True)
    return isinstance(start, str) and (start.startswith("pissa") or start == "olora")


def _as_plain_lora(directory: Path, start: dict[str, torch.Tensor]) -> None:
    """Rewrite an adapter of a changed base as one of the base itself, of twice the rank.

    W - s B0 A0 + s B A = W + s [B -B0] [A; A0], with s = lora_alpha / r as before.
    """
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([tensor, start[name].cpu()], dim=0).contiguous()
        elif ".lora_B." in name:
            tensors[name] = torch.cat([tensor, -start[name].cpu()], dim=1).contiguous()
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    config["init_lora_weights"] = True
    for key in ("r", "lora_alpha"):
        config[key] *= 2
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {name: 2 * value for name, value in (config.get(key) or {}).items()}
    text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")


def load_weights(model: PeftModel, directory: Path) -> None:
    """Put an adapter directory's weights into an attached adapter. Raises ModelError where they do not fit."""
    try:
        result = set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"))
    except RuntimeError as error:
        told = " ".join(str(error).split())[:300]
        raise ModelError(f"{directory}: does not fit this base ({told}); was it trained on another one?") from None
    if result.unexpected_keys:
        raise ModelError(f"{directory}: tensor {result.unexpected_keys[0]} fits no module of this adapter")


def copy_tokenizer(source: str | Path, directory: Path) -> None:
    """Copy a tokenizer's files, all of them, as they are."""
    source = storage.fetch(source, only=TOKENIZER_FILES)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
