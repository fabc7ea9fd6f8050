"""Bases, tokenizers and adapters: what loads, and what is said about what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from paddock import lora
from paddock.config import LoraPart, ModelConfig
from paddock.errors import ConfigError, ModelError


def test_what_is_no_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        lora.check_base(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"no config\.json"):
        lora.check_base(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(base_model: Path, copy_of: Any) -> None:
    model = copy_of(base_model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 1}))
    with pytest.raises(ModelError, match=rf"has {config['vocab_size']} tokens, the model's embedding"):
        lora.load_tokenizer(model)
    (model / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        lora.load_tokenizer(model)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"lora_alhpa": 3}, "lora.lora_alhpa: peft's LoraConfig has no such key; did you mean 'lora_alpha'?"),
        ({"layers_pattern": "h"}, "lora: refused by peft"),
    ],
)
def test_peft_answers_for_its_keys(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as told:
        lora.lora_config(LoraPart(**extra))
    assert says in str(told.value)


def test_keys_that_are_not_ours_reach_peft() -> None:
    config = lora.lora_config(LoraPart(use_rslora=True, rank_pattern={"q_proj": 2}))
    assert config.use_rslora
    assert config.rank_pattern == {"q_proj": 2}


def test_a_target_that_matches_nothing_is_named(base_model: Path) -> None:
    with pytest.raises(ModelError, match="nothing_proj"):
        lora.attach(lora.load_base(ModelConfig(path=str(base_model))), LoraPart(target_modules=("nothing_proj",)))


def test_an_adapter_survives_a_round_trip(base_model: Path, tmp_path: Path) -> None:
    part = LoraPart(r=2, modules_to_save=("lm_head",))
    model = lora.attach(lora.load_base(ModelConfig(path=str(base_model))), part).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02
    ids = torch.tensor([[1, 300, 301, 302]])
    with torch.no_grad():
        before = model(ids).logits
    lora.save(model, tmp_path / "adapter", base_model)
    assert (tmp_path / "adapter" / "tokenizer.model").read_bytes() == (base_model / "tokenizer.model").read_bytes()

    plain = PeftModel.from_pretrained(lora.load_base(ModelConfig(path=str(base_model))), tmp_path / "adapter").eval()
    again = lora.attach(lora.load_base(ModelConfig(path=str(base_model))), part).eval()
    lora.load_weights(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, before)
        assert torch.equal(again(ids).logits, before)
