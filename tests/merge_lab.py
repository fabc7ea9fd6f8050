"""Tiny bases and adapters for the tests of merging, and what transformers and PEFT make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from paddock.config import MergeConfig
from paddock.merge import merge

VOCABULARY, PROJECTIONS = 96, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Lab:
    """Tiny bases and adapters, as transformers and PEFT write them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def base(self, name: str = "base", dtype: torch.dtype = torch.float32, shards: str = "50GB", **config: Any) -> Path:
        torch.manual_seed(0)
        values = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, **config}
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                initializer_range=0.2, **values,
            )
        )  # fmt: skip
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms begin as zeros and ones, which hide mistakes
                torch.nn.init.normal_(parameter, 1.0, 0.1)
        model.to(dtype).save_pretrained(self.directory / name, max_shard_size=shards)
        return self.directory / name

    def adapter(self, base: Path, name: str, rows: int | None = None, seed: int = 1, **config: Any) -> Path:
        """An adapter whose every tensor is random. rows: the vocabulary it was trained with."""
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        values = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, **config}
        peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **values))
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0.5, 0.1 if parameter.ndim > 1 else 0.5)
        peft_model.save_pretrained(self.directory / name, save_embedding_layers=rows is not None)
        return self.directory / name

    def merge(self, base: Path, *adapters: Path, name: str = "merged", **config: Any) -> Path:
        return merge(
            MergeConfig(
                base_model=str(base),
                lora_model=tuple(map(str, adapters)),
                output_dir=str(self.directory / name),
                **config,
            )
        )


def live_logits(base: Path, *adapters: Path) -> torch.Tensor:
    """Base + adapters as they answer in PEFT: all but the last merged, the last one attached."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        saved = load_file(adapter / "adapter_model.safetensors")
        rows = [t.shape[0] for n, t in saved.items() if "embed_tokens" in n and n.endswith("weight")]
        if rows and rows[0] != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows[0], mean_resizing=False)
        model = PeftModel.from_pretrained(model, adapter)
        if adapter != adapters[-1]:
            model = model.merge_and_unload()
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.arange(VOCABULARY)[None]).logits[0]


def merged_logits(directory: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def edit(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def configure(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
