"""Bases, tokenizers and adapters: what loads, and what is said about what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from paddock import lora, manifest
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "variant",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 8}},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"trainable_token_indices": [5, 6]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=lambda variant: "-".join(map(str, variant)),
)
def test_every_variant_trains_in_float32_and_loads_as_a_plain_adapter(
    base_model: Path, tmp_path: Path, variant: dict[str, Any], dtype: Any
) -> None:
    part = LoraPart(r=4, **variant)
    config = ModelConfig(path=str(base_model), dtype=dtype)
    assert lora.check_targets(config, part)[0] > 0
    torch.manual_seed(0)
    model = lora.attach(lora.load_base(config), part)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    ids = torch.tensor([[1, 300, 5, 6, 301, 302]])
    optimizer = torch.optim.SGD(trained, lr=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    lora.save(model, tmp_path, base_model)
    plain = PeftModel.from_pretrained(lora.load_base(config), tmp_path).eval()
    with torch.no_grad():
        wanted, found = (m.eval()(input_ids=ids, use_cache=False).logits.float() for m in (model, plain))
    # A base that was taken apart and put together again is rounded; whole layers are loaded in the base's type.
    tolerance = 1e-3 if dtype == "float32" else 0.3
    assert torch.allclose(wanted, found, atol=tolerance, rtol=1e-3)


def test_an_adapter_is_continued_only_on_its_base_and_as_it_is(base_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    part = LoraPart(r=2)
    model = lora.attach(lora.load_base(ModelConfig(path=str(base_model))), part)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02
    adapter = tmp_path / "adapter"
    with manifest.stage(adapter, kind="checkpoint", config={}, inputs={"model": "its base"}) as work:
        lora.save(model, work.directory, base_model)

    going_on = LoraPart(r=2, init_from=str(adapter))
    lora.check_init_from(going_on, "its base")
    again = lora.attach(lora.load_base(ModelConfig(path=str(base_model))), going_on)
    ids = torch.tensor([[1, 300, 301, 302]])
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    for part, base, says in (
        (going_on, "another", "trained on another base"),
        (LoraPart(r=4, init_from=str(adapter)), "its base", r"its r is 2, lora\.r 4"),
        (LoraPart(init_from=str(tmp_path)), "its base", r"no adapter_config\.json"),
    ):
        with pytest.raises(ModelError, match=says):
            lora.check_init_from(part, base)
