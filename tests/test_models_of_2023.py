"""The first LLaMA conversions and adapters: what they say wrong is put right, what is obsolete does no harm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from paddock.published import recognised
from tests.merge_lab import Lab, configure


def write(file: Path, **values: object) -> None:
    old = json.loads(file.read_text()) if file.name == "config.json" else {}
    file.write_text(json.dumps(old | values))


def test_old_base_and_adapter_are_put_right(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab, base = Lab(tmp_path), Path(shutil.copytree(assets / "base", tmp_path / "base"))
    (base / "manifest.json").unlink(missing_ok=True)
    write(base / "tokenizer_config.json", bos_token="", eos_token="", unk_token="", tokenizer_class="LLaMATokenizer")
    write(base / "special_tokens_map.json")
    wrong = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    write(base / "config.json", architectures=["LLaMAForCausalLM"], **wrong)
    write(base / "generation_config.json", **wrong)
    tensors = load_file(base / "model.safetensors")
    tensors |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(32) for n in range(4)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = lab.adapter(assets / "base", "adapter")
    configure(adapter, enable_lora=None, merge_weights=False)
    merged = lab.merge(base, adapter)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((merged / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, 2, None)
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    ours, right = (AutoTokenizer.from_pretrained(directory) for directory in (merged, assets / "base"))
    assert type(ours) is type(right)
    assert ours("问 x")["input_ids"] == right("问 x")["input_ids"]
    assert ours.eos_token_id == 2
    said = capsys.readouterr().out
    for name in ("rotary_emb.inv_freq", "tokenizer_class", "bos_token_id", "pad_token_id", "enable_lora"):
        assert name in said


def test_published_sums_are_told() -> None:
    tokenizer = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
    assert "published one of LLaMA" in recognised("anything", {"tokenizer.model": tokenizer})[0]
    (line,) = recognised("hfl/chinese-llama-lora-7b", {"adapter_model.bin": "0" * 64, "README.md": "1" * 64})
    assert "is not the published one of Chinese-LLaMA-7B" in line
    (line,) = recognised("13B", {"consolidated.01.pth": "2" * 64})
    assert "is not the published one of 13B" in line
    assert recognised("7B", {"consolidated.01.pth": "2" * 64}) == recognised("mine", {"adapter_model.bin": "3"}) == []
