"""The proof of a merge: the same prompts through base + adapters and through what was written.

The reference is PEFT's own, in float32: each adapter attached in its turn and merged before the next, the last one left
attached as it was trained. transformers runs both models; a module's weights are read when it is about to be called
and forgotten when it was, so that neither model is ever in memory and the largest tensor, not the number of layers,
says how much is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from paddock.merge_adapter import Reading
from paddock.merge_plan import Plan, empty_model
from paddock.models_of_2023 import load_tokenizer
from paddock.weights import Weights, open_model

_TEXTS = (
    "The patient was given 5 mg of the drug twice a day.",
    "问：\n患者咳嗽三天，应该做哪些检查？\n答：\n",
    "请根据以下病历写出诊断结果。",
    "Le médecin examine l'enfant et prescrit du repos.",
    "はじめに体温を測ってください。",
    "Пациент жалуется на головную боль.",
    "قال الطبيب إن النتيجة طبيعية.",
    "x = [1, 2.5, -3]  # 한국어 🙂",
)
_LENGTH = 32


Values = dict[str, torch.Tensor]
"""A module's own parameters in float32, by name (`weight`, `bias`)."""


def prove(plan: Plan, merged: Path, prompts: int) -> dict[str, float | int]:
    """Compare logits over all positions of the prompts, in float32.

    Returns max_abs_logit_diff, mean_abs_logit_diff, kl (nats, mean of KL(reference || merged)),
    top1_agreement (share of positions with the same most likely token) and the number of prompts.
    """
    ids = prompt_ids(plan, prompts)
    expected = _reference(plan, ids)
    found = _logits(empty_model(merged, plan.rows, tied=plan.tied), _written(plan, open_model(merged)), ids)
    difference = (expected - found).abs()
    log_expected, log_found = expected.log_softmax(-1), found.log_softmax(-1)
    kl = (log_expected.exp() * (log_expected - log_found)).sum(-1).mean()
    agreement = (expected.argmax(-1) == found.argmax(-1)).double().mean()
    return {
        "max_abs_logit_diff": difference.max().item(),
        "mean_abs_logit_diff": difference.mean().item(),
        "kl": kl.item(),
        "top1_agreement": agreement.item(),
        "prompts": len(ids),
    }


