"""The sums say what the metrics say, and the intervals cover what they should."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from paddock.data import Row
from paddock.demo.rows import make_rows
from paddock.resampling import bootstrap, row_values, statistics
from paddock.scoring import answers_of, parse_predictions, score
from paddock.tasks import TASKS

TREES = [
    '节点：role=C；logical_rel=and；triples=[("流感", "治疗药物", "A")]',
    '节点：role=D；logical_rel=null；triples=[("甲", "乙", "丙")]',
    "节点：role=D；logical_rel=null；triples=[]",
]


@pytest.fixture(scope="module")
def sides() -> tuple[list[Row], list[Row], list[Row]]:
    """Gold of all eighteen tasks, and two predictions: one with some rows wrong, one with more."""
    rng = random.Random(0)
    gold = [
        replace(r, task_dataset={"CMeIE": "CMeIE-V2"}.get(r.task_dataset, r.task_dataset)) for r in make_rows(0)["test"]
    ]
    gold += [Row("x", "\n".join(TREES), None, "", "Text2DT", f"t{i}") for i in range(5)]
    gold += [
        Row("x", f"因果关系三元组如下：\n头实体：甲{i}；尾实体：乙", None, "", "CMedCausal", f"c{i}") for i in range(5)
    ]
    targets: dict[str, list[str]] = {}
    for row in gold:
        targets.setdefault(row.task_dataset, []).append(row.target)

    def wrong(share: float) -> list[Row]:
        other = [rng.choice([*targets[r.task_dataset], "", TREES[1]]) for r in gold]
        return [replace(r, target=t) if rng.random() < share else r for r, t in zip(gold, other, strict=True)]

    return gold, wrong(0.2), wrong(0.6)


def answers(rows: list[Row]) -> dict[str, list[Any]]:
    return answers_of(parse_predictions(rows, "v2").results)


def test_sums_over_rows_are_the_metrics(sides: tuple[list[Row], ...]) -> None:
    gold, *predicted = sides
    for rows in predicted:
        scores = score(parse_predictions(rows, "v2").results, gold, "v2")
        found = bootstrap("v2", answers(gold), answers(rows), draws=100)
        for name, task in scores.tasks.items():
            total = statistics(TASKS["v2"][name], answers(gold)[name], answers(rows)[name])[0].total
            assert total == pytest.approx(task.score, abs=1e-12), name
            assert found[name].low <= found[name].value <= found[name].high or task.rows < 8
        assert found["Overall"].value == pytest.approx(scores.overall, abs=1e-9)


def test_a_comparison_is_paired_and_repeatable(sides: tuple[list[Row], ...]) -> None:
    gold, good, bad = (answers(rows) for rows in sides)
    same = bootstrap("v2", gold, good, good)
    assert all((i.value, i.low, i.high) == (0, 0, 0) for i in same.values())
    worse = bootstrap("v2", gold, good, bad)
    assert worse == bootstrap("v2", gold, good, bad)
    assert worse["Overall"].low < worse["Overall"].value < worse["Overall"].high < 0


def test_the_interval_is_as_wide_as_theory_says() -> None:
    """100 rows of two labels, 80 of them right: accuracy has a standard error of 4 points, F1 about that."""
    gold = {"KUAKE-IR": ["相关"] * 50 + ["不相关"] * 50}
    said = {"KUAKE-IR": ["相关"] * 40 + ["不相关"] * 50 + ["相关"] * 10}
    found = bootstrap("v1", gold, said)["KUAKE-IR"]
    assert found.value == pytest.approx(80)
    assert 13 < found.high - found.low < 18


def test_a_row_s_own_value() -> None:
    label, found = TASKS["v1"]["KUAKE-IR"], TASKS["v1"]["CHIP-CDN"]
    assert row_values(label, ["相关", "不相关"], ["", "相关"]) == [1.0, 0.0]
    term = {"entity": "甲", "type": "normalization"}
    assert row_values(found, [[], [term], [term]], [[], [], [term]]) == [1.0, 0.0, 1.0]
