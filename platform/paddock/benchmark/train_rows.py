"""Rows for the training benchmark: as long as PromptCBLUE's, and such that they can be learnt.

A prompt is its task's heading and noise. An answer walks round its task's circle of words, and each word is
replaced by another of the circle now and then: so the loss falls towards a floor that is known to be above 0.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from paddock.packing import IGNORE, TokenRow, first_fit

# Mean length of prompt and answer of each of the benchmark's 16 tasks, in characters: about as many tokens.
LENGTHS = (
    (875, 97),  # IMCS-V2-MRG
    (766, 173),  # CHIP-MDCFNPC
    (248, 26),  # MedDG
    (174, 4),  # CHIP-CTC
    (173, 3),  # KUAKE-IR
    (134, 40),  # IMCS-V2-SR
    (128, 198),  # CHIP-CDEE
    (122, 5),  # IMCS-V2-DAC
    (114, 108),  # CMeIE
    (101, 70),  # CMeEE
    (99, 10),  # CHIP-CDN
    (89, 6),  # KUAKE-QTR
    (78, 8),  # KUAKE-QQR
    (77, 4),  # KUAKE-QIC
    (66, 2),  # CHIP-STS
    (42, 37),  # IMCS-V2-NER
)
_SPREAD = 0.5  # the standard deviation of a length's logarithm within a task
_HEADING, _CIRCLE, _REPLACED = 8, 16, 0.1


def make_rows(number: int, vocabulary: int, longest: int, seed: int) -> list[TokenRow]:
    """So many rows of at most `longest` tokens; tasks take turns in a shuffled order."""
    draw = random.Random(seed)
    tasks = [index % len(LENGTHS) for index in range(number)]
    draw.shuffle(tasks)
    words = random.Random(0).sample(range(3, vocabulary), len(LENGTHS) * (_HEADING + _CIRCLE))
    rows = []
    for index, task in enumerate(tasks):
        own = words[task * (_HEADING + _CIRCLE) :][: _HEADING + _CIRCLE]
        heading, circle = own[:_HEADING], own[_HEADING:]
        prompt_length, answer_length = (
            max(2, round(draw.lognormvariate(math.log(mean) - _SPREAD**2 / 2, _SPREAD))) for mean in LENGTHS[task]
        )
        answer_length = min(answer_length, longest // 2)
        prompt_length = min(prompt_length, longest - answer_length)
        noise = [draw.randrange(3, vocabulary) for _ in range(prompt_length - _HEADING)]
        prompt = [*heading, *noise][:prompt_length]
        walk = (circle[step % _CIRCLE] for step in range(answer_length))
        answer = [draw.choice(circle) if draw.random() < _REPLACED else word for word in walk]
        rows.append(TokenRow(str(index), prompt + answer, [IGNORE] * len(prompt) + answer))
    return rows


def steps_of(rows: Sequence[TokenRow], block: int, blocks_per_step: int) -> list[list[list[TokenRow]]]:
    """Rows, packed: for each optimizer step its blocks, each a list of rows. An unfinished step is left out."""
    blocks = [[rows[index] for index in chosen] for chosen in first_fit((len(r.input_ids) for r in rows), block)]
    return [blocks[at : at + blocks_per_step] for at in range(0, len(blocks) - blocks_per_step + 1, blocks_per_step)]


def packed(blocks: Sequence[Sequence[TokenRow]], length: int) -> dict[str, torch.Tensor]:
    """Blocks as the product's batches: (blocks, length), the rest of a block a row of its own."""
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for block in blocks:
        ids = [i for row in block for i in row.input_ids]
        rest = length - len(ids)
        columns["input_ids"].append([*ids, *[0] * rest])
        columns["labels"].append([*(i for row in block for i in row.labels), *[IGNORE] * rest])
        columns["position_ids"].append([*(i for row in block for i in range(len(row.input_ids))), *range(rest)])
    return {name: torch.tensor(values) for name, values in columns.items()}


def padded(rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
    """Rows as transformers' collators make them: (rows, longest), padded at the end."""
    longest = max(len(row.input_ids) for row in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        rest = longest - len(row.input_ids)
        columns["input_ids"].append([*row.input_ids, *[0] * rest])
        columns["labels"].append([*row.labels, *[IGNORE] * rest])
        columns["attention_mask"].append([*[1] * len(row.input_ids), *[0] * rest])
    return {name: torch.tensor(values) for name, values in columns.items()}