def prompt_ids(plan: Plan, prompts: int) -> list[list[int]]:
    """Prompts as token ids, always the same for a model: texts in several languages by turns with ids spread
    over the whole vocabulary, so that grown rows are seen too."""
    tokenizer = None if plan.tokenizer is None else load_tokenizer(plan.tokenizer)
    found = []
    for number in range(prompts):
        if tokenizer is not None and number % 2 == 0:
            found.append(tokenizer(_TEXTS[number // 2 % len(_TEXTS)])["input_ids"][:_LENGTH])
        else:
            # 2654435761 is Knuth's multiplier: neighbours in the sequence lie far apart in the vocabulary.
            found.append([(number * _LENGTH + i) * 2654435761 % plan.rows for i in range(_LENGTH)])
    return found


def _reference(plan: Plan, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of base + adapters."""
    chain, last = _Chain(plan), len(plan.steps)
    if last and not plan.steps[-1].tied:
        reading = plan.steps[-1].reading
        return _logits(reading.plain, lambda name: chain.before(name, last), ids, reading)
    # A tied head is the embedding as it is after the last adapter, which a live one does not show.
    model = empty_model(plan.base, plan.rows, tied=plan.tied)
    return _logits(model, lambda name: chain.after(name, last), ids)


def _written(plan: Plan, weights: Weights) -> Callable[[str], Values]:
    def values(name: str) -> Values:
        return _read(weights, plan.embedding if plan.tied and name == plan.head else name)

    return values


def _read(weights: Weights, name: str) -> Values:
    named = {own: f"{name}.{own}" for own in ("weight", "bias")}
    return {own: weights.read(full).float() for own, full in named.items() if full in weights.infos}


class _Chain:
    """Base + adapters, one module at a time, as PEFT makes them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def before(self, name: str, number: int) -> Values:
        """A module's parameters before adapter `number`, counted from 1."""
        tied = self.plan.steps[number - 2].tied if number > 1 else self.plan.base_tied
        return self.after(self.plan.embedding if tied and name == self.plan.head else name, number - 1)

    def after(self, name: str, number: int) -> Values:
        """A module's parameters with the first `number` adapters merged."""
        if number and self.plan.steps[number - 1].tied and name == self.plan.head:
            return self.after(self.plan.embedding, number)
        if number == 0:
            tied = self.plan.base_tied and name == self.plan.head
            return _read(self.plan.sources[0], self.plan.embedding if tied else name)
        reading = self.plan.steps[number - 1].reading
        module = copy.deepcopy(reading.plain.get_submodule(name))
        _fill(module, name, self.before(name, number), reading)
        if isinstance(module, LoraLayer):
            module.merge()
            module = module.get_base_layer()
        elif isinstance(module, TrainableTokensWrapper):
            module.token_adapter.merge()
            module = module.token_adapter.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save["default"]
        return {own: parameter.detach() for own, parameter in module.named_parameters(recurse=False)}


def _fill(module: Any, name: str, values: Values, reading: Reading | None) -> list[tuple[Any, str, Any]]:
    """Give a module its parameters in float32: the adapter's where it brings them, else the base's `values`.

    Returns what stood there: (owner, name, parameter).
    """
    stood = []
    for path, parameter in list(module.named_parameters()):
        if "original_module" in path.split("."):
            continue  # what a saved module stands for is not called
        *parents, own = path.split(".")
        owner = module.get_submodule(".".join(parents))
        brought = None if reading is None else reading.saved(f"{name}.{path}")
        value = values[own] if brought is None else brought.float()
        stood.append((owner, own, parameter))
        _set(owner, own, torch.nn.Parameter(value, requires_grad=False))
    return stood


def _set(owner: Any, own: str, parameter: Any) -> None:
    if isinstance(owner, torch.nn.ParameterDict):
        owner[own] = parameter
    else:
        owner._parameters[own] = parameter


def _logits(
    model: Any, values: Callable[[str], Values], ids: Sequence[Sequence[int]], reading: Reading | None = None
) -> torch.Tensor:
    """Logits of every position of every prompt, (positions, vocabulary).

    values: a module's parameters without the adapter, by its name. reading: the adapter that `model` carries.
    """
    longest = max(map(len, ids))
    # Under a causal mask, what follows a prompt does not change it.
    batch = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in ids])
    model.eval()
    with torch.inference_mode(), _streamed(model, values, reading):
        logits = model(batch, use_cache=False).logits
    return torch.cat([row[: len(prompt)] for row, prompt in zip(logits, ids, strict=True)])


@contextmanager
def _streamed(model: Any, values: Callable[[str], Values], reading: Reading | None) -> Iterator[None]:
    """Each module has its weights while it is called, and only then."""
    hooks, stood = [], dict[Any, list[tuple[Any, str, Any]]]()

    def load(module: Any, _: Any) -> None:
        stood[module] = _fill(module, names[module], values(names[module]), reading)

    def forget(module: Any, *_: Any) -> None:
        for owner, own, parameter in stood.pop(module):
            _set(owner, own, parameter)

    names = dict(_units(model))
    for module in names:
        hooks += [module.register_forward_pre_hook(load), module.register_forward_hook(forget)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _units(model: Any, prefix: str = "") -> Iterator[tuple[Any, str]]:
    """The modules that are called with weights of their own, and their names in the model without PEFT."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        wrapped = isinstance(child, LoraLayer | TrainableTokensWrapper | ModulesToSaveWrapper)
        if wrapped or any(True for _ in child.parameters(recurse=False)):
            yield child, path
        else:
            yield from _units(child, f"{path}.")
