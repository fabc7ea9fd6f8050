"""The demo's weights: a tiny LLaMA, and two adapters that grow its vocabulary.

Weights are uniform draws of PCG64, scaled: integers and single multiplications come out alike on every
processor, which training, matrix products and the tails of a normal distribution do not promise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

Weights = dict[str, torch.Tensor]

DIM, N_LAYERS, N_HEADS = 256, 4, 4  # heads of 64, which vLLM's attention supports on every device
MULTIPLE_OF, NORM_EPS, MAX_POSITIONS = 64, 1e-6, 4096
# Meta's feed-forward width: two thirds of 4 x dim, rounded up to the multiple.
FFN_DIM = MULTIPLE_OF * -(-(8 * DIM // 3) // MULTIPLE_OF)
LORA_R, LORA_ALPHA = 8, 16
# PEFT's module name -> Meta's, with (out, in).
PROJECTIONS = {
    "self_attn.q_proj": ("attention.wq", DIM, DIM),
    "self_attn.k_proj": ("attention.wk", DIM, DIM),
    "self_attn.v_proj": ("attention.wv", DIM, DIM),
    "self_attn.o_proj": ("attention.wo", DIM, DIM),
    "mlp.gate_proj": ("feed_forward.w1", FFN_DIM, DIM),
    "mlp.up_proj": ("feed_forward.w3", FFN_DIM, DIM),
    "mlp.down_proj": ("feed_forward.w2", DIM, FFN_DIM),
}
EMBEDDING_STD, WEIGHT_STD, ADAPTER_STD = 0.1, 0.04, 0.01
HEAD_SCALE = 0.6  # of the embedding


class Draws:
    """Weights from a seed, always drawn in the same order."""

    def __init__(self, seed: int, stream: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64([seed, stream]))

    def uniform(self, rows: int, columns: int, std: float) -> torch.Tensor:
        """Values of the given standard deviation in float32, from +-sqrt(3) std."""
        draws = self._generator.integers(-(2**15), 2**15, size=(rows, columns), dtype=np.int32)
        scale = np.float32(std * math.sqrt(3) / 2**15)
        return torch.from_numpy(draws.astype(np.float32) * scale)


def base_weights(seed: int, vocab_size: int) -> Weights:
    """The base under its Hugging Face names.

    The head reads the embedding's own directions, as a pretrained model's nearly does, and the embedding is
    small enough for the attention's output to count beside it: from a standard deviation of 1, the demo's
    training learns the form of the answers and nothing of what they say.
    """
    draws = Draws(seed, 0)
    embedding = draws.uniform(vocab_size, DIM, EMBEDDING_STD)
    weights = {"model.embed_tokens.weight": embedding}
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = torch.ones(DIM)
        weights[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(DIM)
        for name, (_, rows, columns) in PROJECTIONS.items():
            weights[f"{prefix}.{name}.weight"] = draws.uniform(rows, columns, WEIGHT_STD)
    weights["model.norm.weight"] = torch.ones(DIM)
    weights["lm_head.weight"] = embedding * HEAD_SCALE
    return weights


def grown_rows(seed: int, stream: int, embedding: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and head as an adapter saves them: the old rows moved a little, new ones at the end."""
    draws = Draws(seed, stream)
    new = draws.uniform(vocab_size - len(embedding), DIM, EMBEDDING_STD)
    grown = torch.cat([embedding + draws.uniform(len(embedding), DIM, ADAPTER_STD), new])
    return grown, grown * HEAD_SCALE


def adapter_weights(seed: int, stream: int, embedding: torch.Tensor, head: torch.Tensor) -> Weights:
    """A PEFT adapter's tensors: LoRA on every projection, and the saved embedding and head."""
    draws = Draws(seed, stream)
    prefix = "base_model.model"
    weights = {f"{prefix}.model.embed_tokens.weight": embedding, f"{prefix}.lm_head.weight": head}
    for layer in range(N_LAYERS):
        for name, (_, rows, columns) in PROJECTIONS.items():
            module = f"{prefix}.model.layers.{layer}.{name}"
            weights[f"{module}.lora_A.weight"] = draws.uniform(LORA_R, columns, ADAPTER_STD)
            weights[f"{module}.lora_B.weight"] = draws.uniform(rows, LORA_R, ADAPTER_STD)
    return weights


def meta_weights(weights: Weights) -> Weights:
    """The same weights as Meta released LLaMA: its names, and rotary pairs interleaved in wq and wk."""
    meta = {"tok_embeddings.weight": weights["model.embed_tokens.weight"]}
    for layer in range(N_LAYERS):
        for name, (meta_name, _, _) in PROJECTIONS.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            rotary = name.endswith(("q_proj", "k_proj"))
            meta[f"layers.{layer}.{meta_name}.weight"] = _interleave(weight) if rotary else weight
        names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
        for name, meta_name in names.items():
            meta[f"layers.{layer}.{meta_name}.weight"] = weights[f"model.layers.{layer}.{name}.weight"]
    meta["norm.weight"] = weights["model.norm.weight"]
    meta["output.weight"] = weights["lm_head.weight"]
    return meta


def _interleave(weight: torch.Tensor) -> torch.Tensor:
    """Undo `permute` of transformers' convert_llama_weights_to_hf.py, which splits a head's rotary pairs
    into a first and a second half."""
    rows, columns = weight.shape
    halves = weight.view(N_HEADS, 2, rows // N_HEADS // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns).contiguous()


def llama_config(vocab_size: int) -> dict[str, Any]:
    """`config.json` of the base."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": DIM // N_HEADS,
        "hidden_act": "silu",
        "hidden_size": DIM,
        "initializer_range": 0.02,
        "intermediate_size": FFN_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": N_HEADS,
        "num_hidden_layers": N_LAYERS,
        "num_key_value_heads": N_HEADS,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def generation_config() -> dict[str, Any]:
    return {"bos_token_id": 1, "do_sample": False, "eos_token_id": 2}


def meta_params(vocab_size: int) -> dict[str, Any]:
    """`params.json` beside Meta's weights."""
    return {
        "dim": DIM,
        "multiple_of": MULTIPLE_OF,
        "n_heads": N_HEADS,
        "n_layers": N_LAYERS,
        "norm_eps": NORM_EPS,
        "vocab_size": vocab_size,
    }


def adapter_config() -> dict[str, Any]:
    """PEFT's `adapter_config.json`; which base it belongs to is left to whoever loads it."""
    return {
        "base_model_name_or_path": "",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "peft_type": "LORA",
        "r": LORA_R,
        "target_modules": [name.rpartition(".")[2] for name in PROJECTIONS],
        "task_type": "CAUSAL_LM",
    }
