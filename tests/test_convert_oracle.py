"""Conversion against transformers 4's convert_llama_weights_to_hf.py, whose rules are written down here again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from paddock.config import ConvertConfig
from paddock.convert import convert


def meta(directory: Path, shards: int, heads: int, kv_heads: int, dim: int = 64, layers: int = 2) -> dict[str, Any]:
    """Random weights as Meta lays them out: every matrix cut along one axis, norms in every shard."""
    params: dict[str, Any] = {"dim": dim, "multiple_of": 32, "n_heads": heads, "n_layers": layers, "norm_eps": 1e-5}
    if kv_heads != heads:
        params["n_kv_heads"] = kv_heads
    hidden = 32 * ((int(2 * 4 * dim / 3) + 31) // 32)
    directory.mkdir()
    generator = torch.Generator().manual_seed(shards)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    norms = {f"layers.{n}.{name}.weight": random(dim) for n in range(layers) for name in ("attention_norm", "ffn_norm")}
    norms["norm.weight"] = random(dim)
    for number in range(shards):
        share = dict(norms)
        for n in range(layers):
            at, ff, width = f"layers.{n}.attention", f"layers.{n}.feed_forward", dim // heads
            share[f"{at}.wq.weight"] = random(dim // shards, dim)
            share[f"{at}.wk.weight"] = random(kv_heads * width // shards, dim)
            share[f"{at}.wv.weight"] = random(kv_heads * width // shards, dim)
            share[f"{at}.wo.weight"] = random(dim, dim // shards)
            share[f"{ff}.w1.weight"] = random(hidden // shards, dim)
            share[f"{ff}.w2.weight"] = random(dim, hidden // shards)
            share[f"{ff}.w3.weight"] = random(hidden // shards, dim)
        share["tok_embeddings.weight"] = random(96, dim // shards)
        share["output.weight"] = random(96 // shards, dim)
        share["rope.freqs"] = torch.ones(dim // heads // 2)
        torch.save(share, directory / f"consolidated.{number:02d}.pth")
    (directory / "params.json").write_text(json.dumps({**params, "vocab_size": -1}))
    return params


def old_script(directory: Path, params: dict[str, Any], shards: int) -> dict[str, torch.Tensor]:
    """What write_model of the old script made, after its formulas."""
    loaded = [torch.load(directory / f"consolidated.{n:02d}.pth", weights_only=True) for n in range(shards)]
    dim, heads = params["dim"], params["n_heads"]
    width, kv_heads = dim // heads, params.get("n_kv_heads", heads)
    kv_dim = kv_heads * width

    def permute(w: torch.Tensor, n_heads: int, dim1: int, dim2: int) -> torch.Tensor:
        return w.view(n_heads, dim1 // n_heads // 2, 2, dim2).transpose(1, 2).reshape(dim1, dim2)

    def rows(name: str, n_heads: int) -> torch.Tensor:
        parts = [share[name].view(n_heads // shards, width, dim) for share in loaded]
        return torch.cat(parts, dim=0).reshape(n_heads * width, dim)

    def joined(name: str, axis: int) -> torch.Tensor:
        return torch.cat([share[name] for share in loaded], dim=axis)

    state = {}
    for n in range(params["n_layers"]):
        old, new = f"layers.{n}", f"model.layers.{n}"
        state[f"{new}.self_attn.q_proj.weight"] = permute(rows(f"{old}.attention.wq.weight", heads), heads, dim, dim)
        wk = rows(f"{old}.attention.wk.weight", kv_heads)
        state[f"{new}.self_attn.k_proj.weight"] = permute(wk, kv_heads, kv_dim, dim)
        state[f"{new}.self_attn.v_proj.weight"] = rows(f"{old}.attention.wv.weight", kv_heads)
        state[f"{new}.self_attn.o_proj.weight"] = joined(f"{old}.attention.wo.weight", 1)
        state[f"{new}.mlp.gate_proj.weight"] = joined(f"{old}.feed_forward.w1.weight", 0)
        state[f"{new}.mlp.down_proj.weight"] = joined(f"{old}.feed_forward.w2.weight", 1)
        state[f"{new}.mlp.up_proj.weight"] = joined(f"{old}.feed_forward.w3.weight", 0)
        state[f"{new}.input_layernorm.weight"] = loaded[0][f"{old}.attention_norm.weight"]
        state[f"{new}.post_attention_layernorm.weight"] = loaded[0][f"{old}.ffn_norm.weight"]
    state["model.norm.weight"] = loaded[0]["norm.weight"]
    state["model.embed_tokens.weight"] = joined("tok_embeddings.weight", 1)
    state["lm_head.weight"] = joined("output.weight", 0)
    return state


@pytest.mark.parametrize(
    ("shards", "heads", "kv_heads"), [(1, 4, 4), (2, 4, 4), (4, 4, 4), (8, 8, 8), (2, 8, 4), (8, 16, 8)]
)
def test_result_is_the_old_scripts(tmp_path: Path, shards: int, heads: int, kv_heads: int) -> None:
    params = meta(tmp_path / "meta", shards, heads, kv_heads)
    place = convert(ConvertConfig(input_dir=str(tmp_path / "meta"), output_dir=str(tmp_path / "hf")))
    found, expected = load_file(Path(place) / "model.safetensors"), old_script(tmp_path / "meta", params, shards)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
