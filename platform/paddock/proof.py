"""The proof of a merge: the same prompts through base + adapters and through what was written.

The reference is PEFT's own: the base in float32, each adapter attached in its turn and merged before the next,
rows added where an adapter's vocabulary asks for them. The merged model is read back from its directory. Both models
are in memory one after the other, never together; `check_memory` says so before anything is written.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from paddock.errors import ResourceError
from paddock.merge_plan import Plan

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


def prove(plan: Plan, merged: Path, prompts: int) -> dict[str, float | int]:
    """Compare logits over all positions of the prompts, in float32.

    Returns max_abs_logit_diff, mean_abs_logit_diff, kl (nats, mean of KL(reference || merged)),
    top1_agreement (share of positions with the same most likely token) and the number of prompts.
    """
    ids = prompt_ids(plan, prompts)
    with _quiet():
        expected = _logits(_reference(plan), ids)
        found = _logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), ids)
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
    tokenizer = None if plan.tokenizer is None else AutoTokenizer.from_pretrained(plan.tokenizer)
    found = []
    for number in range(prompts):
        if tokenizer is not None and number % 2 == 0:
            found.append(tokenizer(_TEXTS[number // 2 % len(_TEXTS)])["input_ids"][:_LENGTH])
        else:
            # 2654435761 is Knuth's multiplier: neighbours in the sequence lie far apart in the vocabulary.
            found.append([(number * _LENGTH + i) * 2654435761 % plan.rows for i in range(_LENGTH)])
    return found


def check_memory(plan: Plan) -> None:
    """Raise ResourceError where the proof's float32 model does not fit into this machine's memory."""
    parameters = sum(info.bytes // info.dtype.itemsize for info in plan.infos.values())
    needed = 4 * parameters * 1.2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ResourceError(
            f"prove_prompts: the proof needs {needed / 2**30:.0f} GiB of memory, this machine has"
            f" {memory / 2**30:.0f}; run it on a larger one, or merge without the proof (prove_prompts=0)"
        )


def _reference(plan: Plan) -> Any:
    """Base + adapters in float32: each attached by PEFT and merged, the last one left attached as it was trained."""
    model = AutoModelForCausalLM.from_pretrained(plan.base, dtype=torch.float32)
    for step in plan.steps:
        if model.get_input_embeddings().weight.shape[0] != step.rows:
            model.resize_token_embeddings(step.rows, mean_resizing=False)
        if model.config.tie_word_embeddings and not step.tied:
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            model.config.tie_word_embeddings = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, step.adapter)
        if step is plan.steps[-1] and not step.tied:
            return adapted
        model = adapted.merge_and_unload()
        if step.tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of every position of every prompt, (positions, vocabulary)."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in prompts])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
