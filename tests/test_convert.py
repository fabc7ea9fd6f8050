"""Meta's layout to Hugging Face's and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from paddock import manifest, published
from paddock.config import ConvertConfig, MergeConfig
from paddock.convert import convert
from paddock.errors import ModelError, OutputError
from paddock.merge import merge
from paddock.meta_llama import ffn_dim


def run(source: Path, target: Path, **config: Any) -> Path:
    return convert(ConvertConfig(input_dir=str(source), output_dir=str(target), **config))


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    """A tiny LLaMA with grouped-query attention and a width that needs ffn_dim_multiplier, in float16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=224, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "grouped")
    return tmp_path / "grouped"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def load_meta(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(directory / "consolidated.00.pth", weights_only=True)
    return tensors


def cut(source: Path, target: Path, shards: int, embedding_axis: int = 1) -> Path:
    """Share Meta's weights out over shards as fairscale's model-parallel layers do."""
    target.mkdir()
    axes = {"wo": 1, "w2": 1, "tok_embeddings": embedding_axis, "attention_norm": None, "ffn_norm": None, "norm": None}
    for number in range(shards):
        share = {"rope.freqs": torch.ones(4)}
        for name, tensor in load_meta(source).items():
            axis = axes.get(name.split(".")[-2], 0)
            share[name] = tensor if axis is None else tensor.chunk(shards, axis)[number].clone()
        torch.save(share, target / f"consolidated.{number:02d}.pth")
    shutil.copyfile(source / "params.json", target / "params.json")
    return target


def test_demo_meta_weights_are_the_base(assets: Path, tmp_path: Path) -> None:
    converted, base = run(assets / "base_meta", tmp_path / "hf"), assets / "base"
    assert (converted / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert json.loads((converted / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert (converted / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    text = "问：\n患者咳嗽 cough？\n"
    ours, theirs = (AutoTokenizer.from_pretrained(directory) for directory in (converted, base))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours(text)["input_ids"][0] == ours.bos_token_id == 1
    assert manifest.verify(converted).kind == "model"


@pytest.mark.parametrize(("shards", "axis"), [(1, 1), (2, 1), (4, 1), (4, 0), (8, 1)])
def test_there_and_back_is_byte_equal(grouped: Path, tmp_path: Path, shards: int, axis: int) -> None:
    meta = run(grouped, tmp_path / "meta", output_type="pth")
    params = json.loads((meta / "params.json").read_text())
    assert params["n_kv_heads"] == 4
    assert ffn_dim(64, params["multiple_of"], params["ffn_dim_multiplier"]) == 224
    source = meta if shards == 1 else cut(meta, tmp_path / "cut", shards, axis)
    back = run(source, tmp_path / "back", max_position_embeddings=1024)
    assert (back / "model.safetensors").read_bytes() == (grouped / "model.safetensors").read_bytes()
    before, after = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (grouped, back))
    ids = torch.arange(96)[None]
    torch.testing.assert_close(after(ids).logits, before(ids).logits, atol=0, rtol=0)
    assert after.config.max_position_embeddings == 1024


def test_context_length_is_kept_or_inferred(grouped: Path, tmp_path: Path) -> None:
    meta = run(grouped, tmp_path / "meta", output_type="pth")
    assert _positions(run(meta, tmp_path / "noted")) == 1024
    (meta / "manifest.json").unlink()
    assert _positions(run(meta, tmp_path / "inferred")) == 2048


def test_buffers_and_published_files_are_told_of(
    grouped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = run(grouped, tmp_path / "tiny" / "7B", output_type="pth")
    assert "dropped" not in capsys.readouterr().out
    _tensors(rope__freqs=torch.ones(8))(meta)
    (meta / "manifest.json").unlink()
    found = manifest.sha256(meta / "consolidated.00.pth")
    converted = run(meta, tmp_path / "one")
    said = capsys.readouterr().out
    assert "rope.freqs: dropped" in said
    assert f"consolidated.00.pth: is not the published one of 7B: sha256 {found[:12]}" in said
    files = manifest.check(converted).extra["input_files"]
    assert files["input_dir"]["consolidated.00.pth"] == found
    monkeypatch.setitem(published._META, "7B", (found,))
    run(meta, tmp_path / "two")
    assert "consolidated.00.pth: is the published one of 7B" in capsys.readouterr().out


def _positions(directory: Path) -> int:
    return int(json.loads((directory / "config.json").read_text())["max_position_embeddings"])


def test_sharded_output_and_tied_weights(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    meta = run(tmp_path / "tied", tmp_path / "meta", output_type="pth")
    back = run(meta, tmp_path / "back", max_shard_size="60KB")
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 2
    torch.testing.assert_close(weights(back), weights(tmp_path / "tied"), atol=0, rtol=0)
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is True


def test_ray_tasks_write_what_one_process_does(grouped: Path, tmp_path: Path, ray_cluster: Any) -> None:
    meta = run(grouped, tmp_path / "meta", output_type="pth")
    here = run(meta, tmp_path / "here", max_shard_size="60KB", num_workers=1)
    there = run(meta, tmp_path / "there", max_shard_size="60KB", num_workers=2)
    files = [file.name for file in here.glob("model*")]
    assert len(files) > 3
    assert [(there / name).read_bytes() for name in files] == [(here / name).read_bytes() for name in files]


def test_tokenizer_one_directory_up(assets: Path, tmp_path: Path) -> None:
    for name in ("consolidated.00.pth", "params.json"):
        (tmp_path / "LLaMA" / "7B").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(assets / "base_meta" / name, tmp_path / "LLaMA" / "7B" / name)
    shutil.copyfile(assets / "base_meta" / "tokenizer.model", tmp_path / "LLaMA" / "tokenizer.model")
    converted = run(tmp_path / "LLaMA" / "7B", tmp_path / "hf")
    assert (converted / "tokenizer.model").is_file()
    assert "tokenizer.model" in manifest.check(converted).inputs


def test_merge_writes_meta_layout(assets: Path, tmp_path: Path) -> None:
    adapters = tuple(str(assets / "adapters" / name) for name in ("zh-llama", "zh-alpaca"))
    merged = {
        kind: merge(
            MergeConfig(
                base_model=str(assets / "base"), lora_model=adapters, output_type=kind, output_dir=str(tmp_path / kind)
            )
        )
        for kind in ("huggingface", "pth")
    }
    assert {f.name for f in merged["pth"].iterdir()} == {
        *("consolidated.00.pth", "params.json", "tokenizer.model", "README.md", "manifest.json")
    }
    assert manifest.verify(merged["pth"]).kind == "meta"
    back = run(merged["pth"], tmp_path / "back")
    expected = (merged["huggingface"] / "model.safetensors").read_bytes()
    assert (back / "model.safetensors").read_bytes() == expected


def test_ffn_dim_of_the_released_sizes() -> None:
    assert [ffn_dim(dim, 256, None) for dim in (4096, 5120, 6656, 8192)] == [11008, 13824, 17920, 22016]
    assert ffn_dim(8192, 4096, 1.3) == 28672


def _params(**values: Any) -> Callable[[Path], None]:
    def change(meta: Path) -> None:
        file = meta / "params.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def _tensors(**values: torch.Tensor | None) -> Callable[[Path], None]:
    def change(meta: Path) -> None:
        tensors = load_meta(meta) | {name.replace("__", "."): value for name, value in values.items()}
        tensors = {name: value for name, value in tensors.items() if value is not None}
        torch.save(tensors, meta / "consolidated.00.pth")

    return change


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no params": (lambda m: (m / "params.json").unlink(), r"no params\.json"),
    "no weights": (lambda m: (m / "consolidated.00.pth").unlink(), "no consolidated"),
    "first shard": (lambda m: (m / "consolidated.00.pth").rename(m / "consolidated.01.pth"), "some are missing"),
    "no dim": (_params(dim=None), "dim is None"),
    "layers": (_params(n_layers=3), r"layers\.2\..* is missing"),
    "fewer layers": (_params(n_layers=1), r"layers\.1\..*none of LLaMA's"),
    "heads": (_params(n_kv_heads=8), r"attention\.wk\.weight is \(32, 64\).*\(64, 64\)"),
    "vocabulary": (_params(vocab_size=97), "vocab_size is 97.*96 rows"),
    "unknown key": (_params(moe={"experts": 8}), "moe="),
    "scaled rope": (_params(use_scaled_rope=True), "use_scaled_rope"),
    "missing tensor": (_tensors(norm__weight=None), r"norm\.weight.*is missing"),
    "no head": (_tensors(output__weight=None), r"output\.weight.*is missing"),
    "unknown tensor": (_tensors(secret=torch.ones(2)), "secret"),
    "tokenizer": (lambda m: (m / "tokenizer.model").write_bytes(b"tiktoken"), "not a SentencePiece model"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_meta_directory_that_is_not_whole_is_refused(grouped: Path, tmp_path: Path, case: str) -> None:
    meta = run(grouped, tmp_path / "meta", output_type="pth")
    (meta / "manifest.json").unlink()
    breaks, message = BROKEN[case]
    breaks(meta)
    with pytest.raises(ModelError, match=message) as caught:
        run(meta, tmp_path / "out" / "hf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_what_meta_has_no_place_for_is_refused(grouped: Path, tmp_path: Path, key: str) -> None:
    file = grouped / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: True}))
    with pytest.raises(ModelError, match=f"no place for {key}"):
        run(grouped, tmp_path / "meta", output_type="pth")


def test_again_does_nothing_and_other_is_refused(
    grouped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = run(grouped, tmp_path / "meta", output_type="pth")
    run(grouped, tmp_path / "meta", output_type="pth")
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(OutputError, match="made with another configuration"):
        run(grouped, tmp_path / "meta")
    with pytest.raises(ModelError, match="no such directory"):
        run(meta / "nothing", tmp_path / "x")
