"""Merging is checked against PEFT applied step by step, and against a merge in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paddock import manifest
from paddock.config import MergeConfig
from paddock.errors import ConfigError, ModelError, OutputError
from paddock.merge import plan_text
from tests.merge_lab import PROJECTIONS, Lab, configure, edit, live_logits, merged_logits, weights


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r".*layers\.1.*q_proj": 2, "down_proj": 7},
        "alpha_pattern": {"layers.0.mlp.up_proj": 3, "^model.layers.1.self_attn.k_proj": 9},
        "use_rslora": True,
    },
    "dora": {"use_dora": True, "target_modules": [*PROJECTIONS, "embed_tokens"]},
    "bias": {"bias": "all"},
    "lora_only": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head", "input_layernorm", "layers.1.mlp.up_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [3, 90], "lm_head": [5]}},
    "some_layers": {"layers_to_transform": [1], "exclude_modules": ["k_proj"]},
    "pattern": {"target_modules": r".*\.1\..*(q|up)_proj"},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_is_what_peft_computes(lab: Lab, feature: str) -> None:
    base = lab.base(attention_bias=True)
    adapter = lab.adapter(base, "adapter", **FEATURES[feature])
    merged = lab.merge(base, adapter, prove_prompts=3)
    torch.testing.assert_close(merged_logits(merged), live_logits(base, adapter), atol=1e-4, rtol=1e-4)
    proof = manifest.check(merged, "model").extra["merged_vs_adapter"]
    assert proof["top1_agreement"] == 1
    assert proof["max_abs_logit_diff"] < 1e-3
    assert (live_logits(base, adapter) - merged_logits(base)).abs().max() > 0.1  # the adapter does something


TIED: dict[str, tuple[dict[str, Any], int | None, bool]] = {
    "projections": ({}, None, True),
    "ensured": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, None, True),
    "rows": ({"trainable_token_indices": [1, 7]}, None, True),
    "embedding alone": ({"modules_to_save": ["embed_tokens"]}, None, False),
    "both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, 101, False),
    "lora on the head": ({"target_modules": ["lm_head", "v_proj"]}, None, False),
    "grown": ({"modules_to_save": ["embed_tokens"]}, 101, False),
}


@pytest.mark.parametrize("case", TIED)
def test_tied_weights(lab: Lab, case: str) -> None:
    config, rows, tied = TIED[case]
    base = lab.base(tie_word_embeddings=True)
    adapter = lab.adapter(base, "adapter", rows=rows, **config)
    merged = lab.merge(base, adapter)
    expected = live_logits(base, adapter)
    torch.testing.assert_close(merged_logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in weights(merged)) is not tied


def test_grown_tied_embedding_without_a_head_is_the_head_too(lab: Lab) -> None:
    base = lab.base(tie_word_embeddings=True)
    adapter = lab.adapter(base, "adapter", rows=101, modules_to_save=["embed_tokens"])
    edit(adapter, lambda tensors: [tensors.pop(n) for n in list(tensors) if "lm_head" in n])
    merged = lab.merge(base, adapter)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(model.lm_head.weight) == 101


def test_chain_that_grows_twice(assets: Path, lab: Lab) -> None:
    adapters = [assets / "adapters" / name for name in ("zh-llama", "zh-alpaca")]
    merged = lab.merge(assets / "base", *adapters)
    config = json.loads((merged / "config.json").read_text())
    found = weights(merged)
    assert config["vocab_size"] == len(found["lm_head.weight"]) == len(found["model.embed_tokens.weight"])
    torch.testing.assert_close(merged_logits(merged), live_logits(assets / "base", *adapters), atol=1e-5, rtol=1e-5)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (adapters[-1] / name).read_bytes()
    assert (merged / "generation_config.json").is_file()
    assert (merged / "README.md").is_file()
    with pytest.raises(ModelError, match=r"zh-llama: its tokenizer has \d+ tokens, the model it meets \d+"):
        lab.merge(merged, adapters[0], name="back")
    for file in merged.iterdir():  # the same directory wherever it is made
        assert str(lab.directory).encode() not in file.read_bytes()
        assert str(assets).encode() not in file.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once(lab: Lab, dtype: torch.dtype) -> None:
    base = lab.base(dtype=dtype)
    adapters = [lab.adapter(base, f"a{n}", seed=n, use_rslora=True) for n in range(3)]
    merged = weights(lab.merge(base, *adapters, prove_prompts=0))
    equal = total = 0
    for name, weight in weights(base).items():
        exact = weight.double()
        for adapter in adapters:
            tensors = load_file(adapter / "adapter_model.safetensors")
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{prefix}.lora_A.weight" in tensors:
                left, right = (tensors[f"{prefix}.lora_{side}.weight"].double() for side in "BA")
                exact += 6 / 4**0.5 * (left @ right)
        assert merged[name].dtype == dtype
        equal += int((merged[name] == exact.to(dtype)).sum())
        total += exact.numel()
    assert equal / total >= 0.999


def test_dtype_is_taken_and_said(lab: Lab) -> None:
    base = lab.base()
    adapter = lab.adapter(base, "a")
    configure(adapter, enable_lora=None, merge_weights=False)  # keys of 2023 that say nothing are no mistake
    merged = lab.merge(base, adapter, dtype="bfloat16", prove_prompts=2, min_top1_agreement=0.5)
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in weights(merged).values()} == {torch.bfloat16}


def test_input_files_do_not_matter(lab: Lab) -> None:
    whole, cut = lab.base(), lab.base("cut", shards="60KB")
    adapter = lab.adapter(whole, "a")
    bin_base, bin_adapter = (Path(shutil.copytree(d, f"{d}-bin")) for d in (whole, adapter))
    for directory, stem in ((bin_base, "pytorch_model"), (bin_adapter, "adapter_model")):
        (file,) = directory.glob("*.safetensors")
        torch.save(load_file(file), directory / f"{stem}.bin")
        file.unlink()
    expected = lab.merge(whole, adapter, name="m0")
    for number, (base, lora) in enumerate([(cut, adapter), (bin_base, adapter), (whole, bin_adapter)], 1):
        found = lab.merge(base, lora, name=f"m{number}")
        assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    sharded = lab.merge(cut, adapter, name="sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    torch.testing.assert_close(weights(sharded), weights(expected), atol=0, rtol=0)
    torch.testing.assert_close(merged_logits(sharded), merged_logits(expected), atol=0, rtol=0)


def test_ray_tasks_write_the_same(lab: Lab, ray_cluster: Any) -> None:
    base = lab.base()
    adapter = lab.adapter(base, "a")
    here = lab.merge(base, adapter, name="here", max_shard_size="60KB", prove_prompts=0)
    there = lab.merge(base, adapter, name="there", max_shard_size="60KB", prove_prompts=0, num_workers=2)
    assert manifest.verify(here).hash == manifest.verify(there).hash
    edit(adapter, lambda tensors: tensors[next(n for n in tensors if "lora_B" in n)].fill_(float("inf")))
    with pytest.raises(ModelError, match="infinite"):
        lab.merge(base, adapter, name="broken", max_shard_size="60KB", prove_prompts=0, num_workers=2)
    assert not (lab.directory / "broken").exists()


def test_threads_write_the_same_without_ray(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lab.base()
    adapters = [lab.adapter(base, f"a{n}", seed=n) for n in range(2)]
    one = lab.merge(base, *adapters, name="one", max_shard_size="60KB", prove_prompts=0, num_workers=1)
    monkeypatch.setattr("paddock.shard_tasks._SHARE", 1)
    monkeypatch.setattr("paddock.cluster.is_there", lambda: False)
    monkeypatch.setattr("paddock.cluster.connect", None)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    threads = torch.get_num_threads()
    several = lab.merge(base, *adapters, name="several", max_shard_size="60KB", prove_prompts=0)
    assert manifest.verify(one).hash == manifest.verify(several).hash
    assert manifest.verify(one).extra["delta_norms"] == manifest.verify(several).extra["delta_norms"]
    assert torch.get_num_threads() == threads
    edit(adapters[0], lambda tensors: tensors[next(n for n in tensors if "lora_B" in n)].fill_(float("inf")))
    with pytest.raises(ModelError, match="infinite"):
        lab.merge(base, *adapters, name="broken", max_shard_size="60KB", prove_prompts=0)
    assert not (lab.directory / "broken").exists()


def test_again_does_nothing_and_other_is_refused(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = lab.base()
    adapter = lab.adapter(base, "a")
    merged = lab.merge(base, adapter)
    with monkeypatch.context() as patch:
        patch.setattr("paddock.merge.write_shards", None)
        lab.merge(base, adapter, num_workers=4, prove_prompts=1)
    assert "nothing to do" in capsys.readouterr().out
    before = manifest.verify(merged).hash
    with pytest.raises(OutputError, match="dtype"):
        lab.merge(base, adapter, dtype="float16")
    other = lab.adapter(base, "b", seed=2)
    with pytest.raises(OutputError, match=r"lora_model\.0"):
        lab.merge(base, other)
    assert manifest.verify(merged).hash == before
    lab.merge(base, other, overwrite=True)
    assert manifest.verify(merged).hash != before


def test_crash_and_failed_proof_leave_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lab.base()
    adapter = lab.adapter(base, "a")
    (lab.directory / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("paddock.merge.write_index", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            lab.merge(base, adapter, name="out/merged")
    with pytest.raises(ModelError, match="agrees with base \\+ adapters on 1"):
        lab.merge(base, adapter, name="out/merged", min_top1_agreement=1.1)
    assert not list((lab.directory / "out").iterdir())


def test_proof_sees_a_wrong_merge(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lab.base()
    adapter = lab.adapter(base, "a")
    monkeypatch.setattr("paddock.merge_operations.AddLora.open", lambda _self, _sources: lambda _weight, _start: None)
    with pytest.raises(ModelError, match="min_top1_agreement"):
        lab.merge(base, adapter)


def test_checkpoint_is_an_adapter(lab: Lab) -> None:
    base = lab.base()
    plain = lab.adapter(base, "a")
    checkpoint = Path(shutil.copytree(plain, lab.directory / "checkpoint-8"))
    (checkpoint / "trainer_state").mkdir()
    (checkpoint / "trainer_state" / "state.json").write_text("{}")
    manifest.commit(checkpoint, "checkpoint", {}, {})
    one, other = lab.merge(base, plain, name="m0"), lab.merge(base, checkpoint, name="m1")
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    (checkpoint / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(OutputError, match=r"adapter_model\.safetensors"):
        lab.merge(base, checkpoint, name="m2")


def _drop(name: str) -> Callable[[Path], None]:
    return lambda adapter: edit(adapter, lambda t: t.__delitem__(next(n for n in t if name in n)))


def _add(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda adapter: edit(adapter, lambda t: t.__setitem__(name, torch.ones(shape)))


def _values(**values: Any) -> Callable[[Path], None]:
    return lambda adapter: configure(adapter, **values)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown tensor": (_add("base_model.model.model.layers.0.secret.weight", 2), r"layers\.0\.secret\.weight"),
    "not told": (_add("base_model.model.model.norm.weight", 64), r"model\.norm\.weight"),
    "A alone": (_drop("lora_B"), r"lora_B\.weight is missing"),
    "shape": (_add("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", 4, 65), r"\(4, 65\).*\(4, 64\)"),
    "rank": (_values(r=5), r"lora_A\.weight is \(4, 64\).*\(5, 64\)"),
    "small rows": (_add("base_model.model.lm_head.weight", 90, 64), r"90 rows.*96"),
    "one side grows": (_add("base_model.model.lm_head.weight", 99, 64), r"96 to 99 rows.*embed_tokens"),
    "replication": (_values(layer_replication=[[0, 1], [0, 1]]), "layer_replication"),
    "alora": (_values(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "unknown key": (_values(enable_lora=[True]), "enable_lora"),
    "pissa": (_values(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "not lora": (_values(peft_type="IA3"), "peft_type is 'IA3'"),
    "target": (_values(target_modules=["w_q"]), "does not fit this base"),
    "no configuration": (lambda a: (a / "adapter_config.json").unlink(), r"no adapter_config\.json"),
    "not JSON": (lambda a: (a / "adapter_config.json").write_text("{") and None, "not JSON"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "no weights"),
    "damaged": (lambda a: (a / "adapter_model.safetensors").write_bytes(b"x") and None, "unreadable as safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_adapter_that_does_not_fit_is_refused_by_name(lab: Lab, case: str) -> None:
    base = lab.base()
    adapter = lab.adapter(base, "adapter")
    breaks, message = BROKEN[case]
    breaks(adapter)
    with pytest.raises(ModelError, match=message) as caught:
        lab.merge(base, adapter, name="out/merged")
    assert "\n" not in str(caught.value)
    assert not (lab.directory / "out").exists()


def test_smaller_tokenizer_is_refused(assets: Path, lab: Lab) -> None:
    base, adapter = assets / "base", Path(shutil.copytree(assets / "adapters/zh-llama", lab.directory / "zh"))
    grown = lab.merge(base, adapter, prove_prompts=0)
    lora = lab.adapter(grown, "lora", target_modules=["q_proj"])
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(base / name, lora / name)
    with pytest.raises(ModelError, match=r"lora: its tokenizer has 750 tokens, the model it meets \d+"):
        lab.merge(grown, lora, name="out")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(assets / "adapters/zh-alpaca" / name, lora / name)
    with pytest.raises(ModelError, match=r"\d+ tokens, the embedding \d+ rows"):
        lab.merge(grown, lora, name="out")


def test_base_that_is_none_is_refused(lab: Lab) -> None:
    base = lab.base()
    with pytest.raises(ModelError, match="no such directory"):
        lab.merge(lab.directory / "nothing")
    (base / "model.safetensors").rename(base / "weights")
    with pytest.raises(ModelError, match="no weights"):
        lab.merge(base)
    tensors = load_file(base / "weights")
    missing = tensors.pop("model.norm.weight")
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        lab.merge(base)
    save_file({**tensors, "model.norm.weight": missing}, base / "model.safetensors")
    with pytest.raises(ConfigError, match="max_shard_size"):
        lab.merge(base, max_shard_size="two")
    (base / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        lab.merge(base)


def test_plan_says_everything_and_writes_nothing(lab: Lab) -> None:
    base = lab.base()
    adapter = lab.adapter(base, "a", rows=99, modules_to_save=["embed_tokens", "lm_head"])
    config = MergeConfig(base_model=str(base), lora_model=(str(adapter),), output_dir=str(lab.directory / "out"))
    text = plan_text(config)
    assert "lm_head.weight 99x64 float32; replaced by adapter 1" in text
    assert "LoRA of adapter 1, scaling 1.5" in text
    assert not (lab.directory / "out").exists()
