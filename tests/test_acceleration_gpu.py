"""The same on CUDA, where rounding is bfloat16's: no farther from the exact result than the plain model is.

Needs neither the session's fixtures nor Ray: `pytest --noconftest tests/test_acceleration_gpu.py` will do.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora as peft_lora
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from paddock import checkpoint, float8, lora
from paddock.acceleration import PlainLora, adamw, training_module
from paddock.attention import row_borders, varlen_attention
from paddock.benchmark.train_rows import make_rows, packed
from paddock.config_parts import LoraPart, TrainPart
from paddock.feed import on_device
from paddock.loss import SupervisedLoss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

GPU = torch.device("cuda")
ROWS = make_rows(24, 1000, 96, seed=0)
BATCH = packed([ROWS[:12], ROWS[12:]], 1100)


def _adapter(**keys: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1001, num_key_value_heads=2, initializer_range=0.06, **shape)
    model = lora.attach(LlamaForCausalLM(config).bfloat16(), LoraPart.model_validate({"r": 8, **keys}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def _gradient(module: SupervisedLoss, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    value = module(**{name: tensor.to(GPU) for name, tensor in batch.items()})
    value.backward()
    return value.item(), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double()


@pytest.fixture(scope="module")
def exact() -> tuple[float, torch.Tensor]:
    """In float32, of the very weights that bfloat16 holds."""
    return _gradient(SupervisedLoss(_adapter().float().to(GPU)), BATCH)


@pytest.fixture(scope="module")
def plain_error(exact: Any) -> float:
    """The gradient's, of the plain bfloat16 model with a mask."""
    _, gradient = _gradient(SupervisedLoss(_adapter().to(GPU)), BATCH)
    return float((gradient - exact[1]).norm() / exact[1].norm())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_the_gradient_is_as_exact_as_the_plain_models(
    exact: Any, plain_error: float, attention: str, compiled: bool
) -> None:
    recipe = TrainPart.model_validate({"attn_implementation": attention, "torch_compile": compiled})
    value, gradient = _gradient(training_module(_adapter(), recipe, GPU).train(), BATCH)
    assert value == pytest.approx(exact[0], rel=2e-3)
    error = float((gradient - exact[1]).norm() / exact[1].norm())
    print(f"gradient error {error:.4f}, plain {plain_error:.4f}")
    assert error < 1.5 * plain_error


@pytest.mark.parametrize("keys", [{"gradient_checkpointing": "selective"}, {"gradient_checkpointing": True}], ids=str)
def test_recomputation_changes_nothing(exact: Any, plain_error: float, keys: dict[str, Any]) -> None:
    torch._dynamo.reset()
    value, gradient = _gradient(training_module(_adapter(), TrainPart.model_validate(keys), GPU).train(), BATCH)
    torch._functorch.config.activation_memory_budget = 1.0
    assert value == pytest.approx(exact[0], rel=2e-3)
    assert float((gradient - exact[1]).norm() / exact[1].norm()) < 1.5 * plain_error


def test_fp8_follows_the_exact_gradient(exact: Any) -> None:
    torch._dynamo.reset()
    value, gradient = _gradient(training_module(_adapter(), TrainPart(fp8=True), GPU).train(), BATCH)
    error = float((gradient - exact[1]).norm() / exact[1].norm())
    print(f"fp8: loss {value / exact[0] - 1:.5f}, gradient error {error:.4f}")
    assert value == pytest.approx(exact[0], rel=2e-2)
    assert error < 0.25


