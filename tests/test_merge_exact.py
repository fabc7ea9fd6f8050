"""Random adapters, made with PEFT, against PEFT's own merge in float64: how far off each element is, in units in the
last place of what is written."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.merge_lab import PROJECTIONS, VOCABULARY, Lab, weights

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def draw(rng: random.Random, rows: int, tied: bool) -> tuple[dict[str, Any], int | None]:
    """What one adapter's LoraConfig says, and the vocabulary it grows to (None: it stays)."""
    targets: Any = sorted(rng.sample(PROJECTIONS, rng.randint(1, 7)))
    config: dict[str, Any] = {"r": rng.choice([1, 4, 8, 32]), "lora_alpha": rng.choice([4, 16, 128])}
    config["use_rslora"] = rng.random() < 0.3
    config["use_dora"] = rng.random() < 0.25
    if rng.random() < 0.3:
        # Patterns that meet are no use: adapter_config.json forgets their order, and PEFT cannot load them again.
        config["rank_pattern"] = {rf".*layers\.1\..*{targets[0]}": 3}
        config["alpha_pattern"] = {targets[-1]: 7}
    if rng.random() < 0.3:
        config["bias"] = rng.choice(["all", "lora_only"])
    elif rng.random() < 0.3 and not config["use_dora"]:
        config["lora_bias"] = True
    if rng.random() < 0.2:
        config["layers_to_transform"] = [rng.randint(0, 1)]
    if len(targets) > 1 and rng.random() < 0.3:
        config["exclude_modules"] = targets[-1:]
    if rng.random() < 0.2:
        config["fan_in_fan_out"] = True  # PEFT corrects it on Linear layers
    if rng.random() < 0.15 and "layers_to_transform" not in config:
        targets = "all-linear"
        config.pop("exclude_modules", None)
    elif rng.random() < 0.15 and "lora_bias" not in config:
        targets = [*targets, "embed_tokens"]
    grown, ends = None, []
    if "embed_tokens" not in targets:
        what = rng.choice(["nothing", "grow", "save", "rows", "norm"])
        ends = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
        if what == "grow":
            grown = rows + rng.randint(1, 9)
            config["modules_to_save"] = ["embed_tokens", "lm_head"]
        elif what == "save":
            config["modules_to_save"] = ends
            config["ensure_weight_tying"] = tied
        elif what == "rows":
            chosen = sorted(rng.sample(range(rows), 5))
            config["trainable_token_indices"] = dict.fromkeys(ends, chosen) if not tied else chosen
        elif what == "norm":
            config["modules_to_save"] = ["input_layernorm", "norm"]
    return {**config, "target_modules": targets}, grown


def rewrite(adapter: Path, dtype: torch.dtype, *, as_bin: bool) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    if as_bin:
        torch.save(tensors, adapter / "adapter_model.bin")
        file.unlink()
    else:
        save_file(tensors, file, {"format": "pt"})


def exact(base: Path, adapters: list[tuple[Path, int | None]]) -> dict[str, torch.Tensor]:
    """PEFT's merge, adapter after adapter, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    for adapter, rows in adapters:
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).merge_and_unload()
    return dict(model.state_dict())


def off(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many representable values lie between."""
    bits, sign = (torch.int32, 2**31) if found.dtype == torch.float32 else (torch.int16, 2**15)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.contiguous().view(bits).long()
        return torch.where(whole < 0, -(whole + sign), whole)

    return (place(found) - place(expected.to(found.dtype))).abs()


def check(lab: Lab, seed: int) -> None:
    rng = random.Random(seed)
    tied = rng.random() < 0.25
    base_dtype, adapter_dtype = rng.choice(list(DTYPES.values())), rng.choice(list(DTYPES.values()))
    base = lab.base(
        dtype=base_dtype,
        shards=rng.choice(["50GB", "60KB"]),
        tie_word_embeddings=tied,
        attention_bias=True,
        mlp_bias=True,
    )
    rows, adapters = VOCABULARY, list[tuple[Path, int | None]]()
    for number in range(rng.randint(1, 3)):
        config, grown = draw(rng, rows, tied and number == 0)
        now = grown or (rows if rows > VOCABULARY else None)
        adapter = lab.adapter(base, f"a{number}", rows=now, seed=seed + number, **config)
        rewrite(adapter, adapter_dtype, as_bin=rng.random() < 0.3)
        rows = grown or rows
        adapters.append((adapter, rows if rows > VOCABULARY else None))
        tied = tied and not grown and "embed_tokens" not in config["target_modules"]
    merged = lab.merge(base, *(adapter for adapter, _ in adapters), prove_prompts=2, min_top1_agreement=0.5)
    found, expected = weights(merged), exact(base, adapters)
    if "lm_head.weight" not in found:
        torch.testing.assert_close(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert found.keys() == expected.keys()
    distances = torch.cat([off(found[name], expected[name]).flatten() for name in found])
    assert {tensor.dtype for tensor in found.values()} == {base_dtype}
    assert distances.max() <= 1
    assert (distances == 0).double().mean() >= 0.999


@pytest.mark.parametrize("seed", range(8))
def test_random_adapters_are_merged_to_the_last_place(tmp_path: Path, seed: int) -> None:
    check(Lab(tmp_path), seed)
