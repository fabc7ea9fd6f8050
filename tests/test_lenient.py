"""Slips of format are forgiven, wrong answers are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paddock.demo.rows import make_rows
from paddock.lenient import lenient_answer
from paddock.scoring import lenient_results, parse_predictions, score
from paddock.tasks import parse_answer

EVENT = "主体词：咳嗽；发生状态：否定"


@pytest.mark.parametrize(
    ("task", "slip", "meant", "choices"),
    [
        ("KUAKE-IR", "答案是：不相关。", "不相关", ["相关", "不相关"]),
        ("CHIP-STS", "相同。", "是的", ["相同", "不同"]),
        ("CHIP-CDN", "甲，乙。\n", "甲，乙", ["甲", "乙"]),
        ("CHIP-CDEE", "主体词:咳嗽;发生状态:否定", f"x\n{EVENT}", None),
        ("CHIP-CDEE", f"x\n{EVENT}\n", f"x\n{EVENT}", None),
        ("IMCS-V2-MRG", "主诉：咳嗽。\n诊断：感冒。", "x\n主诉：咳嗽。\n诊断：感冒。", None),
        ("IMCS-V2-SR", "咳嗽： 患有该症状", "x\n咳嗽：患有该症状", ["患有该症状"]),
        ("CMeEE-V2", " 疾病实体:流感,肺炎", "疾病实体：流感，肺炎", ["疾病"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("profile", ["v1", "v2"])
def test_what_was_meant(profile: str, task: str, slip: str, meant: str, choices: list[str] | None) -> None:
    if task == "IMCS-V2-SR":
        slip = slip.replace("： ", "：")
    assert lenient_answer(profile, task, slip, choices) == parse_answer(profile, task, meant, choices)[0]


def test_what_is_wrong_stays_wrong() -> None:
    assert lenient_answer("v1", "KUAKE-IR", "相关，也不相关。或者部分", ["相关", "部分"]) != "相关"


def test_right_answers_lose_nothing_and_slips_gain() -> None:
    gold = make_rows(0)["test"]
    for predicted, gains in ((gold, False), ([replace(r, target=f"{r.target}\n") for r in gold], True)):
        parsed = parse_predictions(predicted, "v1")
        strict = score(parsed.results, gold, "v1").overall
        lenient = score(lenient_results(predicted, parsed, gold), gold, "v1").overall
        assert lenient == pytest.approx(99.9999999, abs=1e-6)
        assert (lenient > strict + 1) == gains
