"""What makes a step fast leaves what it computes: the loss, its gradient, and the adapter's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners import lora as peft_lora
from torch import nn
from torch.nn.functional import cross_entropy

from paddock import checkpoint, float8, lora, loss
from paddock.acceleration import AlignedHead, PlainLora, _align, adamw, training_module
from paddock.benchmark.train_rows import make_rows, packed
from paddock.config_parts import LoraPart, ModelConfig, TrainPart
from paddock.errors import ConfigError
from paddock.feed import on_device
from paddock.loss import SupervisedLoss, summed_cross_entropy

CPU = torch.device("cpu")
ROWS = make_rows(12, 1000, 96, seed=0)


def _adapter(base_model: Path, **keys: Any) -> Any:
    """An adapter that does something: a fresh one's B is 0."""
    torch.manual_seed(0)
    base = lora.load_base(ModelConfig(path=str(base_model), dtype="float32"))
    model = lora.attach(base, LoraPart.model_validate({"r": 4, **keys}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def _gradient(module: SupervisedLoss, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    value = module(**batch)
    value.backward()
    return value.item(), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"attn_implementation": "varlen"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "selective", "attn_implementation": "varlen"},
    ],
    ids=str,
)
def test_loss_and_gradient_are_the_plain_models(base_model: Path, keys: dict[str, Any]) -> None:
    batch = packed([ROWS[:6], ROWS[6:]], 600)
    expected, gradient = _gradient(SupervisedLoss(_adapter(base_model)), batch)
    module = training_module(_adapter(base_model), TrainPart.model_validate(keys), CPU)
    assert sum(isinstance(m, PlainLora) for m in module.modules()) == sum(
        isinstance(m, peft_lora.Linear) for m in module.modules()
    )
    value, found = _gradient(module.train(), batch)
    assert value == pytest.approx(expected, rel=1e-6)
    assert (found - gradient).norm() / gradient.norm() < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_packed_logits_equal_the_rows_own(base_model: Path, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the module that is trained, whose head is made to hand out its logits."""
    recipe = TrainPart.model_validate({"attn_implementation": attention})
    module = training_module(_adapter(base_model), recipe, CPU).eval()
    logits: list[torch.Tensor] = []
    module.model.get_base_model().lm_head.register_forward_hook(lambda *told: logits.append(told[2]))
    with torch.no_grad():
        module(**packed([ROWS[:6], ROWS[6:]], 600))
        together, alone = logits.pop(), []
        for row in ROWS:
            module(**packed([[row]], len(row.input_ids)))
            alone.append(logits.pop())
    assert torch.allclose(together, torch.cat(alone), atol=1e-5 * together.abs().max().item(), rtol=1e-5)


def test_layers_compiled_in_place_keep_the_adapters_names(base_model: Path) -> None:
    plain = get_peft_model_state_dict(_adapter(base_model))
    recipe = TrainPart.model_validate({"torch_compile": True})
    module = training_module(_adapter(base_model), recipe, CPU)
    assert get_peft_model_state_dict(module.model).keys() == plain.keys()
    assert all("forward" in vars(layer) for layer in module.model.get_base_model().model.layers)


def test_variants_keep_pefts_own_forward(base_model: Path) -> None:
    module = training_module(_adapter(base_model, use_dora=True), TrainPart(), CPU)
    assert not any(isinstance(m, PlainLora) for m in module.modules())
    assert module(**packed([ROWS[:2]], 256)).isfinite()


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": True}], ids=str)
def test_dropout_is_pefts_own_under_the_same_seed(base_model: Path, keys: dict[str, Any]) -> None:
    batch = packed([ROWS[:2]], 200)
    plain = SupervisedLoss(_adapter(base_model, lora_dropout=0.3))
    fast = training_module(_adapter(base_model, lora_dropout=0.3), TrainPart.model_validate(keys), CPU)
    assert not any(type(m) is peft_lora.Linear for m in fast.modules())

    def seeded(module: SupervisedLoss, seed: int) -> tuple[float, torch.Tensor]:
        module.zero_grad()
        checkpoint.seed_micro_batch(seed, 0, 0)
        return _gradient(module.train(), batch)

    (expected, gradient), (value, found), (other, _) = seeded(plain, 1), seeded(fast, 1), seeded(fast, 2)
    assert value == pytest.approx(expected, rel=1e-6)
    assert (found - gradient).norm() / gradient.norm() < 1e-5
    assert other != pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        assert fast.eval()(**batch).item() == pytest.approx(plain.eval()(**batch).item(), rel=1e-6)


def test_an_adapter_that_is_switched_off_is_off(base_model: Path) -> None:
    batch = packed([ROWS[:6]], 600)
    module = training_module(_adapter(base_model), TrainPart(), CPU)
    with module.model.disable_adapter(), torch.no_grad():
        off = module(**batch).item()
    base = SupervisedLoss(_adapter(base_model))
    with base.model.disable_adapter(), torch.no_grad():
        assert off == base(**batch).item()


def test_a_long_loss_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head, targets = nn.Linear(16, 50, bias=False), torch.randint(50, (100,))
    hidden = torch.randn(100, 16, requires_grad=True)
    whole = cross_entropy(head(hidden), targets, reduction="sum")
    expected = torch.autograd.grad(whole, (hidden, head.weight))
    monkeypatch.setattr(loss, "CHUNK", 32)
    chunked = summed_cross_entropy(head, hidden, targets)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(chunked, (hidden, head.weight)), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert summed_cross_entropy(head, hidden[:0], targets[:0]).item() == 0


def test_an_aligned_head_gives_the_same_logits() -> None:
    head = nn.Linear(16, 50, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 16)
    expected = head(hidden)
    _align(head)
    assert isinstance(head, AlignedHead)
    assert head.weight.shape == (64, 16)
    assert torch.allclose(head(hidden), expected)
    assert list(head.state_dict()) == ["weight"]


def test_float8_is_as_near_as_three_bits_of_mantissa_are() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 64).requires_grad_(False).bfloat16()
    linear.weight[3] *= 100  # an output of another scale costs the others nothing
    x = (torch.randn(2, 10, 128) * torch.logspace(-3, 3, 10)[:, None]).bfloat16().requires_grad_()
    rounded = float8.Float8Linear(linear)
    direction = torch.randn(2, 10, 64).bfloat16()
    exact, near = linear(x), rounded(x)
    for one, other in (
        (exact, near),
        (torch.autograd.grad(exact, x, direction)[0], torch.autograd.grad(near, x, direction)[0]),
    ):
        error = (one - other).float().norm(dim=-1) / one.float().norm(dim=-1)
        assert (
            0.001 < error.mean() < 0.07
        )  # a factor is off by up to 6 %, and output 3 drowns the others in the gradient


def test_what_the_device_cannot_do_is_refused(base_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.fp8: needs a GPU"):
        training_module(_adapter(base_model), TrainPart(fp8=True), CPU)


def test_batches_arrive_in_order() -> None:
    batches = [{"x": torch.full((2,), i)} for i in range(5)]
    assert [int(batch["x"][0]) for batch in on_device(batches, CPU)] == list(range(5))
    assert adamw([nn.Parameter(torch.ones(2))], TrainPart()).param_groups[0]["lr"] == TrainPart().learning_rate
