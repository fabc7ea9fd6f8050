"""How sure a score is: what each row adds to it, and the bootstrap over rows.

Every metric of the benchmark is a function of sums over rows: matches and misses, label counts, Rouge and pairs,
distances and sizes. So a task scored on a thousand drawn sets of rows is one matrix product. Rows are drawn within
their task, as the benchmark has as many of each; a comparison draws the same rows for both (paired bootstrap,
Efron and Tibshirani 1993).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddock.tasks import TASKS, Task
from paddock.tasks.metrics import item_key, label_f1, set_f1
from paddock.tasks.rouge import rouge_of_sections, rouge_of_texts
from paddock.tasks.tree_distance import distance_and_size

Numbers = NDArray[np.float64]
# Draws that are in memory at a time: one count for each of them and each row.
_DRAWS_AT_ONCE = 200


@dataclass(frozen=True)
class RowStatistics:
    """One task's rows as numbers, and what their sums say."""

    rows: Numbers
    """(rows, statistics)"""
    score: Callable[[Numbers], Numbers]
    """Sums over rows, (draws, statistics) -> scores, (draws,)."""

    @property
    def total(self) -> float:
        """The task's score, as its metric computes it."""
        return float(self.score(self.rows.sum(axis=0, keepdims=True))[0])


@dataclass(frozen=True)
class Interval:
    """A number of points (of 100) and the middle 95 % of what it is on drawn rows."""

    value: float
    low: float
    high: float


def statistics(task: Task, gold: Sequence[Any], *predicted: Sequence[Any]) -> list[RowStatistics]:
    """Row statistics of each prediction of the same gold answers."""
    metric = task.metric
    score: Callable[[Numbers], Numbers]
    if isinstance(metric, functools.partial) and metric.func is label_f1:
        named = [[label or metric.keywords["blank"] for label in said] for said in predicted]
        known = {label: i for i, label in enumerate(sorted({*gold, *(label for said in named for label in said)}))}
        score = functools.partial(_label_score, macro=metric.keywords["average"] == "macro")
        return [RowStatistics(_label_rows(known, gold, said), score) for said in named]
    row: Callable[[Any, Any], tuple[float, ...]]
    if metric is set_f1:
        row, score = _set_row, _set_score
    elif metric in (rouge_of_texts, rouge_of_sections):
        row, score = functools.partial(_rouge_row, metric), _ratio
    else:
        row, score = distance_and_size, _tree_score
    return [
        RowStatistics(np.array([row(g, p) for g, p in zip(gold, said, strict=True)], dtype=float), score)
        for said in predicted
    ]


def row_values(task: Task, gold: Sequence[Any], predicted: Sequence[Any]) -> list[float]:
    """How right each row's answer is by itself: 1 is right; for trees, one without a lower bound."""
    if task.is_label:
        blank = getattr(task.metric, "keywords", {}).get("blank", "")
        return [float((said or blank) == right) for right, said in zip(gold, predicted, strict=True)]
    values = []
    for right, said in zip(gold, predicted, strict=True):
        if not right and not said:
            values.append(1.0)  # nothing to find, and nothing found
        else:
            values.append(statistics(task, [right], [said])[0].total)
    return values


def bootstrap(
    profile: str,
    gold: dict[str, list[Any]],
    a: dict[str, list[Any]],
    b: dict[str, list[Any]] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Task (and `Overall`) -> score of `a`, or difference `b - a`, in points.

    The arguments hold the answers of each task, row by row. Equal arguments give equal intervals.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[str, Numbers] = {}
    values: dict[str, float] = {}
    for name, task in TASKS[profile].items():
        if not gold.get(name):
            continue
        found = statistics(task, gold[name], a[name], *([b[name]] if b is not None else []))
        sides = [np.empty(draws) for _ in found]
        count = len(gold[name])
        for start in range(0, draws, _DRAWS_AT_ONCE):
            size = min(_DRAWS_AT_ONCE, draws - start)
            weights = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(float)
            for side, part in zip(sides, found, strict=True):
                side[start : start + size] = part.score(weights @ part.rows)
        drawn[name] = (sides[-1] - sides[0] if b is not None else sides[0]) * 100
        values[name] = (found[-1].total - found[0].total if b is not None else found[0].total) * 100
    drawn["Overall"] = np.mean(list(drawn.values()), axis=0)
    values["Overall"] = float(np.mean(list(values.values())))
    ends = {name: np.quantile(numbers, (0.025, 0.975)) for name, numbers in drawn.items()}
    return {name: Interval(values[name], float(low), float(high)) for name, (low, high) in ends.items()}


def _set_row(gold: Any, predicted: Any) -> tuple[int, int, int]:
    right, said = {item_key(i) for i in gold}, {item_key(i) for i in predicted}
    return len(right & said), len(said - right), len(right - said)


def _set_score(sums: Numbers) -> Numbers:
    matched, invented, missed = sums.T
    return _divide(2 * matched, 2 * matched + invented + missed)


def _label_rows(known: dict[Any, int], gold: Sequence[Any], said: Sequence[Any]) -> Numbers:
    """Columns: in gold, said, said rightly; for each label."""
    rows = np.zeros((len(gold), 3, len(known)))
    for i, (right, found) in enumerate(zip(gold, said, strict=True)):
        rows[i, 0, known[right]] = rows[i, 1, known[found]] = 1
        rows[i, 2, known[right]] = right == found
    return rows.reshape(len(gold), -1)


def _label_score(sums: Numbers, macro: bool) -> Numbers:
    support, said, matched = np.moveaxis(sums.reshape(len(sums), 3, -1), 1, 0)
    f1 = _divide(2 * matched, support + said)
    weights = (support + said > 0).astype(float) if macro else support
    return _divide((weights * f1).sum(axis=1), weights.sum(axis=1))


def _rouge_row(metric: Callable[..., dict[str, float]], gold: Any, predicted: Any) -> tuple[float, int]:
    pairs = len(gold) if isinstance(gold, dict) else 1
    return metric([gold], [predicted])["rougeL"] * pairs, pairs


def _ratio(sums: Numbers) -> Numbers:
    return _divide(sums[:, 0], sums[:, 1])


def _tree_score(sums: Numbers) -> Numbers:
    distance, size = sums.T
    return np.where(size > 0, 1 - _divide(distance, size), (distance == 0).astype(float))


def _divide(part: Numbers, whole: Numbers) -> Numbers:
    """0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
