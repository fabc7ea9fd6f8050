"""Thousands of mutated answers against a second implementation of the benchmark's rules.

It is written from the rules alone and in another manner than the package: patterns where that splits, exact
fractions where that divides, a full table where that counts bits. Its results were compared with the benchmark's own
scripts too, which are not a part of this project.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from transformers import BasicTokenizer

from paddock.data import Row
from paddock.demo.rows import make_rows
from paddock.scoring import parse_predictions, score
from paddock.tasks import TASKS

Answer = Any
SETS = ("CMeEE-V2", "CMeIE", "CMeIE-V2", "CHIP-CDN", "CHIP-CDEE", "IMCS-V2-NER", "CHIP-MDCFNPC", "IMCS-V2-SR")
FIRST_LABEL = {
    "CHIP-STS": "是的", "CHIP-CTC": "非上述类型", "IMCS-V2-DAC": "非上述类型", "KUAKE-QIC": "非上述类型",
    "KUAKE-IR": "相关", "KUAKE-QTR": "完全不匹配或者没有参考价值", "KUAKE-QQR": "完全一致",
}  # fmt: skip
MACRO = ("CHIP-CTC", "IMCS-V2-DAC", "KUAKE-QIC")
TOKENIZER = BasicTokenizer(tokenize_chinese_chars=True)


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split("，") if word.strip()]


def read(profile: str, row: Row) -> Answer:
    """A row's target as the benchmark's parser reads it."""
    text, task, choices = row.target, row.task_dataset, list(row.answer_choices or [])
    if profile == "v1":
        for half, full in zip(":,;", "：，；", strict=True):
            text = re.sub(re.escape(half), full, text, count=100)
    lines = text.split("\n")
    if task in ("CMeEE-V2", "IMCS-V2-NER"):
        found = [(c, line) for c in choices for line in lines if re.match(re.escape(c) + "实体", line)]
        return [{"entity": w, "type": c} for c, line in found for w in words(line.replace(f"{c}实体：", ""))]
    if task.startswith("CMeIE"):
        triples = []
        for line in lines:
            predicate = re.split("关系的头尾实体对", line)[0][2:].strip()
            for piece in line.replace(f"具有{predicate}关系的头尾实体对如下：", "").split("。"):
                head, *tails = piece.split("，尾实体为")
                if tails:
                    subject, tail = head.replace("头实体为", ""), tails[0].replace("尾实体为", "")
                    triples.append({"predicate": predicate, "subject": subject.strip(), "object": tail.strip()})
        return triples
    if task == "CHIP-CDN":
        return [{"entity": w, "type": "normalization"} for w in sorted({w for w in words(lines[-1]) if w in choices})]
    if task == "CHIP-CDEE":
        return [_event(line) for line in lines[1:]]
    if task in ("CHIP-MDCFNPC", "IMCS-V2-SR"):
        other = "无法根据上下文确定病人是否患有该症状"
        if task == "CHIP-MDCFNPC":
            other = "不标注" if profile == "v2" else "无实际意义的不标注或者和病人当前的状态独立不标注"
        pairs = [m.groups() for m in (re.fullmatch("([^：]*)：([^：]*)", line, re.S) for line in lines[1:]) if m]
        return [{"entity": left.strip(), "attr": right if right in choices else other} for left, right in pairs]
    if task == "IMCS-V2-MRG":
        report = {}
        for name in ("主诉", "现病史", "辅助检查", "既往史", "诊断", "建议"):
            said = [line for line in text.strip().split("\n")[1:] if line.startswith(f"{name}：")]
            if said:
                report[name] = said[-1].strip().rsplit(f"{name}：", 1)[-1].strip()
        return report
    text = text.strip()
    return {"相同": "是的", "不同": "不是"}.get(text, text) if task == "CHIP-STS" else text


def _event(line: str) -> dict[str, Any]:
    event: dict[str, Any] = {"主体词": "", "发生状态": "", "描述词": [], "解剖部位": []}
    for part in line.split("；"):
        field = part
        for name, empty in event.items():
            if re.match(f"{name}：", field):
                field = re.sub(f"{name}：", "", field).strip()
                event[name] = words(field) if isinstance(empty, list) else field
    return event


def measure(task: str, gold: list[Answer], said: list[Answer]) -> float:
    """A task's score, of 1."""
    if task in SETS:
        pairs = [({_frozen(i) for i in g}, {_frozen(i) for i in s}) for g, s in zip(gold, said, strict=True)]
        both = sum(len(g & s) for g, s in pairs)
        return float(Fraction(2 * both, sum(len(g) + len(s) for g, s in pairs))) if both else 0.0
    if task in FIRST_LABEL:
        said = [label or FIRST_LABEL[task] for label in said]
        total = weight = Fraction(0)
        for label in {*gold, *said}:
            both = sum(g == s == label for g, s in zip(gold, said, strict=True))
            each = 1 if task in MACRO else gold.count(label)
            total += each * Fraction(2 * both, gold.count(label) + said.count(label))
            weight += each
        return float(total / weight)
    pairs = list(zip(gold, said, strict=True))
    if task == "IMCS-V2-MRG":
        pairs = [(text, s.get(name, "")) for g, s in pairs for name, text in g.items()]
    return sum(_rouge_l(*(TOKENIZER.tokenize(t) or ["无", "。"] for t in pair)) for pair in pairs) / len(pairs)