def test_varlen_is_each_rows_own_attention() -> None:
    torch.manual_seed(0)
    lengths = [1, 70, 3, 130, 52]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(GPU)
    query = torch.randn(1, 4, 256, 64, device=GPU, dtype=torch.bfloat16)
    key, value = (torch.randn(1, 2, 256, 64, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    borders = row_borders(positions)
    assert borders["max_length_q"] == 256
    found, _ = varlen_attention(nn.Identity(), query, key, value, None, scaling=0.125, **borders)

    def own(dtype: torch.dtype) -> torch.Tensor:
        rows = [states.to(dtype).split(lengths, dim=2) for states in (query, key, value)]
        each = [
            scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)
            for q, k, v in zip(*rows, strict=True)
        ]
        return torch.cat(each, dim=2).transpose(1, 2).float()

    exact = own(torch.float32)
    assert (found.float() - exact).norm() < 1.2 * (own(torch.bfloat16) - exact).norm() + 1e-6


def test_the_kernels_float8_product_is_the_formulas() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 128, bias=False).bfloat16().requires_grad_(False)
    x = torch.randn(32, 256).bfloat16()
    formula = float8.Float8Linear(linear)(x).float()
    kernel = float8.Float8Linear(copy.deepcopy(linear).to(GPU))(x.to(GPU)).float().cpu()
    assert (kernel - formula).norm() / formula.norm() < 5e-3


def test_batches_arrive_whole_and_in_order() -> None:
    batches = [{"x": torch.full((1 << 16,), i)} for i in range(20)]
    for i, batch in enumerate(on_device(batches, GPU)):
        assert bool((batch["x"] == i).all())
    assert adamw([nn.Parameter(torch.ones(2, device=GPU))], TrainPart()).defaults["fused"]


def _loss_curve(module: SupervisedLoss, recipe: TrainPart, steps: int) -> list[float]:
    optimizer = adamw([p for p in module.parameters() if p.requires_grad], recipe)
    curve = []
    for _ in range(steps):
        value = module(**{name: tensor.to(GPU) for name, tensor in BATCH.items()}) / 1000
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(value.item())
    return curve


@pytest.mark.parametrize("keys", [{}, {"torch_compile": False, "gradient_checkpointing": True}], ids=str)
def test_a_base_in_4_bits_learns_an_adapter_of_the_base_as_it_was(keys: dict[str, Any], tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch._dynamo.reset()
    recipe = TrainPart.model_validate({"load_in_4bit": True, "learning_rate": 1e-2, **keys})
    model = _adapter()
    in_layers = sum(m.weight.numel() for m in model.model.model.layers.modules() if isinstance(m, peft_lora.Linear))
    trainable, _ = model.get_nb_trainable_parameters()
    module = training_module(model, recipe, GPU).train()
    quantised = [m for m in module.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) == 4 * 7
    assert {m.weight.dtype for m in quantised} == {torch.uint8}
    assert all(isinstance(m, PlainLora) for m in module.modules() if isinstance(m, peft_lora.Linear))
    assert sum(2 * m.weight.numel() for m in quantised) == in_layers  # two in a byte
    assert model.get_nb_trainable_parameters()[0] == trainable
    curve = _loss_curve(module, recipe, 8)
    print(curve)
    assert curve[-1] < 0.8 * curve[0]
    # The same adapter over the 16-bit base is about as good.
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(_adapter().unload(), tmp_path)
    with torch.no_grad():
        value = SupervisedLoss(plain.to(GPU))(**{name: tensor.to(GPU) for name, tensor in BATCH.items()}) / 1000
    assert value.item() == pytest.approx(curve[-1], rel=0.25)


def test_dropout_learns_as_without(exact: Any) -> None:
    """Compiled masks are others than PEFT's; what they leave is the same on average."""
    torch._dynamo.reset()
    module = training_module(_adapter(lora_dropout=0.1), TrainPart(), GPU).train()
    assert all(isinstance(m, PlainLora) for m in module.modules() if isinstance(m, peft_lora.Linear))

    def drawn(seed: int) -> tuple[float, torch.Tensor]:
        module.zero_grad()
        checkpoint.seed_micro_batch(seed, 0, 0)
        return _gradient(module, BATCH)

    first, again = drawn(1), drawn(1)
    assert first[0] == again[0] != drawn(2)[0]
    mean = torch.stack([drawn(seed)[1] for seed in range(16)]).mean(dim=0)
    assert float(mean @ exact[1] / exact[1].square().sum()) == pytest.approx(1, abs=0.05)
