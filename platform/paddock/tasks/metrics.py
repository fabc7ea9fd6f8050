"""F1 of sets and of labels, equal to the benchmark's evaluators (which call scikit-learn for the labels)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal


def set_f1(gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
    """Strict micro-F1 of the items (dicts) that each row lists.

    Two items are equal where the values of their sorted keys are, to the character and in the order of
    inner lists; equal items of a row count once. 0 without a single match.
    """
    matched = invented = missed = 0
    for gold_items, predicted_items in zip(gold, predicted, strict=True):
        right, said = {item_key(i) for i in gold_items}, {item_key(i) for i in predicted_items}
        matched += len(right & said)
        invented += len(said - right)
        missed += len(right - said)
    if not matched:
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    precision = matched / (matched + invented)
    recall = matched / (matched + missed)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


def label_f1(
    gold: Sequence[Any], predicted: Sequence[Any], *, blank: str, average: Literal["macro", "weighted"]
) -> dict[str, float]:
    """Precision, recall and F1 averaged over the labels that occur in gold or predictions.

    `macro` is the plain mean over labels, `weighted` the mean by their number in gold; the keys are
    prefixed `macro-` for the former, as the benchmark names them. An empty prediction counts as `blank`.
    Source of the numbers: sklearn.metrics.classification_report(zero_division=0).
    """
    predicted = [label or blank for label in predicted]
    support, said = Counter(gold), Counter(predicted)
    matched = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    labels = sorted(support | said)
    weights = [support[label] if average == "weighted" else 1 for label in labels]
    precision = [_ratio(matched[label], said[label]) for label in labels]
    recall = [_ratio(matched[label], support[label]) for label in labels]
    f1 = [_ratio(2 * matched[label], said[label] + support[label]) for label in labels]
    prefix = "macro-" if average == "macro" else ""
    return {
        f"{prefix}{name}": sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        for name, values in (("precision", precision), ("recall", recall), ("f1", f1))
    }


def item_key(item: Mapping[str, Any]) -> tuple[str, ...]:
    """What two items must share to be equal."""
    return tuple(json.dumps(item[name], ensure_ascii=False) for name in sorted(item))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
