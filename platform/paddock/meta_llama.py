"""Meta's own LLaMA layout: names, shard axes, hyper-parameters, the order of rotary dimensions.

`consolidated.NN.pth` holds a model-parallel share of every tensor, `params.json` what Meta's `ModelArgs`
takes. Meta interleaves the two halves of a head's rotary pairs, Hugging Face keeps them apart: `permute`
of transformers' `convert_llama_weights_to_hf.py` (last in transformers 4), undone here by `unpermute`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paddock.errors import ModelError

# Meta's name -> Hugging Face's, and the axis that model parallelism cuts (None: every shard has it all).
_LAYER: Mapping[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
# tok_embeddings is cut along its features in LLaMA 1 and 2, along its rows later: its shape tells.
_TOP: Mapping[str, tuple[str, int | None]] = {
    EMBEDDING: ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    HEAD: ("lm_head.weight", 0),
}
_MODEL_ARGS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier"}
_MODEL_ARGS |= {"norm_eps", "rope_theta", "max_seq_len", "use_scaled_rope"}


@dataclass(frozen=True)
class Place:
    """Where one tensor of Meta's belongs."""

    name: str
    """Hugging Face's name."""
    axis: int | None
    """The axis that model parallelism cuts."""
    heads: int | None
    """For a rotary projection, the number of heads in its rows."""


@dataclass(frozen=True)
class Params:
    """Meta's hyper-parameters, under Meta's names."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    norm_eps: float
    ffn_dim: int
    """Rows of w1: what multiple_of and ffn_dim_multiplier come to."""
    rope_theta: float
    max_seq_len: int | None

    def place(self, name: str) -> Place | None:
        """Where a tensor belongs; None for a name that is not LLaMA's."""
        if name in _TOP:
            return Place(*_TOP[name], None)
        match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
        if match is None or match[2] not in _LAYER or int(match[1]) >= self.n_layers:
            return None
        target, axis = _LAYER[match[2]]
        heads = {"attention.wq": self.n_heads, "attention.wk": self.n_kv_heads}.get(match[2])
        return Place(f"model.layers.{match[1]}.{target}.weight", axis, heads)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the whole model, by Meta's names, with its shape (out, in)."""
        head_dim = self.dim // self.n_heads
        kv_dim = self.n_kv_heads * head_dim
        square, kv, wide = (self.dim, self.dim), (kv_dim, self.dim), (self.ffn_dim, self.dim)
        layer: dict[str, tuple[int, ...]] = {
            "attention.wq": square,
            "attention.wk": kv,
            "attention.wv": kv,
            "attention.wo": square,
            "feed_forward.w1": wide,
            "feed_forward.w2": (self.dim, self.ffn_dim),
            "feed_forward.w3": wide,
            "attention_norm": (self.dim,),
            "ffn_norm": (self.dim,),
        }
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, self.dim)}
        for number in range(self.n_layers):
            shapes |= {f"layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        return shapes | {"norm.weight": (self.dim,), HEAD: (self.vocab_size, self.dim)}


def is_buffer(name: str) -> bool:
    """`rope.freqs` and its older spellings: computed from the hyper-parameters, not weights."""
    return name == "rope.freqs" or name.endswith(".rope.freqs")


def read_params(values: Mapping[str, Any], file: Path, rows: int) -> Params:
    """Hyper-parameters from `params.json`.

    rows: the embedding's, which the file leaves to the tokenizer where it says -1. Raises ModelError for a
    key that is missing, unknown or contradicts the tensors.
    """
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        if not isinstance(values.get(key), int | float):
            raise ModelError(f"{file}: {key} is {values.get(key)!r}, not a number; get Meta's params.json again")
    for key, value in values.items():
        if key not in _MODEL_ARGS and value is not None:
            raise ModelError(f"{file}: {key}={value!r} is not a hyper-parameter of LLaMA 1 or 2; it would be lost")
    if values.get("use_scaled_rope"):
        raise ModelError(f"{file}: use_scaled_rope=true, but not by how much: take the Hugging Face release instead")
    vocab_size = values.get("vocab_size", -1)
    if vocab_size not in (-1, rows):
        raise ModelError(f"{file}: vocab_size is {vocab_size}, {EMBEDDING} has {rows} rows; the files do not match")
    dim, n_heads = int(values["dim"]), int(values["n_heads"])
    if dim % n_heads:
        raise ModelError(f"{file}: dim {dim} is not a multiple of n_heads {n_heads}")
    return Params(
        dim=dim,
        n_layers=int(values["n_layers"]),
        n_heads=n_heads,
        n_kv_heads=int(values.get("n_kv_heads") or n_heads),
        vocab_size=rows,
        norm_eps=float(values["norm_eps"]),
        ffn_dim=ffn_dim(dim, int(values.get("multiple_of", 256)), values.get("ffn_dim_multiplier")),
        rope_theta=float(values.get("rope_theta") or 10000.0),
        max_seq_len=values.get("max_seq_len"),
    )


def ffn_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The width of the feed-forward layer, as Meta's `FeedForward` computes it."""
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def params_json(params: Params) -> dict[str, Any]:
    """`params.json`, with the multiple_of and ffn_dim_multiplier that come to the width at hand."""
    values: dict[str, Any] = {"dim": params.dim}
    powers = [256, *(2**exponent for exponent in (7, 6, 5, 4, 3, 2, 1, 0, 9, 10, 11, 12))]
    plain = [power for power in powers if ffn_dim(params.dim, power, None) == params.ffn_dim]
    if plain:
        values["multiple_of"] = plain[0]
    else:
        multiple_of = next(power for power in powers if params.ffn_dim % power == 0)
        values["multiple_of"] = multiple_of
        # Any width in the last multiple rounds up to it; its middle is safe from rounding.
        values["ffn_dim_multiplier"] = (params.ffn_dim - multiple_of / 2 + 0.5) / int(2 * (4 * params.dim) / 3)
    values |= {"n_heads": params.n_heads}
    if params.n_kv_heads != params.n_heads:
        values["n_kv_heads"] = params.n_kv_heads
    values |= {"n_layers": params.n_layers, "norm_eps": params.norm_eps}
    if params.rope_theta != 10000.0:
        values["rope_theta"] = params.rope_theta
    return values | {"vocab_size": params.vocab_size}


def llama_config(
    params: Params, positions: int, dtype: torch.dtype, special: dict[str, int], *, tied: bool
) -> dict[str, Any]:
    """Hugging Face's `config.json`. special: the tokenizer's bos_token_id and eos_token_id."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": params.dim // params.n_heads,
        "hidden_act": "silu",
        "hidden_size": params.dim,
        "initializer_range": 0.02,
        "intermediate_size": params.ffn_dim,
        "max_position_embeddings": positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": params.n_heads,
        "num_hidden_layers": params.n_layers,
        "num_key_value_heads": params.n_kv_heads,
        "rms_norm_eps": params.norm_eps,
        "rope_parameters": {"rope_theta": params.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": params.vocab_size,
        **special,
    }


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Meta's rows of wq or wk, (heads * head_dim, dim), in Hugging Face's order."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face's rows of q_proj or k_proj in Meta's order."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