def _frozen(item: dict[str, Any]) -> str:
    return json.dumps([item[name] for name in sorted(item)], ensure_ascii=False)


def _rouge_l(gold: list[str], said: list[str]) -> float:
    row = [0] * (len(said) + 1)
    for word in gold:
        above, row = row, [0]
        for i, other in enumerate(said):
            row.append(above[i] + 1 if word == other else max(above[i + 1], row[-1]))
    p, r = row[-1] / len(said), row[-1] / len(gold)
    return 2 * p * r / (p + r + 1e-8)


def mutate(rng: random.Random, text: str, row: Row) -> str:
    """What models do to an answer."""
    at = rng.randrange(len(text) + 1)
    lines = text.split("\n")
    slips: list[Callable[[], str]] = [
        lambda: text,
        lambda: text.replace("：", ":", rng.randrange(1, 4)),
        lambda: text.replace("，", ",", rng.randrange(1, 4)).replace("；", ";"),
        lambda: "\n".join(line for line in lines if rng.random() < 0.7),
        lambda: text[:at] + rng.choice([" ", "\n", "\u3000", "\t", "\r", "\u2028"]) + text[at:],
        lambda: f"{text}\n",
        lambda: f" {text}",
        lambda: text[:at],
        lambda: text[:at] + text[at + 1 :],
        lambda: "\n".join(rng.sample(lines, len(lines))),
        lambda: "\n".join([*lines, rng.choice(lines)]),
        lambda: text + text,
        lambda: rng.choice(["", "瞎编", "junk, text: 1;2", "。" * 50, "\n\n", "：", "头实体为，尾实体为", ":" * 150]),
        lambda: text[:at] + rng.choice(["主体词：", "描述词：", "，尾实体为", "。；", "诊断：", "AB 12"]) + text[at:],
        lambda: rng.choice(row.answer_choices) if row.answer_choices else text,
    ]
    return rng.choice(slips)()


@pytest.mark.parametrize("profile", ["v1", "v2"])
def test_three_thousand_mutated_answers(profile: str) -> None:
    rng = random.Random(profile)
    source = make_rows(0)["test"]
    if profile == "v2":
        source = [replace(r, task_dataset=r.task_dataset.replace("CMeIE", "CMeIE-V2")) for r in source]
    gold = [replace(source[i % len(source)], sample_id=str(i)) for i in range(3000)]
    predicted = [replace(r, target=mutate(rng, mutate(rng, r.target, r), r)) for r in gold]
    parsed = parse_predictions(predicted, profile)
    expected: dict[str, list[Answer]] = {}
    right: dict[str, list[Answer]] = {}
    for row, gold_row in zip(predicted, gold, strict=True):
        expected.setdefault(row.task_dataset, []).append(read(profile, row))
        right.setdefault(row.task_dataset, []).append(read(profile, gold_row))
    for task, answers in expected.items():
        assert [item["answer"] for item in parsed.results[task]] == answers, task
    scores = score(parsed.results, gold, profile)
    assert set(scores.tasks) == set(expected) <= set(TASKS[profile])
    values = {task: measure(task, right[task], expected[task]) for task in scores.tasks}
    for task, value in values.items():
        assert scores.tasks[task].score == pytest.approx(value, abs=1e-12), task
        assert 0 < value < 1, task
    assert scores.overall == pytest.approx(100 * sum(values.values()) / len(values), abs=1e-10)
